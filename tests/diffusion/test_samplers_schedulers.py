"""Which schedulers are taken, which are refused, and that their shift is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
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
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True, which is not used"),
        (FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), "use_karras_sigmas=True, which is not used here"),
        (FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True), "use_exponential_sigmas=True"),
        (FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True), "use_beta_sigmas=True"),
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), "shift_terminal=0.1"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), r"num_train_timesteps=500.* \(shift are\)"),
        (FlowMatchHeunDiscreteScheduler(num_train_timesteps=500), "num_train_timesteps=500"),
        (DPMSolverMultistepScheduler(use_karras_sigmas=True, **FLOW), "use_karras_sigmas=True"),
        (DPMSolverMultistepScheduler(use_lu_lambdas=True, **FLOW), "use_lu_lambdas=True"),
        (DPMSolverMultistepScheduler(use_beta_sigmas=True, **FLOW), "use_beta_sigmas=True"),
        (DPMSolverMultistepScheduler(use_dynamic_shifting=True, **FLOW), "use_dynamic_shifting=True"),
        (DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", **FLOW), "final_sigmas_type='sigma_min'"),
        (DPMSolverMultistepScheduler(thresholding=True, **FLOW), "thresholding=True"),
        (DPMSolverMultistepScheduler(beta_start=0.00085, **FLOW), "beta_start=0.00085"),
        (UniPCMultistepScheduler(timestep_spacing="trailing", **FLOW), "timestep_spacing='trailing'"),
        (UniPCMultistepScheduler(predict_x0=False, **FLOW), "predict_x0=False"),
        (UniPCMultistepScheduler(sigma_max=0.9, **FLOW), "sigma_max=0.9"),
        (
            DPMSolverMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift_terminal=0.1).config, **FLOW),
            "shift_terminal=0.1",
        ),
    ],
)
def test_others_are_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler_name(scheduler)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0, base_shift=0.7, max_shift=2.0),  # without dynamic shifting
        FlowMatchHeunDiscreteScheduler(shift=2.0),
        DPMSolverMultistepScheduler(solver_order=3, solver_type="heun", euler_at_final=True, **FLOW),
        DPMSolverMultistepScheduler(lower_order_final=False, sample_max_value=2.0, **FLOW),
        UniPCMultistepScheduler(solver_order=3, solver_type="bh1", disable_corrector=[0], **FLOW),
        UniPCMultistepScheduler.from_config(
            DPMSolverMultistepScheduler(solver_order=3, **FLOW).config, solver_type="bh2"
        ),
    ],
)
def test_settings_that_are_used_are_taken(scheduler: Any) -> None:
    assert sampler_name(scheduler) in SAMPLERS
    assert scheduler_shift(scheduler) > 0


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=1.0, max_shift=2.0),
        DPMSolverMultistepScheduler(flow_shift=3.0, solver_order=3, **FLOW),
        DPMSolverMultistepScheduler(flow_shift=0.5, solver_type="heun", **FLOW),
        UniPCMultistepScheduler(flow_shift=3.0, solver_type="bh1", **FLOW),
    ],
)
def test_what_is_accepted_has_the_times_of_diffusers(scheduler: Any) -> None:
    """Of FlowMatchEuler with the even sigmas that the pipelines of diffusers hand it."""
    solver = make_solver(scheduler, 6, scheduler_shift(scheduler))
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    else:
        scheduler.set_timesteps(6)
    np.testing.assert_allclose(solver.times, scheduler.sigmas.numpy(), rtol=0, atol=1e-6)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"'ddim' is unknown; choose one of euler, heun, dpm\+\+, unipc"):
        flow_scheduler(1.0, "ddim")
