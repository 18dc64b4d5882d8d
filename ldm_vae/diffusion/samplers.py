"""Samplers: the guided velocity of a U-Net, and the solvers that take noise (t = 1) along it to data (t = 0).

    U-Net -> GuidedVelocity -> Solver.step, once for each interval of Solver.times -> clean latents

A velocity field is `velocity(x_t, t) -> dx/dt` with a scalar tensor t. `SAMPLERS` lists all samplers. To add one, add a
row there; it needs a solver class unless a multistep scheduler of diffusers takes its steps.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from ldm_vae.utils.numbers import plain_number

Velocity = Callable[[Tensor, Tensor], Tensor]


# Solvers: steps of any velocity field, without a network.


class Solver(Protocol):
    """Moves latents from `times[i]` to `times[i + 1]`, step by step in order; it may keep earlier estimates."""

    @property
    def times(self) -> Sequence[float]:
        """Times from about 1 down to 0, one more than the number of steps."""

    def step(self, velocity: Velocity, noisy: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """(latents at the next time, estimate of the clean latents at this one), each of the shape of `noisy`."""


@dataclass(frozen=True)
class Euler:
    """x + (s - t) v(x, t): first order, one evaluation per step."""

    times: Sequence[float]

    def step(self, velocity: Velocity, noisy: Tensor, index: int) -> tuple[Tensor, Tensor]:
        time, following = self.times[index], self.times[index + 1]
        slope = velocity(noisy, _scalar(time))
        return noisy + (following - time) * slope, noisy - time * slope


@dataclass(frozen=True)
class Heun:
    """Euler, corrected with the mean of the slopes at both ends: second order, two evaluations per step.

    This includes the last step: in a flow the slope at t = 0 is finite, and with times shifted toward noise the last
    step is the longest. An Euler step there makes the solution of a Gaussian 4 to 6 times worse (shift 2).
    """

    times: Sequence[float]

    def step(self, velocity: Velocity, noisy: Tensor, index: int) -> tuple[Tensor, Tensor]:
        time, following = self.times[index], self.times[index + 1]
        slope = velocity(noisy, _scalar(time))
        ahead = noisy + (following - time) * slope
        mean_slope = (slope + velocity(ahead, _scalar(following))) / 2
        return noisy + (following - time) * mean_slope, noisy - time * slope


class Multistep:
    """Steps of a diffusers scheduler that keeps its last estimates: one evaluation per step, second order or above."""

    def __init__(self, scheduler: Any, steps: int, first: int) -> None:
        self._scheduler = scheduler
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(first)  # otherwise it would search for a time, and rounded times can occur twice
        self._following: Tensor | None = None

    @property
    def times(self) -> Sequence[float]:
        # `timesteps` are rounded to thousandths; the formulas use the sigmas
        return self._scheduler.sigmas.tolist()

    def step(self, velocity: Velocity, noisy: Tensor, index: int) -> tuple[Tensor, Tensor]:
        time = self._scheduler.sigmas[index]
        slope = velocity(noisy, time)
        if self._following is not None and not torch.equal(noisy, self._following):
            self._rewrite_memory(noisy, slope, index, noisy != self._following)
        (self._following,) = self._scheduler.step(slope, self._scheduler.timesteps[index], noisy, return_dict=False)
        return self._following, noisy - time.to(noisy) * slope

    def _rewrite_memory(self, noisy: Tensor, slope: Tensor, index: int, replaced: Tensor) -> None:
        """Update the history for elements that were replaced after the last step, as if they had moved on a straight
        line.

        Otherwise the scheduler would continue from their earlier values. UniPC's corrector even starts from the latents
        of the previous step, so only the effect of a replacement on the velocity would remain. Other elements are
        unchanged.
        """
        scheduler = self._scheduler
        estimate = scheduler.convert_model_output(slope, sample=noisy)
        scheduler.model_outputs = [
            None if earlier is None else torch.where(replaced, estimate, earlier) for earlier in scheduler.model_outputs
        ]
        if getattr(scheduler, "last_sample", None) is not None:
            before = noisy + (scheduler.sigmas[index - 1] - scheduler.sigmas[index]) * slope
            scheduler.last_sample = torch.where(replaced, before, scheduler.last_sample)


def flow_times(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """steps + 1 times from 1 down to 0, evenly spaced before the shift (`flow.shift_times`)."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return tuple(flow.shift_times(even, shift).tolist())


def first_step(steps: int, strength: float) -> int:
    """The first step for an image: `strength` is the share of the steps that are applied to it, at least one step.

    Raises:
        UserError: a strength outside (0, 1].
    """
    strength = plain_number(strength, "strength")
    if not 0 < strength <= 1:
        raise UserError(
            f"strength: {strength} is not a share above 0; give at most 1, which keeps nothing of the image"
        )
    return steps - max(1, round(steps * strength))


