"""A watchdog thread that ends this process when it, its launcher or another process hangs; and signal handling.

A loop calls `advance(step)`, and the next call must come within the timeout. Work of one process for all (saving,
validation, counting files) is done in `solo()` and may take SOLO_FACTOR times as long. The others wait for it in
`waiting()`, as long as all processes send heartbeats. Other code has the same time as `solo()`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from types import FrameType
from typing import Any

from ldm_vae.errors import EXIT_STUCK, UserError

SOLO_FACTOR = 12
TICK_SECONDS = 1.0

GRACE_SECONDS = 10
"""Longer than the timeouts of collectives and data loaders, whose own errors say more."""

REASON_LENGTH = 500

CONTINUES = "the same command continues"

_current: Watchdog | None = None


class ProcessLost(UserError):
    """A message between processes did not arrive: another process hangs or has ended."""


def advance(step: int | None = None) -> None:
    """Report that this process has finished a step or made progress within one. Without a watchdog, does nothing."""
    if _current is not None:
        _current.advance(step)


@contextlib.contextmanager
def solo() -> Iterator[None]:
    """Work inside this block may take longer than a step."""
    if _current is not None:
        _current.allow(_current.timeout_seconds * SOLO_FACTOR)
    yield
    if _current is not None:
        _current.allow(_current.timeout_seconds * SOLO_FACTOR)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Inside this block, the process waits for others, which have watchdogs of their own."""
    if _current is not None:
        _current.allow(None)
    yield
    if _current is not None:
        _current.allow(_current.timeout_seconds * SOLO_FACTOR)


def lost_process(error: BaseException) -> ProcessLost | None:
    """The error to raise instead of a failed message between processes; None for any other error."""
    if _current is None or _current.heartbeats is None or not is_communication_error(error):
        return None
    return ProcessLost("", _current.heartbeats.explanation(), CONTINUES)


