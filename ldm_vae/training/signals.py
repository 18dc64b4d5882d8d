"""SIGTERM and SIGINT: finish the step, save, leave with exit code 75. A second signal stops at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType
from typing import Any

import torch

AGREE_EVERY_STEPS = 8
PR_SET_PDEATHSIG = 1


class StopRequest:
    """Context manager that turns a signal into a flag which all processes see at the same step."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        die_with_launcher()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        name = signal.Signals(number).name
        print(f"\n{name}: saving after this step, then leaving (again to stop at once)", file=sys.stderr, flush=True)

    def agreed(self, step: int) -> bool:
        """Whether every process shall stop after `step`. Processes talk about it every few steps only."""
        if self.accelerator.num_processes == 1:
            return self.received is not None
        if step % AGREE_EVERY_STEPS:
            return False
        flag = torch.tensor(float(self.received is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item() > 0)


def die_with_launcher() -> None:
    """Under `accelerate launch` or torchrun: get SIGTERM when the launcher dies; it would leave its child running."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