def solve(velocity: Velocity, noise: Tensor, solver: Solver) -> Tensor:
    """All steps of a solver, from noise to data, in the shape of `noise`."""
    for index in range(len(solver.times) - 1):
        noise, _ = solver.step(velocity, noise, index)
    return noise


def _scalar(time: float) -> Tensor:
    """A time as a number, not rounded, since it is compared with the bounds of intervals."""
    return torch.tensor(time, dtype=torch.float64)


# The velocity for sampling: that of the U-Net for classes or mixtures of classes, with guidance.

FULL_INTERVAL = (0.0, 1.0)


@dataclass(frozen=True)
class Guidance:
    """Strength and times of guidance.

    Attributes:
        scale: Scale of classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598); 1 is off.
        autoguidance: Scale of autoguidance by a worse network (Karras et al. 2024, arXiv:2406.02507); 1 is off.
        interval: Lowest and highest t with guidance (Kynkäänniemi et al. 2024, arXiv:2404.07724).
        rescale: 0 to 1, how much of the standard deviation of unguided clean latents is restored. Strong guidance
            raises it and oversaturates (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    """

    scale: float = 1.0
    autoguidance: float = 1.0
    interval: tuple[float, float] = FULL_INTERVAL
    rescale: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.interval
        for name, value in (("guidance_scale", self.scale), ("autoguidance_scale", self.autoguidance)):
            if not math.isfinite(value):
                raise UserError(f"{name}: {value} is not a finite number; 1 means no guidance, 2 to 5 is usual")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale: {self.rescale} is not between 0 and 1")
        if not 0 <= low < high <= 1:
            raise UserError(
                f"guidance_interval: {low} to {high} is not a part of 0 to 1; give the lower time first, as (0.1, 0.8)"
            )


@dataclass(frozen=True)
class ClassWeights:
    """The classes of n images: ids (n, k) and the weight of each (n, k); the weights of an image add up to 1."""

    ids: Tensor
    weights: Tensor

    def __getitem__(self, rows: slice) -> ClassWeights:
        """Some of the images, without columns that only others use."""
        used = (self.weights[rows] > 0).any(0)
        return ClassWeights(self.ids[rows][:, used], self.weights[rows][:, used])


@dataclass(frozen=True)
class GuidedVelocity:
    """v (n, c, h, w), float32, at x_t (n, c, h, w) and a scalar t.

    Attributes:
        unet: A `LatentUNet`, or a module of the same interface.
        weak_unet: The worse network of autoguidance; None without autoguidance.
        classes: Classes of the n images; None for any class.
        guidance: Strength and times.
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
        """Standard deviation per image, over all of its elements, as in the paper."""
        if not self.guidance.rescale:
            return velocity
        t = float(time)
        clean, unguided = noisy - t * velocity, noisy - t * plain
        std, unguided_std = (x.flatten(1).std(1).view(-1, 1, 1, 1) for x in (clean, unguided))
        factor = 1 + self.guidance.rescale * (unguided_std / std.clamp(min=1e-6) - 1)
        return velocity + (1 - factor) * clean / max(t, SMALLEST_DIVISOR)

    def _velocities(
        self, unet: Any, noisy: Tensor, time: Tensor, with_null: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The velocity with the labels and, if `with_null`, without them; one pass of the network for both."""
        if self.classes is None:
            return unet(noisy, time, None), None
        columns = list(self.classes.ids.unbind(1))
        if with_null:
            columns.append(torch.full_like(columns[0], int(unet.config["num_classes"])))
        passes = unet(torch.cat([noisy] * len(columns)), time, torch.cat(columns).to(noisy.device)).chunk(len(columns))
        null = passes[-1] if with_null else None
        weights = self.classes.weights.to(noisy)
        if weights.shape[1] == 1:
            return passes[0], null
        return sum(weight.view(-1, 1, 1, 1) * v for weight, v in zip(weights.unbind(1), passes)), null  # type: ignore[return-value]


# The table of samplers. A saved pipeline names a scheduler of diffusers, and each belongs to one sampler.

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DETERMINISTIC = ("dpmsolver++", "bh1", "bh2")
"""Algorithms of multistep schedulers without random noise that are finite at t = 1, where the signal is 0."""


@dataclass(frozen=True)
class Sampler:
    """One row of `SAMPLERS`.

    Attributes:
        scheduler: The class of diffusers that a saved pipeline names.
        solver: Class to make from the times; None: the scheduler takes its own steps (`Multistep`).
        evaluations: Evaluations of the velocity per step.
        shift: Key of the time shift in the scheduler's config.
        settings: Settings of the scheduler's config that a flow needs.
        algorithm: Key of the scheduler's config whose value must be in `DETERMINISTIC`.
        choices: Further keys of the scheduler's config that are used; all others must be at their default.
    """

    scheduler: Any
    solver: Callable[[Sequence[float]], Solver] | None = None
    evaluations: int = 1
    shift: str = "shift"
    settings: Mapping[str, Any] = field(default_factory=dict)
    algorithm: str | None = None
    choices: tuple[str, ...] = ()


