"""Rectified flow: endpoints, derivatives, distributions and identities with known answers."""

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
    noisy = flow.interpolate(clean, noise, times)
    t = times.view(-1, 1, 1, 1)
    s, sigma = flow.DETAIL_STD, t / (1 - t).clamp(min=1e-12)  # the noise level of x_t / (1 - t) = x0 + sigma eps
    skip = s**2 / (s**2 + sigma**2) / (1 - t).clamp(min=1e-12)
    out = sigma / (s**2 + sigma**2).sqrt()
    output = (clean - skip * noisy) / out
    torch.testing.assert_close(flow.velocity_from_clean_head(noisy, output, times), noise - clean, atol=1e-8, rtol=1e-6)
    at_noise = flow.velocity_from_clean_head(noise, clean, torch.ones(5))
    torch.testing.assert_close(at_noise, noise - clean)  # at t = 1 the output is the clean latent itself


def test_clean_head_stays_bounded_at_time_zero() -> None:
    clean, noise, _ = batch()
    velocity = flow.velocity_from_clean_head(clean, noise, torch.zeros(5))
    torch.testing.assert_close(velocity, -clean - noise / flow.DETAIL_STD)


def test_loss_is_a_mean_per_sample_in_float32() -> None:
    predicted = torch.zeros(3, 4, 8, 8, dtype=torch.bfloat16)
    target = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 4, 8, 8)
    loss = flow.velocity_loss(predicted, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [1.0, 4.0, 9.0]
