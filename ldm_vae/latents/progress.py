"""What an encoding job shows while it runs: images, their rate, the time left, and what it waits for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from ldm_vae.latents.images import ImageBatch


class Progress:
    """The bar of the main process: images of all processes, taking the others to be as fast as this one."""

    def __init__(self, total: int | None, done: int, accelerator: Any) -> None:
        """`total`: images of the job, None where unknown; `done`: those of finished shards."""
        from tqdm import tqdm

        self.processes = accelerator.num_processes
        self.encoded = 0
        self.waited_seconds = 0.0
        self.total = total
        self.bar = tqdm(
            total=total,
            initial=done if total is None else min(done, total),
            unit=" images",
            desc="encode",
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.5,
            disable=not accelerator.is_main_process,
        )
        self.started = time.monotonic()

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
        for rejection in batch.rejected:
            self.bar.write(f"{rejection.id}: left out: {rejection.message}")
        count = len(batch.rows) + len(batch.rejected)
        self.encoded += len(batch.rows)
        step = count * self.processes
        self.bar.update(step if self.total is None else min(step, self.total - self.bar.n))
        waiting = self.waited_seconds / max(1e-9, time.monotonic() - self.started)
        self.bar.set_postfix_str(f"waiting for images {waiting:.0%}", refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self.total is not None:
            self.bar.update(self.total - self.bar.n)
        self.bar.close()
