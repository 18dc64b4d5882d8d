"""Moving averages of a module's weights, without host synchronisation: exponential ones and power-function ones.

A power-function average (Karras et al. 2024, arXiv:2312.02696, section 3) weights the weights of step tau of t by
tau^gamma, so its width is a fixed share of the run so far. Its *length* sigma_rel is the standard deviation of that
profile over t. Averages of two lengths, stored now and then, are enough to make one of another length afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
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


class PowerEma:
    """The power-function average of a module's parameters at one length. After t steps its profile is tau^gamma."""

    def __init__(self, module: nn.Module, length: float) -> None:
        self.length = length
        self.gamma = gamma_of(length)
        self.tensors: dict[str, torch.Tensor] = {}
        self._module = module

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the present weights; `step` counts finished optimizer steps from 0, at which it is a copy."""
        if not self.tensors:  # also of a checkpoint that has no such average: it begins with the weights there
            self.load({name: parameter.detach() for name, parameter in self._module.named_parameters()})
        weights = [parameter.detach() for parameter in self._module.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - power_decay(step, self.gamma))

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over `tensors`, copied to the parameters' device and memory format."""
        parameters = self._module.named_parameters()
        self.tensors = {name: torch.empty_like(p, requires_grad=False).copy_(tensors[name]) for name, p in parameters}


def power_decay(step: int, gamma: float) -> float:
    """beta = (1 - 1 / t)^(gamma + 1) of update t = step + 1: what of the average stays."""
    return (1 - 1 / (step + 1)) ** (gamma + 1)


def gamma_of(length: float) -> float:
    """The exponent whose profile has the standard deviation `length`, in units of the run so far.

    Raises: ValueError for a length outside (0, 0.28]: that of the plain mean is 0.289.
    """
    if not 0 < length <= 0.28:
        raise ValueError(f"EMA length {length} is outside 0 to 0.28")
    precision = length**-2  # (gamma + 2)^2 (gamma + 3) / (gamma + 1)
    return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())


def combination(stored: Sequence[tuple[int, float]], target: tuple[int, float]) -> tuple[list[float], float]:
    """How stored averages make up another one: least squares on their profiles.

    Args:
        stored: (step, length) of each stored average, steps from 1.
        target: (step, length) that is wanted; between two stored steps nothing fits well.

    Returns:
        The coefficient of each stored average; they add up to 1. And what is left of the wanted profile, as a share of
        its norm: 0 where it is met exactly.
    """
    steps = np.array([step for step, _ in [*stored, target]], np.float64)
    gammas = np.array([gamma_of(length) for _, length in [*stored, target]])
    products = _profile_products(steps, gammas)
    inner, wanted = products[:-1, :-1], products[:-1, -1]
    solved = np.linalg.lstsq(inner, np.stack([wanted, np.ones(len(wanted))], axis=1), rcond=1e-13)[0]
    plain, unit = solved.T
    found = plain + unit * (1 - plain.sum()) / unit.sum()  # the Lagrange multiplier of "adds up to 1"
    left = products[-1, -1] - 2 * found @ wanted + found @ inner @ found
    return found.tolist(), math.sqrt(max(0.0, left) / products[-1, -1])


def _profile_products(steps: np.ndarray, gammas: np.ndarray) -> np.ndarray:
    """Integrals of the products of all pairs of profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]."""
    t, u, g, h = steps[:, None], steps[None], gammas[:, None], gammas[None]
    ratio = np.where(t < u, (t / u) ** h, (u / t) ** g)
    return (g + 1) * (h + 1) * ratio / ((g + h + 1) * np.maximum(t, u))


def floating_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of floating type, in a fixed order."""
    return [tensor for tensor in [*module.parameters(), *module.buffers()] if tensor.is_floating_point()]
