"""Solving the flow: steps of a velocity field from noise (t = 1) to data (t = 0). Pure functions, no network, no files.

A velocity field is `velocity(x_t, t) -> dx/dt` with t a scalar tensor; `guidance.py` makes one of a U-Net. A solver
takes it through the times that it was made with; `schedulers.py` makes solvers of diffusers' schedulers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm_vae import runtime

runtime.repair_torchvision()

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ldm_vae.diffusion import flow
from ldm_vae.diffusion.flow import SMALLEST_DIVISOR
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


# The velocity that is sampled: the U-Net's, for classes or mixtures of them, pushed away from a worse one.

FULL_INTERVAL = (0.0, 1.0)


@dataclass(frozen=True)
class Guidance:
    """How strongly, and at which times.

    Attributes:
        scale: Of classifier-free guidance; 1 is none.
        autoguidance: Of autoguidance; 1 is none.
        interval: Lowest and highest t at which guidance acts (Kynkäänniemi et al. 2024, arXiv:2404.07724).
        rescale: 0 to 1, how far the clean latents that a guided velocity leads to get the spread of unguided ones back,
            which strong guidance raises: oversaturated images (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    """

    scale: float = 1.0
    autoguidance: float = 1.0
    interval: tuple[float, float] = FULL_INTERVAL
    rescale: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.interval
        for name, value in (("guidance_scale", self.scale), ("autoguidance_scale", self.autoguidance)):
            if not math.isfinite(value):
                raise UserError(f"{name}: {value} is no number; 1 is no guidance, 2 to 5 is usual")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale: {self.rescale} is no share; give 0 to 1")
        if not 0 <= low < high <= 1:
            raise UserError(
                f"guidance_interval: {low} to {high} is no part of 0 to 1; give the lower time first, as (0.1, 0.8)"
            )


@dataclass(frozen=True)
class ClassWeights:
    """Of n images: class ids (n, k), and the share of each (n, k), which add up to 1 for each image."""

    ids: Tensor
    shares: Tensor

    def __getitem__(self, rows: slice) -> ClassWeights:
        """Of some of the images, without columns that only others need: what is computed is theirs alone."""
        used = (self.shares[rows] > 0).any(0)
        return ClassWeights(self.ids[rows][:, used], self.shares[rows][:, used])


@dataclass(frozen=True)
class GuidedVelocity:
    """v (n, c, h, w), float32, at x_t (n, c, h, w) and a scalar t.

    Attributes:
        unet: A `LatentUNet`, or a module of the same interface.
        weak_unet: The worse network of autoguidance; None where that is not asked for.
        classes: Of the n images; None for any class.
        guidance: How strongly.
    """

    unet: Any
    weak_unet: Any
    classes: ClassWeights | None
    guidance: Guidance

    def __call__(self, noisy: Tensor, time: Tensor) -> Tensor:
        low, high = self.guidance.interval
        guided = low <= float(time) <= high
        by_label = guided and self.classes is not None and self.guidance.scale != 1
        plain, null = self._velocities(self.unet, noisy, time, with_null=by_label)
        velocity = plain
        if null is not None:
            velocity = null + self.guidance.scale * (plain - null)
        if guided and self.guidance.autoguidance != 1:
            weak, _ = self._velocities(self.weak_unet, noisy, time)
            velocity = velocity + (self.guidance.autoguidance - 1) * (plain - weak)
        return velocity if velocity is plain else self._rescaled(velocity, plain, noisy, time)

    def _rescaled(self, velocity: Tensor, plain: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Per image, over all of its elements, as in the paper."""
        if not self.guidance.rescale:
            return velocity
        t = float(time)
        clean, unguided = noisy - t * velocity, noisy - t * plain
        spread, wanted = (x.flatten(1).std(1).view(-1, 1, 1, 1) for x in (clean, unguided))
        factor = 1 + self.guidance.rescale * (wanted / spread.clamp(min=1e-6) - 1)
        return velocity + (1 - factor) * clean / max(t, SMALLEST_DIVISOR)

    def _velocities(
        self, unet: Any, noisy: Tensor, time: Tensor, with_null: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """With the labels and, if asked for, without them; one pass of the network for both."""
        if self.classes is None:
            return unet(noisy, time, None), None
        columns = list(self.classes.ids.unbind(1))
        if with_null:
            columns.append(torch.full_like(columns[0], int(unet.config["num_classes"])))
        passes = unet(torch.cat([noisy] * len(columns)), time, torch.cat(columns).to(noisy.device)).chunk(len(columns))
        null = passes[-1] if with_null else None
        shares = self.classes.shares.to(noisy)
        if shares.shape[1] == 1:
            return passes[0], null
        return sum(share.view(-1, 1, 1, 1) * v for share, v in zip(shares.unbind(1), passes)), null  # type: ignore[return-value]


# Which schedulers of diffusers sample a rectified flow here, and the solver that each one stands for.

SAMPLERS: dict[str, Any] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DETERMINISTIC = ("dpmsolver++", "bh1", "bh2")
"""Values of `algorithm_type` and `solver_type` that draw no noise and hold at t = 1, where no signal is left."""


def flow_scheduler(shift: float, sampler: str = "euler") -> Any:
    """A scheduler of diffusers for flow times with the shift of the training times (`flow.resolution_shift`).

    Raises:
        UserError: a sampler that is not one of `SAMPLERS`.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler: {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if sampler in ("euler", "heun"):
        return SAMPLERS[sampler](shift=shift)
    return SAMPLERS[sampler](flow_shift=shift, **FLOW)


def sampler_name(scheduler: Any) -> str:
    """The name in `SAMPLERS` of a scheduler.

    Raises:
        UserError: one that would not sample a flow, or not the same from the same noise.
    """
    name = next((name for name, kind in SAMPLERS.items() if type(scheduler) is kind), None)
    what = type(scheduler).__name__
    if name is None:
        raise UserError(
            f"scheduler: {what} does not sample a rectified flow here; "
            f"take {', '.join(kind.__name__ for kind in SAMPLERS.values())}, or sampler={'|'.join(SAMPLERS)}"
        )
    settings = scheduler.config
    if name in ("dpm++", "unipc"):
        if any(settings[key] != value for key, value in FLOW.items()):
            wanted = ", ".join(f"{key}={value!r}" for key, value in FLOW.items())
            raise UserError(f"scheduler: {what} is not set to a flow; make it with {wanted}")
        kind = settings["algorithm_type" if name == "dpm++" else "solver_type"]
        if kind not in DETERMINISTIC:
            raise UserError(f"scheduler: {what} with {kind} draws noise or fails at t = 1; make it with dpmsolver++")
    elif settings.get("stochastic_sampling"):
        raise UserError(f"scheduler: {what} with stochastic_sampling draws noise; make it without")
    return name


def scheduler_shift(scheduler: Any) -> float:
    """The shift of its times. A scheduler made `from_config` of a flow scheduler keeps the `shift` of that one."""
    settings = scheduler.config
    return float(settings["shift"] if "shift" in settings else settings["flow_shift"])


def make_solver(scheduler: Any, steps: int, shift: float, first: int = 0) -> Solver:
    """A new solver, without memory of other images.

    Args:
        scheduler: One that `sampler_of` accepts; it stays as it is.
        steps: From noise to data.
        shift: Of the times, instead of the scheduler's own.
        first: The step that is taken first.
    """
    name = sampler_name(scheduler)
    if name in ("euler", "heun"):
        return (Euler if name == "euler" else Heun)(flow_times(steps, shift))
    own = copy.deepcopy(scheduler)
    own.register_to_config(flow_shift=shift)
    return Multistep(own, steps, first)


class Multistep:
    """A solver of diffusers that keeps the last estimates: one evaluation a step, second order or above."""

    def __init__(self, scheduler: Any, steps: int, first: int) -> None:
        self._scheduler = scheduler
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(first)  # or it would look for a time, which may be there twice in whole thousandths

    @property
    def times(self) -> Sequence[float]:
        # its `timesteps` are whole thousandths; a solver's times are what its formulas take
        return self._scheduler.sigmas.tolist()

    def step(self, velocity: Velocity, noisy: Tensor, index: int) -> tuple[Tensor, Tensor]:
        time = self._scheduler.sigmas[index]
        slope = velocity(noisy, time)
        following = self._scheduler.step(slope, self._scheduler.timesteps[index], noisy, return_dict=False)[0]
        return following, noisy - time.to(noisy) * slope


def evaluations(sampler: str, steps: int, first: int = 0) -> int:
    """How often the velocity is computed for an image that enters at step `first`."""
    return (2 if sampler == "heun" else 1) * (steps - first)
