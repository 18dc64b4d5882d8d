"""Which schedulers of diffusers sample a rectified flow here, and the solver that each one stands for.

Euler and Heun run on this package's own times: diffusers' two flow schedulers shift their last times twice. The
multistep solvers run through diffusers, which gives them flow times with the same shift.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ldm_vae import compat
from ldm_vae.errors import UserError

compat.repair_torchvision()

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ldm_vae.diffusion.sampling import Euler, Heun, Solver, Velocity, flow_times

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


def sampler_of(scheduler: Any) -> str:
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


def shift_of(scheduler: Any) -> float:
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
    name = sampler_of(scheduler)
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
