"""Whose turn it is: a short queue, the newest hover of a session, and nothing for those who left."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator

import pytest

from ldm_vae.applications.explorer.limits import MAXIMUM_SESSIONS, MAXIMUM_WAITING, Refusal, Turn, Worker

SECONDS = 60.0


class Gate:
    """Work that begins, tells so, and waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.open.wait(SECONDS)
        return "first"


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    assert worker.close(SECONDS)


def outcome(result: object) -> object:
    return result.status if isinstance(result, Refusal) else result


def meanwhile(worker: Worker, then: Callable[[Worker, Gate], Awaitable[object]]) -> tuple[object, object]:
    """The results of a piece of work that takes long, and of what happens while it runs."""

    async def scene() -> tuple[object, object]:
        gate = Gate()
        first = asyncio.ensure_future(worker.run(gate))
        await asyncio.to_thread(gate.begun.wait, SECONDS)
        second = await then(worker, gate)
        gate.open.set()
        return await first, second

    return asyncio.run(asyncio.wait_for(scene(), SECONDS))


async def settled(*tasks: asyncio.Future[object]) -> list[object]:
    return [outcome(result) for result in await asyncio.gather(*tasks, return_exceptions=True)]


async def started(worker: Worker, work: Callable[[], object], turn: Turn | None = None) -> asyncio.Future[object]:
    """A request that has come as far as it can."""
    task = asyncio.ensure_future(worker.run(work, turn))
    await asyncio.sleep(0)
    return task


def test_one_thread_computes_everything_in_order(worker):
    async def all_of_it() -> list[tuple[int, str]]:
        work = [lambda number=number: (number, threading.current_thread().name) for number in range(8)]
        return list(await asyncio.gather(*(worker.run(one) for one in work)))

    assert asyncio.run(all_of_it()) == [(number, "explorer-worker") for number in range(8)]


def test_what_work_raises_comes_back(worker):
    def wrong() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        asyncio.run(worker.run(wrong))
    assert asyncio.run(worker.run(lambda: "goes on")) == "goes on"


def test_of_a_session_only_the_newest_waits(worker):
    computed = []

    async def hovers(worker: Worker, gate: Gate) -> list[object]:
        tasks = [await started(worker, lambda n=n: computed.append(n) or n, Turn(("s",), n)) for n in (1, 2, 5, 3, 4)]
        other = await started(worker, lambda: "other session", Turn(("t",), 1))
        gate.open.set()
        return await settled(*tasks, other)

    assert meanwhile(worker, hovers) == ("first", [409, 409, 5, 409, 409, "other session"])
    assert computed == [5]


def test_an_overtaken_hover_is_refused_before_the_computation_ends(worker):
    async def hovers(worker: Worker, gate: Gate) -> list[object]:
        older = await started(worker, lambda: 1, Turn(("s",), 1))
        newer = await started(worker, lambda: 2, Turn(("s",), 2))
        refused = await settled(older)  # the gate is still closed
        newer.cancel()
        return refused

    assert meanwhile(worker, hovers)[1] == [409]


def test_what_has_begun_is_finished(worker):
    async def scene() -> list[object]:
        gate = Gate()
        older = await started(worker, gate, Turn(("s",), 1))
        await asyncio.to_thread(gate.begun.wait, SECONDS)
        newer = await started(worker, lambda: "newer", Turn(("s",), 2))
        gate.open.set()
        return await settled(older, newer)

    assert asyncio.run(scene()) == ["first", "newer"]


def test_too_many_are_refused_at_once(worker):
    async def crowd(worker: Worker, gate: Gate) -> list[object]:
        tasks = [await started(worker, lambda: "late") for _ in range(MAXIMUM_WAITING)]
        refused = await settled(await started(worker, lambda: "never"))
        gate.open.set()
        return refused + await settled(*tasks)

    assert meanwhile(worker, crowd)[1] == [429] + ["late"] * MAXIMUM_WAITING


def test_what_nobody_waits_for_is_not_computed(worker):
    computed = []

    async def leaving(worker: Worker, gate: Gate) -> None:
        tasks = [await started(worker, lambda: computed.append(1)) for _ in range(MAXIMUM_WAITING)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gate.open.set()
        await worker.run(lambda: computed.append("last"))  # there is room again

    meanwhile(worker, leaving)
    assert computed == ["last"]


def test_results_and_sessions_are_not_kept(worker):
    class Large:
        pass

    async def hovers() -> int:
        alive = weakref.WeakSet()

        def work() -> Large:
            alive.add(large := Large())
            return large

        for number in range(3 * MAXIMUM_SESSIONS):
            await worker.run(work, Turn((f"session {number}",), number))
        for _ in range(500):
            if alive:  # the thread lets go of the last just after it told it
                await asyncio.sleep(0.01)
        return len(alive)

    assert asyncio.run(hovers()) == 0
    assert len(worker._newest) == MAXIMUM_SESSIONS


def test_closing_refuses_all_even_what_is_being_computed():
    worker, gate = Worker(), Gate()

    async def scene() -> list[object]:
        tasks = [await started(worker, work) for work in (gate, lambda: 1, lambda: 2)]
        await asyncio.to_thread(gate.begun.wait, SECONDS)
        assert not await asyncio.to_thread(worker.close, 0.01)
        return await settled(*tasks, await started(worker, lambda: 3))

    assert asyncio.run(scene()) == [503] * 4
    gate.open.set()
    assert worker.close(SECONDS)
