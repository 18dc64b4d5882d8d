"""Which schedulers are taken, which are refused, and that their shift is kept."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ldm_vae.diffusion.samplers import (
    FLOW,
    SAMPLERS,
    Multistep,
    flow_scheduler,
    make_solver,
    sampler_name,
    scheduler_shift,
)
from ldm_vae.errors import UserError


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_named(sampler: str) -> None:
    scheduler = flow_scheduler(2.5, sampler)
    assert sampler_name(scheduler) == sampler
    assert scheduler_shift(scheduler) == 2.5
    again = type(scheduler).from_config(dict(scheduler.config))  # as it is saved and loaded
    assert (sampler_name(again), scheduler_shift(again)) == (sampler, 2.5)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_exchanged_as_in_every_pipeline_it_keeps_the_shift(kind: Any) -> None:
    """`pipeline.scheduler = Kind.from_config(pipeline.scheduler.config, ...)` alone would leave flow_shift at 1."""
    scheduler = kind.from_config(flow_scheduler(2.5).config, **FLOW)
    assert scheduler.config["flow_shift"] == 1
    assert scheduler_shift(scheduler) == 2.5
    assert make_solver(scheduler, 4, scheduler_shift(scheduler)).times[2] == pytest.approx(2.5 / 3.5, abs=2e-3)


def test_the_scheduler_stays_as_it_is() -> None:
    scheduler = flow_scheduler(1.0, "dpm++")
    solver = make_solver(scheduler, 4, 3.0)
    assert isinstance(solver, Multistep)
    assert scheduler.config["flow_shift"] == 1
    assert scheduler.num_inference_steps is None


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "DDIMScheduler does not sample a rectified flow"),
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler does not"),
        (DPMSolverMultistepScheduler(), "is not set to a flow; make it with prediction_type='flow_prediction'"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=True"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW), "sde-dpmsolver"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling draws noise"),
    ],
)
def test_others_are_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler_name(scheduler)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"'ddim' is unknown; choose one of euler, heun, dpm\+\+, unipc"):
        flow_scheduler(1.0, "ddim")
