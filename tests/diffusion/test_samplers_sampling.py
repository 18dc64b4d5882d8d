"""Solvers against flows that are known: a Gaussian in closed form, two moons by the distance of samples; their order
and their cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_vae.diffusion.samplers import SAMPLERS, evaluations, first_step, flow_scheduler, flow_times, make_solver, solve
from ldm_vae.errors import UserError
from ldm_vae.random import generator
from tests.diffusion.fields import Gaussian, Moons, maximum_mean_discrepancy

GAUSSIAN = Gaussian(torch.tensor([0.5, -1.0]).view(2, 1, 1), torch.tensor([0.3, 1.2]).view(2, 1, 1))


def noise(count: int = 16) -> Tensor:
    return torch.randn(count, 2, 4, 4, generator=generator(0, "noise"), dtype=torch.float64)


def error(sampler: str, steps: int, shift: float = 1.0) -> float:
    """Largest distance from the closed form."""
    solver = make_solver(flow_scheduler(shift, sampler), steps, shift)
    return (solve(GAUSSIAN.velocity, noise(), solver) - GAUSSIAN.solution(noise())).abs().max().item()


@pytest.mark.parametrize("shift", [0.7, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("sampler", "allowed"), [("euler", 0.07), ("heun", 0.002), ("dpm++", 0.02), ("unipc", 0.006)])
def test_a_gaussian_in_closed_form(sampler: str, allowed: float, shift: float) -> None:
    """Noise by noise, not only its mean and standard deviation."""
    assert error(sampler, 100, shift) < allowed


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_order(sampler: str, order: int) -> None:
    """Half the step, half the error or a quarter of it."""
    assert error(sampler, 40) / error(sampler, 80) == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("sampler", ["heun", "dpm++", "unipc"])
def test_the_others_need_fewer_evaluations_than_euler(sampler: str) -> None:
    steps = {"heun": 10}.get(sampler, 20)
    assert evaluations(sampler, steps) <= 20
    assert error(sampler, steps, 2.0) < 0.5 * error("euler", 20, 2.0)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evaluations_are_counted(sampler: str, first: int) -> None:
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return GAUSSIAN.velocity(x, t)

    solver = make_solver(flow_scheduler(2.0, sampler), 8, 2.0, first)
    x = noise()
    for index in range(first, 8):
        x, _ = solver.step(velocity, x, index)
    assert len(times) == evaluations(sampler, 8, first)
    assert times[0] == pytest.approx(solver.times[first])
    assert all(0 <= time <= 1 for time in times)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_estimate_of_the_clean_latent(sampler: str) -> None:
    """At every step the conditional mean of a Gaussian: x_t - t v."""
    solver = make_solver(flow_scheduler(1.0, sampler), 4, 1.0)
    x = noise()
    for index in range(4):
        t = solver.times[index]
        ahead, clean = solver.step(GAUSSIAN.velocity, x, index)
        gain = (1 - t) * GAUSSIAN.std**2 / ((1 - t) ** 2 * GAUSSIAN.std**2 + t**2)
        torch.testing.assert_close(clean, GAUSSIAN.mean + gain * (x - (1 - t) * GAUSSIAN.mean), atol=1e-5, rtol=0)
        x = ahead


@pytest.mark.parametrize(("steps", "first", "shift", "allowed"), [(200, 120, 2.0, 0.06), (900, 101, 8.0, 0.03)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_that_enters_later(sampler: str, steps: int, first: int, shift: float, allowed: float) -> None:
    """From x_t at a step in the middle, the flow leads where the closed form leads from there.

    With many steps several have the same time in whole thousandths, by which diffusers would look for the first one.
    """
    solver = make_solver(flow_scheduler(shift, sampler), steps, shift, first)
    x = noise(2)
    expected = GAUSSIAN.solution(x, solver.times[first])
    for index in range(first, steps):
        x, _ = solver.step(GAUSSIAN.velocity, x, index)
    torch.testing.assert_close(x, expected, atol=allowed, rtol=0)


@pytest.mark.parametrize("place", [1, 7, 18])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_that_are_replaced_on_the_way_are_used_fully(sampler: str, place: int) -> None:
    """As a callback or a mask replaces them: one channel is exchanged for a point on another trajectory, whose end is
    known. It ends there as exactly as a solver that begins at this point; the other channel does not notice.

    diffusers' schedulers by themselves end farther from there: UniPC 4.1 after step 1 and 4.0 after step 7 of 20, since
    its corrector starts from the latents of the step before, and DPM-Solver++ 1.7 after step 18. Here it is 0.02 to
    0.035.
    """

    def run(first: int, x: Tensor, replacement: Tensor | None = None) -> Tensor:
        solver = make_solver(flow_scheduler(2.0, sampler), 20, 2.0, first)
        for index in range(first, 20):
            if index == place and replacement is not None:
                x = torch.cat([x[:, :1], replacement[:, 1:]], 1)
            x, _ = solver.step(GAUSSIAN.velocity, x, index)
        return x

    time = make_solver(flow_scheduler(2.0, sampler), 20, 2.0).times[place]
    other = GAUSSIAN.mean * (1 - time) + ((1 - time) ** 2 * GAUSSIAN.std**2 + time**2) ** 0.5 * noise().flip(0)
    kept, exchanged = run(0, noise(), other).split(1, dim=1)
    assert torch.equal(kept, run(0, noise())[:, :1])
    expected = GAUSSIAN.solution(other, time)[:, 1:]
    alone = (run(place, other)[:, 1:] - expected).abs().max()
    assert (exchanged - expected).abs().max() < 1.5 * alone + 1e-6


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 60), ("heun", 20), ("dpm++", 30), ("unipc", 30)])
def test_two_moons(sampler: str, steps: int) -> None:
    """Below twice the distance of two real sets of samples; a sampler that stops short is far above it."""
    moons, count = Moons(), 1000
    sets = [moons.samples(count, generator(seed, "moons")) for seed in range(9)]
    usual = max(abs(maximum_mean_discrepancy(sets[0], other)) for other in sets[1:])
    start = torch.randn(count, 2, generator=generator(0, "start"), dtype=torch.float64)
    distance, crude = (
        maximum_mean_discrepancy(sets[0], solve(moons.velocity, start, make_solver(flow_scheduler(1, sampler), n, 1)))
        for n in (steps, 2)
    )
    assert distance < 2 * usual
    assert crude > 5 * usual


def test_times() -> None:
    assert flow_times(4) == (1, 0.75, 0.5, 0.25, 0)
    assert flow_times(4, 3.0) == pytest.approx([3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25, 0)])


def test_strength_is_a_share_of_the_steps() -> None:
    assert [first_step(30, strength) for strength in (1.0, 0.6, 0.1, 0.001)] == [0, 12, 27, 29]
    for wrong in (0.0, -0.1, 1.01):
        with pytest.raises(UserError, match="strength"):
            first_step(30, wrong)
