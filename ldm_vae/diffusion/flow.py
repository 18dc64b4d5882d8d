"""The mathematics of rectified flow: times, interpolation, velocity, loss. Pure functions without a model.

Symbols, as in Liu et al. 2022 (arXiv:2209.03003) with time reversed: x0 a clean normalized latent, eps standard normal
noise, t in [0, 1] (0 clean, 1 noise), the path x_t = (1 - t) x0 + t eps, and its velocity v = dx_t/dt = eps - x0.

    clean, noise = latents, torch.randn_like(latents)                  # (n, c, h, w)
    times = sample_times(len(latents), generator, shift=resolution_shift(4, 64, 64))   # (n,)
    loss = velocity_loss(unet(interpolate(clean, noise, times), times), velocity_target(clean, noise)).mean()

>>> x0, eps, t = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 6.0), torch.tensor([0.25])
>>> x_t, v = interpolate(x0, eps, t), velocity_target(x0, eps)
>>> x_t.item(), v.item(), clean_from_velocity(x_t, v, t).item()
(3.0, 4.0, 2.0)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_vae.utils.numbers import whole_number

UNIFORM_SHARE = 0.1
"""Share of training times drawn uniformly, so that both ends of [0, 1] occur; the others are logit-normal."""

SMALLEST_DIVISOR = 0.05
"""Lower bound of t in the velocity of a predicted clean latent, which would diverge as t goes to 0."""


def resolution_shift(channels: int, height: int, width: int) -> float:
    """sqrt(c h w / 4096): the shift of times toward noise for larger latents (RAE, arXiv:2510.11690).

    >>> resolution_shift(4, 64, 64)
    2.0
    """
    sizes = {"channels": channels, "height": height, "width": width}
    return math.sqrt(math.prod(whole_number(size, name) for name, size in sizes.items()) / 4096)


def shift_times(times: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): monotone on [0, 1], both ends fixed (Esser et al. 2024, arXiv:2403.03206, eq. 23).

    >>> shift_times(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist()
    [0.0, 0.75, 1.0]
    """
    return shift * times / (1 + (shift - 1) * times)


def sample_times(
    count: int, generator: torch.Generator, shift: float = 1.0, device: str | torch.device = "cpu"
) -> Tensor:
    """Training times (count,) in (0, 1), float32: logit-normal(0, 1) (arXiv:2403.03206, section 3.1) with a uniform
    tenth, then shifted.

    Drawn on the generator's device, so that the same generator gives the same times on every device.
    """
    source = generator.device
    logit_normal = torch.sigmoid(torch.randn(count, generator=generator, device=source))
    uniform = torch.rand(count, generator=generator, device=source)
    choose_uniform = torch.rand(count, generator=generator, device=source) < UNIFORM_SHARE
    return shift_times(torch.where(choose_uniform, uniform, logit_normal), shift).to(device)


def as_column(times: Tensor, like: Tensor) -> Tensor:
    """Times (n,) shaped (n, 1, ...) to multiply a batch (n, ...), in its precision."""
    return times.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


def interpolate(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps of shape (n, c, h, w), from x0, eps and times (n,)."""
    t = as_column(times, clean)
    return (1 - t) * clean + t * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """v = eps - x0, the target of the network's velocity."""
    return noise - clean


def clean_from_velocity(noisy: Tensor, velocity: Tensor, times: Tensor) -> Tensor:
    """x0 = x_t - t v."""
    return noisy - as_column(times, noisy) * velocity


def velocity_from_clean(noisy: Tensor, clean: Tensor, times: Tensor) -> Tensor:
    """v = (x_t - x0) / max(t, 0.05) of a network that predicts the clean latent (Li and He 2025, arXiv:2511.13720).

    The loss is still that of the velocity, with the target `clipped_velocity_target`. Below t = 0.05 the velocity is
    too small by the factor t / 0.05.
    """
    return (noisy - clean) / as_column(times, noisy).clamp(min=SMALLEST_DIVISOR)


def clipped_velocity_target(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """(x_t - x0) / max(t, 0.05) = (eps - x0) min(1, t / 0.05): the target of a network that predicts the clean latent.

    Both sides of the loss are divided by the same number, as in Li and He 2025 (arXiv:2511.13720), so that the best
    prediction is E[x0 | x_t] at every t.
    """
    return velocity_target(clean, noise) * (as_column(times, clean) / SMALLEST_DIVISOR).clamp(max=1)


def velocity_from_clean_head(noisy: Tensor, output: Tensor, times: Tensor, variance: Tensor) -> Tensor:
    """v of a network that predicts the clean latent beyond its linear estimate, in coordinates of known variance.

    x0 = c_skip x_t + c_out output with EDM's coefficients (Karras et al. 2022, arXiv:2206.00364, table 1), in which
    each channel has its own data variance a: c_skip x_t = (1 - t) a / ((1 - t)^2 a + t^2) x_t is the best linear
    estimate of x0, and c_out is the standard deviation of its error. At t >> sqrt(a) the output is x0 / sqrt(a), so
    the network does not have to reproduce noise; at t << sqrt(a) it is the noise in x0. The velocity
    (x_t - x0) / t is bounded at every t.

    Args:
        noisy: x_t (n, c, h, w).
        output: Output of the network, (n, c, h, w); optimal outputs have unit size.
        times: t (n,).
        variance: a (c,), of the clean latents.
    """
    t = as_column(times, noisy)
    a = variance.to(noisy).view(1, -1, 1, 1)
    total = (1 - t).square() * a + t.square()
    return (t - (1 - t) * a) / total * noisy - (a / total).sqrt() * output


def velocity_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Loss per sample (n,), float32: the squared error of the velocity, mean over elements."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)
