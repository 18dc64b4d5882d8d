"""One thread that computes for all requests of the explorer, with a short queue in front of it.

Owns whose turn it is: work waits in order, at most `MAXIMUM_WAITING` pieces; of the hovers of one session only the
newest waits, an older one that has not begun is refused at once; what nobody waits for any more is not computed.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from ldm_vae.applications.explorer.limits import Refusal

MAXIMUM_WAITING = 16
MAXIMUM_SESSIONS = 64
"""Sequences of hovers that are remembered; of more, the one that rested longest is forgotten."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Turn:
    """The place of a hover: `sequence` rises within `session`, which names a page and what it hovers over."""

    session: tuple[str, ...]
    sequence: int


class Job:
    """A piece of work and who waits for it. Only the event loop touches `answer`."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Any] = self.loop.create_future()

    def settle(self, result: Any, error: BaseException | None) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it who waited
            self.loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(result)
        else:
            self.answer.set_exception(error)


class Worker:
    """Starts its thread at once; `close` ends it."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._newest: OrderedDict[tuple[str, ...], tuple[int, Job | None]] = OrderedDict()
        self._thread = threading.Thread(target=self._compute, name="explorer-worker", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], Result], turn: Turn | None = None) -> Result:
        """The result of `work`, computed in the thread. Leaving this early takes back what has not begun.

        Raises:
            Refusal: 409 when a newer hover came, 429 when too much waits, 503 when the server ends; else what `work`
                raises.
        """
        self._check_turn(turn)
        job = Job(work)
        with self._changed:
            if self._closed:
                raise _ending()
            if len(self._waiting) >= MAXIMUM_WAITING:
                sentence = f"{MAXIMUM_WAITING} requests wait already; ask again in a second"
                raise Refusal(429, sentence, {"Retry-After": "1"})
            self._waiting.append(job)
            self._changed.notify_all()
        if turn is not None:
            self._newest[turn.session] = (turn.sequence, job)
        try:
            result: Result = await job.answer
            return result
        finally:
            self._take_back(job)
            if turn is not None and self._newest.get(turn.session) == (turn.sequence, job):
                self._newest[turn.session] = (turn.sequence, None)  # the answer is not kept

    def _check_turn(self, turn: Turn | None) -> None:
        """Refuse a hover that is late already; the one that it overtakes goes. Only the event loop comes here."""
        if turn is None:
            return
        sequence, older = self._newest.pop(turn.session, (-1, None))
        if turn.sequence < sequence:
            self._newest[turn.session] = (sequence, older)
            raise _overtaken()
        self._newest[turn.session] = (turn.sequence, None)
        if len(self._newest) > MAXIMUM_SESSIONS:
            self._newest.popitem(last=False)
        if older is not None and self._take_back(older):
            older.settle(None, _overtaken())

    def _take_back(self, job: Job) -> bool:
        """Whether it had not begun."""
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)
            return True
        return False

    def _compute(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._current = self._waiting.popleft()
            try:
                result, error = job.work(), None
            except Exception as raised:
                result, error = None, raised
            job.settle(result, error)
            del job, result, error  # while it waits for the next, it holds nothing

    def rest(self, seconds: float) -> None:
        """Come back when there is nothing to compute, after `seconds` in any case."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not (self._waiting or self._current), seconds)

    def close(self, seconds: float) -> bool:
        """Refuse all that waits, and what is being computed; whether the thread ended within `seconds`."""
        with self._changed:
            self._closed = True
            abandoned = [*self._waiting, *([self._current] if self._current else [])]
            self._waiting.clear()
            self._changed.notify_all()
        for job in abandoned:
            job.settle(None, _ending())
        self._thread.join(seconds)
        return not self._thread.is_alive()


def _overtaken() -> Refusal:
    return Refusal(409, "a newer request of this session came; only the newest is answered")


def _ending() -> Refusal:
    return Refusal(503, "the explorer is ending; start it again")
