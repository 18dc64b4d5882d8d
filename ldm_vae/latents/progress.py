"""What an encoding job shows while it runs: images, their rate, the time left, and how busy the model is."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ldm_vae.latents.images import ImageBatch

SHOWN_REJECTIONS = 20


class BusyTime:
    """How long the model computed, on a GPU by its own clock and without waiting for it.

    `lanes`: batches computed at once.
    """

    def __init__(self, device: torch.device, lanes: int) -> None:
        self.device, self.lanes = device, lanes
        self.started = time.monotonic()
        self._seconds = 0.0
        self._lock = threading.Lock()
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
            return
        before = time.monotonic()
        yield
        with self._lock:
            self._seconds += time.monotonic() - before

    def fraction(self) -> float:
        """Of the time since the start, 0 to 1."""
        while self._events and self._events[0][1].query():
            start, end = self._events.popleft()
            self._seconds += start.elapsed_time(end) / 1000
        return min(1.0, self._seconds / self.lanes / max(1e-9, time.monotonic() - self.started))


class Progress:
    """The bar of the main process: images of all processes, taking the others to be as fast as this one."""

    def __init__(self, total: int | None, done: int, accelerator: Any, busy: BusyTime, title: str = "encode") -> None:
        """`total`: images of the job, None where unknown; `done`: those of finished shards."""
        from tqdm import tqdm

        self.processes = accelerator.num_processes
        self.encoded = self.rejected = 0
        self.waited_seconds = 0.0
        self.total, self.busy = total, busy
        self.bar = tqdm(
            total=total,
            initial=done if total is None else min(done, total),
            unit=" images",
            desc=title,
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.5,
            disable=not accelerator.is_main_process,
        )

    def timed(self, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        """The same batches, with the time of waiting for each of them added up."""
        source = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(source, None)
            self.waited_seconds += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def advance(self, batch: ImageBatch) -> None:
        for number, rejection in enumerate(batch.rejected, self.rejected):
            if number < SHOWN_REJECTIONS:
                self.bar.write(f"{rejection.id}: left out: {rejection.message}")
            elif number == SHOWN_REJECTIONS:
                self.bar.write("and more are left out; quarantine.jsonl will list them all")
        count = len(batch.rows) + len(batch.rejected)
        self.encoded += len(batch.rows)
        self.rejected += len(batch.rejected)
        step = count * self.processes
        self.bar.update(step if self.total is None else min(step, self.total - self.bar.n))
        left_out = f", {self.rejected} left out" if self.rejected else ""
        self.bar.set_postfix_str(f"model busy {self.busy.fraction():.0%}{left_out}", refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self.total is not None:
            self.bar.update(self.total - self.bar.n)
        self.bar.close()
