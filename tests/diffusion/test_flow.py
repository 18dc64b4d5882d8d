"""Rectified flow: endpoints, derivatives, distributions and identities with known answers."""

import doctest
import math

import pytest
import torch

from ldm_vae.diffusion import flow
from ldm_vae.random import generator


def batch(count: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = generator(0, "batch")
    clean, noise = torch.randn(2, count, 4, 6, 6, generator=rng, dtype=torch.float64)
    return clean, noise, torch.linspace(0.02, 1.0, count, dtype=torch.float64)


def test_times_follow_their_distribution() -> None:
    times = flow.sample_times(200_000, generator(0, "times"))
    assert times.dtype == torch.float32
    assert times.min() > 0
    assert times.max() < 1
    for t in (0.01, 0.1, 0.3, 0.5, 0.9, 0.99):
        logit_normal = 0.5 * (1 + math.erf(math.log(t / (1 - t)) / math.sqrt(2)))
        assert (times < t).float().mean().item() == pytest.approx(0.9 * logit_normal + 0.1 * t, abs=0.004)


def test_shift_moves_the_median_and_is_undone_by_its_inverse() -> None:
    plain = flow.sample_times(50_001, generator(0, "times"))
    shifted = flow.sample_times(50_001, generator(0, "times"), shift=2.0)
    assert shifted.median().item() == pytest.approx(2 / 3, abs=0.01)
    torch.testing.assert_close(flow.shift_times(shifted, 0.5), plain)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(flow.shift_times(ends, 3.7), ends)


def test_resolution_shift() -> None:
    assert flow.resolution_shift(4, 64, 64) == 2.0
    assert flow.resolution_shift(16, 64, 64) == 4.0


def test_velocity_is_the_derivative_of_the_interpolation() -> None:
    clean, noise, times = batch()
    h = 1e-6
    slope = (flow.interpolate(clean, noise, times) - flow.interpolate(clean, noise, times - h)) / h
    torch.testing.assert_close(slope, flow.velocity_target(clean, noise), atol=1e-7, rtol=1e-7)
    assert torch.equal(flow.interpolate(clean, noise, torch.zeros(5)), clean)
    assert torch.equal(flow.interpolate(clean, noise, torch.ones(5)), noise)


def test_clean_latent_from_the_true_velocity() -> None:
    clean, noise, times = batch()
    noisy = flow.interpolate(clean, noise, times)
    torch.testing.assert_close(flow.clean_from_velocity(noisy, noise - clean, times), clean)


def test_clean_head_is_edm_preconditioning() -> None:
    """With x0 = c_skip x_t + c_out output written out separately, the head's velocity is (x_t - x0) / t."""
    clean, noise, times = batch()
    variance = torch.tensor([1e-3, 0.1, 1.0, 20.0], dtype=torch.float64)
    noisy = flow.interpolate(clean, noise, times)
    t, a = times.view(-1, 1, 1, 1), variance.view(1, -1, 1, 1)
    keep = (1 - t).clamp(min=1e-12)
    sigma = t / keep  # the noise level of x_t / (1 - t) = x0 + sigma eps
    skip = a / (a + sigma**2) / keep
    out = sigma * (a / (a + sigma**2)).sqrt()
    velocity = flow.velocity_from_clean_head(noisy, (clean - skip * noisy) / out, times, variance)
    torch.testing.assert_close(velocity, noise - clean, atol=1e-8, rtol=1e-6)


def test_clean_head_without_a_network_is_the_best_linear_denoiser() -> None:
    """For Gaussian latents the optimal velocity is linear, so a zero output leaves only its irreducible error."""
    variance = torch.tensor([0.01, 4.0])
    rng = generator(0, "gaussian")
    clean, noise = torch.randn(2, 1, 2, 300, 300, generator=rng)
    clean = clean * variance.sqrt().view(1, 2, 1, 1)
    for t in (0.1, 0.5, 0.9):
        times = torch.tensor([t])
        noisy = flow.interpolate(clean, noise, times)
        velocity = flow.velocity_from_clean_head(noisy, torch.zeros_like(noisy), times, variance)
        error = (velocity - (noise - clean)).square().mean((0, 2, 3))
        torch.testing.assert_close(error, variance / ((1 - t) ** 2 * variance + t**2), rtol=0.03, atol=0)


@pytest.mark.parametrize("t", [0.002, 0.01, 0.03, 0.05])
def test_the_best_clean_prediction_is_the_posterior_mean_at_every_time(t: float) -> None:
    """Gaussian latents of variance a: E[x0 | x_t] = (1 - t) a / ((1 - t)^2 a + t^2) x_t. The prediction and the target
    are clipped alike (arXiv:2511.13720); with a target that is not, the best factor at t = 0.03 is 0.21, not 0.53."""
    a, rng = 1e-3, generator(0, "gaussian")
    clean, noise = torch.randn(2, 20, 1, 100, 100, generator=rng, dtype=torch.float64)
    clean, times = clean * math.sqrt(a), torch.full((20,), t, dtype=torch.float64)
    noisy, target = flow.interpolate(clean, noise, times), flow.clipped_velocity_target(clean, noise, times)
    at_zero = flow.velocity_from_clean(noisy, torch.zeros_like(noisy), times)
    slope = flow.velocity_from_clean(noisy, noisy, times) - at_zero
    best = float(((target - at_zero) * slope).sum() / slope.square().sum())
    assert best == pytest.approx((1 - t) * a / ((1 - t) ** 2 * a + t**2), rel=0.02)
    perfect = flow.velocity_from_clean(noisy, clean, times)
    torch.testing.assert_close(perfect, target)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 1.0])
