"""Solving the flow: steps of a velocity field from noise (t = 1) to data (t = 0). Pure functions, no network, no files.

A velocity field is `velocity(x_t, t) -> dx/dt` with t a scalar tensor; `guidance.py` makes one of a U-Net. A solver
takes it through the times that it was made with; `schedulers.py` makes solvers of diffusers' schedulers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm_vae.diffusion import flow
from ldm_vae.errors import UserError

Velocity = Callable[[Tensor, Tensor], Tensor]


class Solver(Protocol):
    """Takes latents from `times[i]` to `times[i + 1]`; steps are taken in order, and it may remember the last ones."""

    @property
    def times(self) -> Sequence[float]:
        """From about 1 down to 0, one more than there are steps."""

    def step(self, velocity: Velocity, noisy: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """(latents at the next time, estimate of the clean latents at this one), each of the shape of `noisy`."""


def flow_times(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """steps + 1 times from 1 down to 0, evenly spaced before the shift (`flow.shift_times`)."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return tuple(flow.shift_times(even, shift).tolist())


def exact(time: float) -> Tensor:
    """A time as a scalar tensor that is not rounded: it is compared with the bounds of intervals."""
    return torch.tensor(time, dtype=torch.float64)


@dataclass(frozen=True)
class Euler:
    """x + (s - t) v(x, t): first order, one evaluation a step."""

    times: Sequence[float]

    def step(self, velocity: Velocity, noisy: Tensor, index: int) -> tuple[Tensor, Tensor]:
        time, following = self.times[index], self.times[index + 1]
        slope = velocity(noisy, exact(time))
        return noisy + (following - time) * slope, noisy - time * slope


@dataclass(frozen=True)
class Heun:
    """Euler, then again with the mean of the slopes at both ends: second order, two evaluations a step.

    The last step too: in a flow the slope at t = 0 is finite, and with times that are shifted towards noise the last
    step is the longest. Leaving it to Euler makes the solution of a Gaussian 4 to 6 times worse (shift 2).
    """

    times: Sequence[float]

    def step(self, velocity: Velocity, noisy: Tensor, index: int) -> tuple[Tensor, Tensor]:
        time, following = self.times[index], self.times[index + 1]
        slope = velocity(noisy, exact(time))
        ahead = noisy + (following - time) * slope
        mean_slope = (slope + velocity(ahead, exact(following))) / 2
        return noisy + (following - time) * mean_slope, noisy - time * slope


def solve(velocity: Velocity, noise: Tensor, solver: Solver) -> Tensor:
    """All steps of a solver, from noise to data, in the shape of `noise`."""
    for index in range(len(solver.times) - 1):
        noise, _ = solver.step(velocity, noise, index)
    return noise


def first_step(steps: int, strength: float) -> int:
    """The step at which an image enters: `strength` is the share of the steps that it goes through, at least one.

    Raises:
        UserError: a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength: {strength} is no share above 0; give up to 1, which keeps nothing of the image")
    return steps - max(1, round(steps * strength))
