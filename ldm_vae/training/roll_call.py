"""At the end of every step the processes tell each other where they are, whether to stop, and what weights they hold.

The message travels on the CPU while the next step is computed, so that nobody waits for a device; what it says is known
one step later, to all processes at the same step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae.errors import UserError
from ldm_vae.training.processes import patient_group, wait


class RollCall:
    """One message a step, of numbers whose largest and smallest value over the processes are compared."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._checksum = 0
        self._sent: tuple[int, Tensor, Any] | None = None

    def holds(self, checksum: int) -> None:
        """The weights of this process, from now on; at the same step in all of them."""
        self._checksum = checksum % 2**62

    def stop_agreed(self, step: int, first_index: int, stop: bool) -> bool:
        """Whether every process shall stop after `step`. `first_index`: of the sample that the global batch began with.

        Raises:
            UserError: the processes were not in the same step, or had other samples or other weights.
        """
        if self.processes == 1:
            return stop
        agreed = self.finish()
        from torch import distributed

        numbers = [step, first_index, self._checksum]
        message = torch.tensor([stop, *numbers, *(-number for number in numbers)], dtype=torch.int64)
        work = distributed.all_reduce(message, distributed.ReduceOp.MAX, group=patient_group(), async_op=True)
        self._sent = (step, message, work)
        return agreed

    def finish(self) -> bool:
        """Wait for the last message. Returns: whether it said to stop."""
        if self._sent is None:
            return False
        (step, message, work), self._sent = self._sent, None
        wait(work)
        stop, *most = message.tolist()
        largest, smallest = most[:3], [-number for number in most[3:]]
        what = [
            f"in steps {smallest[0]} to {largest[0]}",
            "at other samples: their data differ, or its order",
            "with other weights",
        ]
        for words, low, high in zip(what, smallest, largest):
            if low != high:
                raise UserError(
                    f"step {step}: the processes are out of step, {words}; look at what differs between them; the same "
                    "command continues from the last checkpoint"
                )
        return bool(stop)


def checksum(modules: list[nn.Module], device: torch.device) -> Tensor:
    """Of all trained weights, to the bit: their sum as integers, weighted by the parameter's number, on the device."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for module in modules:
        for number, parameter in enumerate(module.parameters(), start=1):
            if parameter.requires_grad:
                total += number * parameter.detach().float().view(torch.int32).sum(dtype=torch.int64)
    return total
