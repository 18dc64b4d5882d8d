"""Nothing waits for ever: a thread that ends this process when it, its launcher or another process stands still.

A loop calls `advance(step)`; from then on the next call must come within the timeout. Work of one process for all
(saving, validation, counting files) stands in `solo()` and may take SOLO_FACTOR times as long; those who wait for it
stand in `waiting()`, as long as the others give signs of life. Outside of these a process has the time of `solo()`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from ldm_vae.errors import EXIT_STUCK, UserError
from ldm_vae.training.heartbeats import Heartbeats
from ldm_vae.training.signals import launched, write_error

SOLO_FACTOR = 12
TICK_SECONDS = 1.0

GRACE_SECONDS = 10
"""More than a collective or a data loader has, whose own errors say more."""

FAREWELL_LENGTH = 500

_current: Watchdog | None = None


def advance(step: int | None = None) -> None:
    """The loop of this process has finished a step, or gets on within one. Does nothing where no watchdog is."""
    if _current is not None:
        _current.advance(step)


@contextlib.contextmanager
def solo() -> Iterator[None]:
    """What this process does now takes its time."""
    if _current is not None:
        _current.allow(_current.timeout_seconds * SOLO_FACTOR)
    yield
    if _current is not None:
        _current.allow(_current.timeout_seconds * SOLO_FACTOR)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """This process waits for others, whose own watchdogs see to it that they get on."""
    if _current is not None:
        _current.allow(None)
    yield
    if _current is not None:
        _current.allow(_current.timeout_seconds * SOLO_FACTOR)


def explained(error: BaseException) -> UserError | None:
    """For an error of a message between processes the sentence that names who is gone; None for any other error."""
    if _current is None or _current.heartbeats is None or not is_communication_error(error):
        return None
    return UserError(f"{_current.heartbeats.explanation()}; the same command continues")


def is_communication_error(error: BaseException | None) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


class Watchdog:
    """Context manager around a job. Only one at a time: it is a property of the process."""

    def __init__(self, accelerator: Any, timeout_seconds: float) -> None:
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.timeout_seconds = timeout_seconds
        self.heartbeats: Heartbeats | None = None
        self._allowed_seconds: float | None = timeout_seconds * SOLO_FACTOR
        self._still_seconds = 0.0
        self._orphan_seconds = 0.0
        self._launcher = os.getppid() if launched() else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        global _current
        if self.processes > 1:
            from accelerate.utils import broadcast_object_list

            job = [uuid.uuid4().hex]
            broadcast_object_list(job)
            self.heartbeats = Heartbeats(self.rank, self.processes, job[0])
        _current = self
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        global _current
        _current = None
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if kind is not None and launched():  # the launcher waits for the end of this process
            faulthandler.dump_traceback_later(self.timeout_seconds, exit=True, file=2)
        if self.heartbeats is not None:
            self.heartbeats.end("" if kind is None else farewell(error))

    def advance(self, step: int | None) -> None:
        self._still_seconds = 0.0
        if step is None:
            return
        self._allowed_seconds = self.timeout_seconds + GRACE_SECONDS
        if self.heartbeats is not None:
            self.heartbeats.at_step(step)

    def allow(self, seconds: float | None) -> None:
        self._allowed_seconds, self._still_seconds = seconds, 0.0

    def _run(self) -> None:
        """Time is counted in ticks: a process that was stopped (Ctrl-Z) and goes on has not stood still."""
        last = time.monotonic()
        while not self._ended.wait(TICK_SECONDS):
            now = time.monotonic()
            seconds, last = min(now - last, 1.5 * TICK_SECONDS), now
            self._still_seconds += seconds
            self._orphan_seconds += seconds if self._launcher not in (None, os.getppid()) else 0.0
            self._guard_against_the_lock()
            reason, stacks = self._reason()
            if reason and not self._ended.is_set():
                self._end(reason, stacks)

    def _guard_against_the_lock(self) -> None:
        """Should native code keep Python's lock, this thread cannot run any more; faulthandler's can."""
        if self.processes > 1:  # alone nobody waits for us, and the clock of faulthandler runs on during Ctrl-Z
            seconds = self.timeout_seconds * (SOLO_FACTOR + 1)
            if self._allowed_seconds is not None:
                seconds = self._allowed_seconds + self.timeout_seconds
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _reason(self) -> tuple[str, bool]:
        """Why this process must end ("" for no reason), and whether its own stacks tell something about that."""
        if self._allowed_seconds is not None and self._still_seconds > self._allowed_seconds:
            return f"no progress for {self._still_seconds:.0f} s", True
        if self._orphan_seconds > self.timeout_seconds:
            return f"its launcher died {self._orphan_seconds:.0f} s ago", True
        lost = self.heartbeats.lost(self.timeout_seconds, GRACE_SECONDS) if self.heartbeats else []
        return "; ".join(lost), False

    def _end(self, reason: str, stacks: bool) -> None:
        write_error(
            f"ldm_vae: rank {self.rank} of {self.processes} (process {os.getpid()}) ends: {reason}; the same command "
            "continues; if something may take longer than that, raise timeout_seconds\n"
        )
        if stacks:
            faulthandler.dump_traceback(file=2, all_threads=True)
        if self.heartbeats is not None:
            self.heartbeats.end(reason if stacks else "")
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(EXIT_STUCK)


def farewell(error: BaseException | None) -> str:
    """How others are told of the end of a process by this error; of one that only suffered, that it is well."""
    if is_communication_error(error) or is_communication_error(getattr(error, "__cause__", None)):
        return ""
    words = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return words.removesuffix("; the same command continues")[:FAREWELL_LENGTH]
