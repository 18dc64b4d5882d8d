"""SIGTERM, SIGINT and SIGHUP: finish the step, save, leave with exit code 75. A second signal stops at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1

SAME_REQUEST_SECONDS = 2.0
"""Under a launcher a second signal so soon is the same one: a cluster signals the launcher and its children, and the
launcher passes it on."""


class StopRequest:
    """Context manager that turns a signal into a flag, or, for work that may be left anywhere, into an interruption."""

    def __init__(self, *, at_once: bool = False) -> None:
        """`at_once`: the first signal raises KeyboardInterrupt where the program is."""
        self.received: int | None = None
        self._at_once = self._saves_nothing = at_once
        self._received_at = 0.0
        self._launcher = os.getppid() if launched() else None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: a closed terminal is no request
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """What is done here is left at a signal."""
        self._at_once = True
        try:
            yield
        except KeyboardInterrupt:
            write_error("left out, to stop sooner\n")
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if self._is_same_request():
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received, self._received_at = number, time.monotonic()
        how = "leaving" if self._saves_nothing else "saving after this step, then leaving"
        write_error(f"\n{signal.Signals(number).name}: {how} (again to stop at once)\n")
        if self._at_once:
            raise KeyboardInterrupt

    def _is_same_request(self) -> bool:
        """Ctrl-C ends `accelerate launch` too, whose death is a signal to us."""
        if self._launcher is None:
            return False
        if os.getppid() != self._launcher:
            self._launcher = os.getppid()
            return True
        return time.monotonic() - self._received_at < SAME_REQUEST_SECONDS


def launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def die_with_launcher() -> None:
    """Under `accelerate launch` or torchrun: get SIGTERM when the launcher dies; it would leave its child running."""
    if launched():
        _die_with_parent(signal.SIGTERM)


def obey_only_the_parent(_: int = 0) -> None:
    """For a loading process: signals to the process group are its parent's business, and with the parent it dies.

    At SIGUSR1 it shows what it is doing.
    """
    import faulthandler
    import multiprocessing

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    _die_with_parent(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before the request
        os._exit(1)


def _die_with_parent(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)


def write_error(text: str) -> None:
    """To standard error past Python's buffers, which a signal handler or another thread may have found half filled."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
