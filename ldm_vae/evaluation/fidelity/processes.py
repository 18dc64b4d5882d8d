"""Several processes that measure together: who takes which unit of work, and telling each other what was found.

Units are fixed by the settings, not by the number of processes, so results are the same for any number. Only Python
objects travel, by gloo on the CPU; the devices stay alone with their images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from ldm_vae.errors import EXIT_USER_ERROR, UserError

LONGEST_WAIT = timedelta(hours=24)
"""How long a process that has finished its share waits for the slowest one."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Processes:
    """This process's place: `index` of `count`; `local_index` chooses the GPU of its machine."""

    index: int = 0
    count: int = 1
    local_index: int = 0

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, units: Sequence[Item]) -> list[tuple[int, Item]]:
        """(number, unit) of the units that are this process's."""
        return [(number, unit) for number, unit in enumerate(units) if number % self.count == self.index]

    def gather(self, found: list[tuple[int, Item]]) -> list[Item]:
        """What all processes found for their units, in the order of the units, on every process."""
        parts = [found]
        if self.count > 1:
            from torch import distributed

            parts = [[] for _ in range(self.count)]
            distributed.all_gather_object(parts, found)
        return [item for _, item in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]

    def main_decides(self, decide: Callable[[], Answer]) -> Answer:
        """Run `decide` in the main process and tell all of them the answer. Its UserError ends them all, shown once."""
        if self.count == 1:
            return decide()
        from torch import distributed

        told: list[Any] = [None, None]
        if self.is_main:
            try:
                told[0] = decide()
            except UserError as error:
                told[1] = str(error)
        distributed.broadcast_object_list(told)
        if told[1] is not None:
            raise UserError(told[1]) if self.is_main else SystemExit(EXIT_USER_ERROR)
        return told[0]


def join_processes(expected: int | None = None) -> Processes:
    """The group that torchrun or `accelerate launch` started; a single process otherwise.

    Raises:
        UserError: another number of processes than `expected` was started.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if expected is not None and expected != launched:
        raise UserError(
            f"processes: {expected} were asked for, {launched} started; launch with `torchrun "
            f"--nproc_per_node {expected} scripts/evaluate.py ...`"
        )
    if launched == 1:
        return Processes()
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    return Processes(distributed.get_rank(), distributed.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def leave_processes() -> None:
    """End the group, where there is one."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