def is_communication_error(error: BaseException | None) -> bool:
    """gloo's errors have no class of their own."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


class Watchdog:
    """Context manager around a job. A process can have only one at a time."""

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
        if kind is not None and launched():  # since the launcher waits for this process
            faulthandler.dump_traceback_later(self.timeout_seconds, exit=True, file=2)
        if self.heartbeats is not None:
            self.heartbeats.end("" if kind is None else exit_reason(error))

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
        """Time is counted in ticks, so that a stopped process (Ctrl-Z) that continues does not count as hanging."""
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
        """If native code holds Python's lock, this thread cannot run, but faulthandler's can."""
        if (
            self.processes > 1
        ):  # a single process keeps no other waiting, and faulthandler's clock also runs during Ctrl-Z
            seconds = self.timeout_seconds * (SOLO_FACTOR + 1)
            if self._allowed_seconds is not None:
                seconds = self._allowed_seconds + self.timeout_seconds
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _reason(self) -> tuple[str, bool]:
        """The reason why this process must end ("" for none), and whether its own stack traces show the cause."""
        if self._allowed_seconds is not None and self._still_seconds > self._allowed_seconds:
            return f"no progress for {self._still_seconds:.0f} s", True
        if self._orphan_seconds > self.timeout_seconds:
            return f"its launcher died {self._orphan_seconds:.0f} s ago", True
        lost = self.heartbeats.lost(self.timeout_seconds, GRACE_SECONDS) if self.heartbeats else []
        return "; ".join(lost), False

    def _end(self, reason: str, stacks: bool) -> None:
        write_error(
            f"ldm_vae: rank {self.rank} of {self.processes} (process {os.getpid()}) ends: {reason}; {CONTINUES}; "
            "if something may take longer than that, raise timeout_seconds\n"
        )
        if stacks:
            faulthandler.dump_traceback(file=2, all_threads=True)
        if self.heartbeats is not None:
            self.heartbeats.end(reason if stacks else "")
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(EXIT_STUCK)


def exit_reason(error: BaseException | None) -> str:
    """The message to the other processes about an end by this error; empty if another process caused it."""
    if isinstance(error, ProcessLost) or is_communication_error(error):
        return ""
    text: object = error
    if isinstance(error, UserError):  # without the advice
        text = ": ".join(part for part in (error.where, error.what) if part)
    return f"{type(error).__name__}: {text}".strip().splitlines()[0][:REASON_LENGTH]


# Heartbeats: every process of a job writes to the store of its process group and reads those of the others.

BEAT_SECONDS = 1.0

SILENCE_SECONDS = 3.0
"""A process without a heartbeat for this time counts as ended when a message did not arrive."""

ENDING_SECONDS = 2.0
"""The longest wait of the last heartbeat for the previous one."""

CONNECT_SECONDS = 30
SHOWN_RANKS = 4


@dataclass(frozen=True)
class Beat:
    """The state of a process. `exit_reason`: None while it runs, else why it ended ("" without an error)."""

    rank: int
    pid: int
    host: str
    number: int = 0
    step: int = 0
    exit_reason: str | None = None

    def describe(self, processes: int) -> str:
        return f"rank {self.rank} of {processes} (process {self.pid} on {self.host})"


class Heartbeats:
    """Sends heartbeats from the start to the end of a job, in its own thread: a store that hangs stops nothing else.

    Seconds of silence are counted in heartbeats of this process, so that no process counts as dead in a job that was
    stopped as a whole and continues later.
    """

    def __init__(self, rank: int, processes: int, job: str) -> None:
        """`job`: a new name, the same in all processes, since the store may hold heartbeats of earlier jobs."""
        from torch.distributed import PrefixStore, TCPStore

        self.rank, self.processes, self.step = rank, processes, 0
        self.own = Beat(rank, os.getpid(), socket.gethostname())
        self.others: dict[int, Beat] = {}
        self.silent_seconds: dict[int, float] = {}
        self.reads_all = rank == 0
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=CONNECT_SECONDS),
        )
        self._store: Any = PrefixStore(f"ldm_vae/{job}", store)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def at_step(self, step: int) -> None:
        """Set the step of the next heartbeat. Only the thread changes `own`, otherwise a step could be lost."""
        self.step = step

    def end(self, reason: str) -> None:
        """Send the last heartbeat, without a long wait: the store may have ended with the launcher."""
        self._ended.set()
        self._thread.join(ENDING_SECONDS)
        if not self._thread.is_alive():
            self.own = replace(self.own, exit_reason=reason)
            try:
                self._send()
            except RuntimeError:
                return

    def lost(self, silent: float, ended: float = 0.0) -> list[str]:
        """A sentence for each other process that was silent for this time, or ended with an error this long ago."""
        sentences = []
        for rank, beat in sorted(self.others.items()):
            who = beat.describe(self.processes)
            if beat.exit_reason and self.silent_seconds[rank] >= ended:
                sentences.append(f"{who} ended: {beat.exit_reason}")
            elif beat.exit_reason is None and self.silent_seconds[rank] >= silent:
                sentences.append(f"{who} gives no sign of life after step {beat.step}: it was killed or stopped")
        return sentences

    def explanation(self) -> str:
        """Why a message did not arrive: who has ended, else the step of each. Takes up to 1.5 * SILENCE_SECONDS."""
        self.reads_all = True
        deadline = time.monotonic() + 1.5 * SILENCE_SECONDS
        lost: list[str] = []
        while not lost and time.monotonic() < deadline and self._thread.is_alive():
            lost = self.lost(SILENCE_SECONDS)
            time.sleep(BEAT_SECONDS / 5)
        beats = sorted(self.others.values(), key=lambda beat: (beat.step, beat.rank))
        places = [f"{beat.describe(self.processes)} is in step {beat.step}" for beat in beats]
        shown = lost or [f"a message of another process did not come in time to step {self.step}", *places]
        return "; ".join(shown[:SHOWN_RANKS]) + ("; and more" if len(shown) > SHOWN_RANKS else "")

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            now = time.monotonic()
            try:
                self._send()
                self._receive(min(now - last, 2 * BEAT_SECONDS))
            except RuntimeError:  # the store has ended with the launcher; other checks end the remaining processes
                return
            last = now
            if self._ended.wait(BEAT_SECONDS):
                return

    def _send(self) -> None:
        self.own = replace(self.own, number=self.own.number + 1, step=self.step)
        self._store.set(str(self.rank), json.dumps(asdict(self.own)))

    def _receive(self, seconds: float) -> None:
        ranks = range(self.processes) if self.reads_all else range(1)
        ranks_there = [r for r in ranks if r != self.rank and (r in self.others or self._store.check([str(r)]))]
        if not ranks_there:
            return
        for rank, text in zip(ranks_there, self._store.multi_get([str(rank) for rank in ranks_there])):
            beat = Beat(**json.loads(text))
            same = rank in self.others and beat == self.others[rank]
            self.silent_seconds[rank] = self.silent_seconds[rank] + seconds if same else 0.0
            self.others[rank] = beat


# SIGTERM, SIGINT and SIGHUP: finish the step, save, leave with exit code 75. A second signal stops at once.

PR_SET_PDEATHSIG = 1

SAME_REQUEST_SECONDS = 2.0
"""Under a launcher, a second signal within this time is the same one: a cluster signals the launcher and its children,
and the launcher passes it on."""


class StopRequest:
    """Context manager that turns a signal into a flag, or, for work that may stop anywhere, into an interruption."""

    def __init__(self, *, at_once: bool = False) -> None:
        """`at_once`: the first signal raises KeyboardInterrupt."""
        self.received: int | None = None
        self._at_once = self._saves_nothing = at_once
        self._received_at = 0.0
        self._launcher = os.getppid() if launched() else None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: a closed terminal does not ask to stop
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """A signal interrupts the code in this block."""
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
        """Ctrl-C also ends `accelerate launch`, and its end sends a signal to this process."""
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
    """Under `accelerate launch` or torchrun: request SIGTERM when the launcher dies, so that this process ends too."""
    if launched():
        _die_with_parent(signal.SIGTERM)


def obey_only_the_parent(_: int = 0) -> None:
    """For a loading process: it ignores signals to the process group and dies with its parent.

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
    """Write to standard error without Python's buffers, which may be in an inconsistent state in a signal handler."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