SAMPLERS = {
    "euler": Sampler(FlowMatchEulerDiscreteScheduler, Euler),
    "heun": Sampler(FlowMatchHeunDiscreteScheduler, Heun, evaluations=2),
    "dpm++": Sampler(
        DPMSolverMultistepScheduler, shift="flow_shift", settings=FLOW, algorithm="algorithm_type",
        choices=("solver_order", "solver_type", "lower_order_final", "euler_at_final"),
    ),
    "unipc": Sampler(
        UniPCMultistepScheduler, shift="flow_shift", settings=FLOW, algorithm="solver_type",
        choices=("solver_order", "lower_order_final", "disable_corrector"),
    ),
}  # fmt: skip
SWITCHES = {
    "use_dynamic_shifting": ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"),
    "thresholding": ("dynamic_thresholding_ratio", "sample_max_value"),
}
"""Setting -> settings that diffusers uses only if the first is on."""


def flow_scheduler(shift: float, sampler: str = "euler") -> Any:
    """A scheduler of diffusers for flow times with the shift of the training times (`flow.resolution_shift`).

    Raises:
        UserError: a sampler that is not in `SAMPLERS`.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler: {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    row = SAMPLERS[sampler]
    return row.scheduler(**{row.shift: shift}, **row.settings)


def sampler_name(scheduler: Any) -> str:
    """The name in `SAMPLERS` of a scheduler.

    Raises:
        UserError: it would not sample a flow, or is not deterministic.
    """
    kind, settings = type(scheduler).__name__, scheduler.config
    name = next((name for name, row in SAMPLERS.items() if type(scheduler) is row.scheduler), None)
    if name is None:
        known = ", ".join(row.scheduler.__name__ for row in SAMPLERS.values())
        raise UserError(
            f"scheduler: {kind} does not sample a rectified flow here; take {known}, or sampler={'|'.join(SAMPLERS)}"
        )
    row = SAMPLERS[name]
    if any(settings[key] != value for key, value in row.settings.items()):
        needed = ", ".join(f"{key}={value!r}" for key, value in row.settings.items())
        raise UserError(f"scheduler: {kind} is not set to a flow; make it with {needed}")
    if row.algorithm is not None and settings[row.algorithm] not in DETERMINISTIC:
        raise UserError(
            f"scheduler: {kind} with {settings[row.algorithm]} draws noise or fails at t = 1; make it with dpmsolver++"
        )
    if settings.get("stochastic_sampling"):
        raise UserError(f"scheduler: {kind} with stochastic_sampling draws noise; make it without")
    if unused := unused_settings(scheduler, row):
        key, value = next(iter(unused.items()))
        used = ", ".join((row.shift, *row.choices))
        raise UserError(f"scheduler: {kind} with {key}={value!r}, which is not used here; make it without ({used} are)")
    return name


def unused_settings(scheduler: Any, row: Sampler) -> dict[str, Any]:
    """Settings of a scheduler that differ from the defaults and that its sampler would not use.

    A scheduler made `from_config` of another one also keeps the settings of that one.
    """
    used = {"shift", row.shift, row.algorithm, *row.settings, *row.choices}
    used |= {key for switch, keys in SWITCHES.items() if not scheduler.config.get(switch) for key in keys}
    defaults: dict[str, Any] = {}
    for kind in (*(other.scheduler for other in SAMPLERS.values()), row.scheduler):  # its own entry last
        defaults |= {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items()}
    return {
        key: value
        for key, value in scheduler.config.items()
        if key in defaults.keys() - used and value != defaults[key]
    }


def scheduler_shift(scheduler: Any) -> float:
    """The shift of its times. A scheduler made `from_config` of a flow scheduler keeps the `shift` of that one.

    Raises:
        UserError: as `sampler_name`.
    """
    sampler_name(scheduler)
    settings = scheduler.config
    return float(settings["shift"] if "shift" in settings else settings["flow_shift"])


def make_solver(scheduler: Any, steps: int, shift: float, first: int = 0) -> Solver:
    """A new solver, without memory of other images.

    Args:
        scheduler: One that `sampler_name` accepts; it is not changed.
        steps: Number of steps from noise to data.
        shift: Shift of the times, instead of the scheduler's own.
        first: Number of the first step to take.
    """
    row = SAMPLERS[sampler_name(scheduler)]
    if row.solver is not None:
        return row.solver(flow_times(steps, shift))
    own = copy.deepcopy(scheduler)
    own.register_to_config(**{row.shift: shift})
    return Multistep(own, steps, first)


def evaluations(sampler: str, steps: int, first: int = 0) -> int:
    """Number of evaluations of the velocity for an image that starts at step `first`."""
    return SAMPLERS[sampler].evaluations * (steps - first)
