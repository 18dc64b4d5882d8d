"""Exponential moving average of a module's weights, without host synchronization."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """Averaged copy of `module` (eval mode, no gradients). The decay grows as (t + 1) / (t + 50) up to `decay`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        # the parameters themselves, not `state_dict()`: DistributedDataParallel gives them other storage later
        self._averages = floating_tensors(self.module)
        self._sources = floating_tensors(module)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the module's present weights; `step` counts finished optimizer steps from 0."""
        decay = min(self.decay, (step + 1) / (step + 50))
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)


def floating_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of floating type, in a fixed order."""
    return [tensor for tensor in [*module.parameters(), *module.buffers()] if tensor.is_floating_point()]