def test_predicting_the_clean_latent_or_the_velocity_has_the_same_optimum(t: float) -> None:
    """Gaussian latents: the linear predictor that minimises the velocity loss, fitted in each of the three ways, and
    the velocity known in closed form, E[eps - x0 | x_t] = (t - (1 - t) a) / ((1 - t)^2 a + t^2) x_t."""
    a = 0.3
    rng = generator(0, "gaussian")
    clean, noise = torch.randn(2, 20, 1, 100, 100, generator=rng, dtype=torch.float64)
    clean, times = clean * math.sqrt(a), torch.full((20,), t, dtype=torch.float64)
    noisy, variance = flow.interpolate(clean, noise, times), torch.tensor([a])
    target = flow.velocity_target(clean, noise)
    ways = {
        "velocity": lambda output: output,
        "clean": lambda output: flow.velocity_from_clean(noisy, output, times),
        "x": lambda output: flow.velocity_from_clean_head(noisy, output, times, variance),
    }
    for name, velocity in ways.items():  # each is affine in the factor k of the network k x_t
        at_zero = velocity(torch.zeros_like(noisy))
        slope = velocity(noisy) - at_zero
        k = ((target - at_zero) * slope).sum() / slope.square().sum()
        found = velocity(k * noisy)
        expected = (t - (1 - t) * a) / ((1 - t) ** 2 * a + t**2) * noisy
        assert (found - expected).square().mean().sqrt() < 0.02, name


def test_the_velocity_of_a_clean_latent_is_exact_and_bounded_below_its_divisor() -> None:
    clean, noise, times = batch()
    times = times.clamp(min=0.05)
    noisy = flow.interpolate(clean, noise, times)
    torch.testing.assert_close(flow.velocity_from_clean(noisy, clean, times), noise - clean)
    at_zero = flow.velocity_from_clean(noise, clean, torch.zeros(5))
    torch.testing.assert_close(at_zero, (noise - clean) / 0.05)


def test_clean_head_is_bounded_at_both_ends() -> None:
    clean, noise, _ = batch()
    variance = torch.tensor([1e-3, 0.1, 1.0, 20.0])
    at_zero = flow.velocity_from_clean_head(clean, noise, torch.zeros(5), variance)
    torch.testing.assert_close(at_zero, -clean - noise)
    at_one = flow.velocity_from_clean_head(noise, clean, torch.ones(5), variance)
    torch.testing.assert_close(at_one, noise - clean * variance.view(1, -1, 1, 1).sqrt().double())


def test_loss_is_a_mean_per_sample_in_float32() -> None:
    predicted = torch.zeros(3, 4, 8, 8, dtype=torch.bfloat16)
    target = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 4, 8, 8)
    loss = flow.velocity_loss(predicted, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [1.0, 4.0, 9.0]


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(flow).failed == 0
