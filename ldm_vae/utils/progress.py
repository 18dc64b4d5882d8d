"""The output of a command for people: a first line, a progress bar, a last line.

    begin("encode", "1,998 images of 10 classes", "512 pixels", "cpu, fp32", "to latents/mine")
    with Progress("encode", 1998) as bar:
        bar.advance(8)
    end("latents/mine", "1,998 latents in 8 shards", ["ldm-vae", "latents", "verify", "latents/mine"])

    encode: 1,998 images of 10 classes; 512 pixels; cpu, fp32; to latents/mine
    encode:  42%|████▏     | 840/1998 [01:02<01:25, 13.5 images/s]
    latents/mine: 1,998 latents in 8 shards; next: ldm-vae latents verify latents/mine

Sentences go to standard output, bars to standard error. Where standard error is not a terminal (a pipe, a log file), a
line every half a minute and one at the end take the place of the bar. Only the main process shows anything. No other
module of the package prints.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextvars import ContextVar
from typing import Any, TextIO, TypeVar

from ldm_vae.utils.text import duration_text, pluralize, rate_text, size_text, without_control

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 30.0
"""Shortest time between two lines of a bar that is not on a terminal."""
BYTE = "byte"
"""The unit of a bar whose numbers are shown as kB, MB ..."""

_inside: ContextVar[bool] = ContextVar("inside another command", default=False)


def is_main_process() -> bool:
    """Whether this process is the first of its launch (torchrun and `accelerate launch` set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "", *, error: bool = False) -> None:
    """Print lines that never stand on the same line as a bar, to standard output or `error`; main process only."""
    if not is_main_process():
        return
    stream = sys.stderr if error else sys.stdout
    tqdm = sys.modules.get("tqdm")
    with outlasting(stream):
        if tqdm is not None and tqdm.tqdm._instances:
            tqdm.tqdm.write(without_control(text), file=stream)  # takes the bars away and draws them again
            stream.flush()
        else:
            print(without_control(text), file=stream, flush=True)


@contextlib.contextmanager
def outlasting(stream: TextIO | None) -> Iterator[None]:
    """Whoever reads the output may go away (`| head`, a closed terminal): from then on it goes nowhere, and the work
    goes on."""
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def begin(command: str, *what: str, error: bool = False) -> None:
    """The first line: `command` and what it will do with what. Empty texts are left out.

    Args:
        error: to standard error, where standard output is for programs.
    """
    if not _inside.get():
        say(f"{command}: {'; '.join(part for part in what if part)}", error=error)


def end(where: object, what: str, then: Sequence[str] = (), *, error: bool = False) -> None:
    """The last line: the path, what was made, and the words of the next command, its program first."""
    if not _inside.get():
        say(f"{where}: {what}" + (f"; next: {shlex.join(then)}" if then else ""), error=error)


def end_dry_run(where: object, expected: str) -> None:
    """The last line of `--dry-run`. `expected`: the time that the command will take, or what is not known about it."""
    end(where, f"nothing was written; {expected}; the same command without --dry-run does it")


def open_page(page: object) -> list[str]:
    """The words that open an HTML file in a browser."""
    return ["python", "-m", "webbrowser", str(page)]


def beside(folder: object, ending: str) -> str:
    """A path for a result of a folder or file: `runs/mine` and `latents` give `runs/mine-latents`."""
    text = str(folder).rstrip("/")
    root, suffix = os.path.splitext(text)
    return f"{root if suffix and len(suffix) < 13 and os.path.isfile(text) else text}-{ending}"


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """For a command that calls another one, which then prints no first and last line."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


class Progress:
    """The progress of some work: a bar on a terminal, elsewhere occasional lines.

    Args:
        task: a short name of the work.
        total: the amount of work; None if unknown.
        unit: of `total`, in the singular; `byte` is shown as kB, MB ...
        done: the amount that an earlier attempt has done.
        shown: False shows nothing.
        leave: keep the finished bar on the screen. False for a small part of larger work.
    """

    def __init__(
        self, task: str, total: int | None = None, unit: str = "image", *, done: int = 0, shown: bool = True,
        leave: bool = True,
    ) -> None:  # fmt: skip
        self.task, self.total, self.unit, self.done, self.leave = task, total, unit, done, leave
        self.note = ""
        self._before = done
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        self.shown = shown and is_main_process()
        if self.shown and sys.stderr is not None and sys.stderr.isatty():
            with outlasting(sys.stderr):
                self._bar = self._drawn()

    def _drawn(self) -> Any:
        from tqdm import tqdm

        known = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        return tqdm(
            total=self.total,
            initial=self.done,
            desc=self.task,
            unit=self.unit,
            unit_scale=self.unit == BYTE,
            bar_format="{desc}: " + (known if self.total is not None else "{n_fmt} [{elapsed}{postfix}]"),
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.5,
            leave=self.leave,
        )

    @property
    def rate(self) -> float:
        """Rate of this attempt, per second."""
        return (self.done - self._before) / max(1e-9, time.monotonic() - self._started)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Add `count` to the finished work. `note`: text beside the bar, as the loss; None: unchanged."""
        self.done += count
        if note is not None:
            self.note = note
        if self._bar is not None:
            with outlasting(sys.stderr):
                self._bar.set_postfix_str(without_control(self._beside()), refresh=False)
                self._bar.update(count)
        elif self.shown and time.monotonic() >= self._last_line + SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(self._line(), error=True)

    def advance_to(self, done: int, note: str | None = None) -> None:
        """Set the finished work."""
        self.advance(done - self.done, note)

    def _beside(self) -> str:
        speed = rate_text(self.rate, self.unit) if self.done > self._before else ""
        return ", ".join(part for part in (speed, self.note) if part)

    def _line(self) -> str:
        count = pluralize(self.done, self.unit) if self.unit != BYTE else size_text(self.done)
        left = ""
        if self.total is not None:
            of = pluralize(self.total, self.unit) if self.unit != BYTE else size_text(self.total)
            count = f"{count.split()[0] if self.unit != BYTE else count} of {of}"
            if self.rate > 0:
                left = f"{duration_text((self.total - self.done) / self.rate)} left"
        return f"{self.task}: " + ", ".join(part for part in (count, left, self._beside()) if part)

    def _last(self) -> str:
        count = pluralize(self.done, self.unit) if self.unit != BYTE else size_text(self.done)
        if self._before:
            count += f", {self.done - self._before:,} of them"
        spent = duration_text(time.monotonic() - self._started)
        return f"{self.task}: " + ", ".join(part for part in (f"{count} in {spent}", self._beside()) if part)

    def close(self, finished: bool = True) -> None:
        """Close the bar. `finished`: False if the work was interrupted."""
        if self._bar is not None:
            with outlasting(sys.stderr):
                self._bar.close()
        elif self.shown and finished and self.leave and self.done > self._before:
            say(self._last(), error=True)
        self._bar, self.shown = None, False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(kind is None)


def track(
    items: Iterable[Item], task: str, unit: str = "image", total: int | None = None, *, shown: bool = True,
    leave: bool = False,
) -> Iterator[Item]:  # fmt: skip
    """Yield the items under a bar. `total`: their number, if they have no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(task, total, unit, shown=shown, leave=leave) as bar:
        for item in items:
            yield item
            bar.advance()


class LineHandler(logging.Handler):
    """Warnings of the package as lines on standard error that never stand on the same line as a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), error=True)
