"""Power-function averages: known profiles, and lengths that are made afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ldm_vae.diffusion.posthoc_ema import solve_posthoc_coefficients
from ldm_vae.diffusion.power_function_ema import PowerFunctionEma, power_function_beta, std_to_exp


def walk(steps: int) -> torch.Tensor:
    """A weight that goes somewhere and trembles, (steps,)."""
    rng = torch.Generator().manual_seed(0)
    return torch.linspace(0, 3, steps).sqrt() + 0.3 * torch.randn(steps, generator=rng)


def averages(lengths: list[float], steps: int = 400, every: int = 20) -> dict[tuple[int, float], float]:
    """(finished steps, length) -> the average along `walk`, stored every `every` steps."""
    module = nn.Linear(1, 1, bias=False).double()
    emas = [PowerFunctionEma(module, length) for length in lengths]
    found = {}
    for step, value in enumerate(walk(steps)):
        nn.init.constant_(module.weight, float(value))
        for ema in emas:
            ema.update(step)
            if (step + 1) % every == 0:
                found[step + 1, ema.sigma_rel] = float(ema.tensors["weight"])
    return found


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.25])
def test_the_length_is_the_standard_deviation_of_the_profile(length):
    gamma = std_to_exp(length)
    tau = (np.arange(200_000) + 0.5) / 200_000
    weight = tau**gamma / (tau**gamma).sum()
    assert np.sqrt(weight @ (tau - weight @ tau) ** 2) == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("length", [0.0, 0.29, -0.1])
def test_lengths_that_no_profile_has_are_refused(length):
    with pytest.raises(ValueError, match="outside 0 to"):
        std_to_exp(length)


def test_the_average_is_the_weighted_mean_of_all_steps():
    steps, length = 60, 0.1
    gamma = std_to_exp(length)
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)  # the integral of the profile
    expected = np.diff(edges) @ walk(steps).double().numpy()
    assert averages([length], steps)[steps, length] == pytest.approx(expected, rel=1e-12)


def test_the_first_step_is_a_copy():
    assert power_function_beta(0, std_to_exp(0.05)) == 0
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ema = PowerFunctionEma(module, 0.05)
    ema.update(0)
    assert torch.equal(ema.tensors["weight"], module.weight)
    assert ema.tensors["weight"].data_ptr() != module.weight.data_ptr()
    assert ema.tensors["weight"].stride() == module.weight.stride()


def test_a_loaded_average_continues_exactly():
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    unbroken, broken = PowerFunctionEma(module, 0.1), PowerFunctionEma(module, 0.1)
    for step in range(6):
        nn.init.normal_(module.weight)
        unbroken.update(step)
        broken.update(step)
        if step == 2:
            saved = {name: tensor.clone().contiguous() for name, tensor in broken.tensors.items()}
            broken = PowerFunctionEma(module, 0.1)
            broken.load(saved)
    assert all(torch.equal(broken.tensors[name], unbroken.tensors[name]) for name in unbroken.tensors)


@pytest.mark.parametrize(("length", "step"), [(0.03, 400), (0.07, 400), (0.07, 240), (0.15, 400), (0.05, 80)])
def test_another_length_is_made_from_two(length, step):
    """Against an average of that length that ran along: stored every 5 % of the run, at lengths 0.05 and 0.1."""
    stored = averages([0.05, 0.1])
    coefficients, left = solve_posthoc_coefficients(list(stored), (step, length))
    assert sum(coefficients) == pytest.approx(1, abs=1e-9)
    assert left < (0.2 if length < 0.05 else 0.04)
    made = np.dot(coefficients, list(stored.values()))
    assert made == pytest.approx(averages([length], every=10)[step, length], abs=0.05 if length < 0.05 else 0.004)


def test_a_stored_average_is_found_again():
    stored = [(step, length) for step in range(20, 401, 20) for length in (0.05, 0.1)]
    coefficients, left = solve_posthoc_coefficients(stored, (400, 0.1))
    assert left < 1e-4
    assert coefficients[-1] == pytest.approx(1, abs=1e-3)


def test_a_length_far_from_the_stored_ones_says_what_is_missing():
    stored = [(step, length) for step in (200, 400) for length in (0.05, 0.1)]
    assert solve_posthoc_coefficients(stored, (400, 0.005))[1] > 0.5
    assert solve_posthoc_coefficients(stored, (300, 0.1))[1] > 0.5
