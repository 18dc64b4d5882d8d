"""A contestant in a process of its own: a program as a user runs it, without what our commands change in their process.

Owns the process and the turns it gets; what it does comes from the subject. While one contestant works the others wait,
as in `rounds`, so each has the whole machine.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any


class Outsider:
    """`with Outsider(make, *arguments) as action:` each `action()` is one call, over there, of what `make` returned.

    Args:
        make: A function of a module, so that the other process finds it; called there with the arguments.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self) -> None:
        """Returns when the call over there has. Raises: RuntimeError where that process ended."""
        try:
            self._pipe.send(True)
            self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("the program of another process ended; its words are above") from error

    def __enter__(self) -> Outsider:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, make: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
    import torch

    action = make(*arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pipe.send(True)
