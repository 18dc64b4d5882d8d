"""What a set of latents (or images) looks like as data: spectrum, tails, information, distance from a Gaussian.

Pure functions of tensors on the CPU; which latents, and what follows from the figures, belongs to `diagnosis.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_vae.random import generator

TAIL_POSITIONS = 0.001


def power_spectrum(images: Tensor) -> tuple[Tensor, Tensor]:
    """Radially averaged power of (n, c, h, w), mean over images and channels: frequencies (k,), power (k,), float64.

    Frequencies are in cycles per sample, from 1 / side up to the Nyquist frequency 0.5. A Hann window keeps the edges
    from leaking; the mean of each map is removed first.
    """
    height, width = images.shape[-2:]
    power = _windowed_power(images)
    radius = _radius(height, width)
    side = min(height, width)
    bins = torch.round(radius * side).long().flatten()
    inside = (bins >= 1) & (bins <= side // 2)
    sums = torch.zeros(side // 2 + 1, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    sums.index_add_(0, bins[inside], power.flatten()[inside])
    counts.index_add_(0, bins[inside], torch.ones_like(power).flatten()[inside])
    return torch.arange(1, side // 2 + 1, dtype=torch.float64) / side, sums[1:] / counts[1:].clamp_min(1)


def spectral_slope(frequencies: Tensor, power: Tensor) -> float:
    """alpha of power = f^-alpha, a least-squares line in the log-log plane; NaN below 3 usable bins.

    The two lowest bins (the window spreads the removed mean there) and those above 0.45 are left out.
    """
    used = (frequencies <= 0.45) & (power > 0)
    used[:2] = False
    if int(used.sum()) < 3:
        return math.nan
    x, y = frequencies[used].log(), power[used].log()
    x = x - x.mean()
    return float(-(x * y).sum() / x.square().sum())


def high_frequency_share(images: Tensor) -> float:
    """Share of the power, without the mean, above half the Nyquist frequency (0.25 cycles per sample)."""
    power = _windowed_power(images)
    radius = _radius(*images.shape[-2:])
    return float(power[radius > 0.25].sum() / power.sum().clamp_min(1e-30))


def _windowed_power(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    window = torch.outer(*(torch.hann_window(side + 2, periodic=False)[1:-1].double() for side in (height, width)))
    total = torch.zeros(height, width, dtype=torch.float64)
    for image in images:  # one at a time: a full-size complex copy of all would be large
        image = image.double().cpu()
        image = image - image.mean(dim=(1, 2), keepdim=True)
        total += torch.fft.fft2(image * window).abs().square().mean(dim=0)
    return total / (len(images) * height * width)


def _radius(height: int, width: int) -> Tensor:
    rows, columns = torch.fft.fftfreq(height).double(), torch.fft.fftfreq(width).double()
    return (rows[:, None].square() + columns.square()).sqrt()


def tail_shares(latents: Tensor) -> list[float]:
    """Per channel of (n, c, h, w): the share of sum((z - m)^2) in the 0.1 % strongest positions.

    0.013 for a Gaussian, 0.032 for a Laplace distribution.
    """
    rows = latents.transpose(0, 1).flatten(1)
    energy = (rows - rows.mean(dim=1, keepdim=True)).double().square()
    count = max(1, round(TAIL_POSITIONS * energy.shape[1]))
    strongest = energy.topk(count, dim=1).values.sum(dim=1)
    total = energy.sum(dim=1)
    return torch.where(total > 1e-12, strongest / total.clamp_min(1e-30), 0.0).tolist()


def histogram_information(mean: Tensor, logvar: Tensor, noise: Tensor, bins: int = 256) -> list[float]:
    """Mutual information per channel in nats, H(z) - H(z | x), H(z) from a histogram of posterior samples.

    Args:
        mean, logvar, noise: (n, c, h, w); noise is standard normal.
        bins: over six standard deviations to each side; the bias is about bins / (2 positions) nats.
    """
    found = []
    for channel in range(mean.shape[1]):
        m, s = mean[:, channel].double().flatten(), logvar[:, channel].double().flatten()
        z = m + torch.exp(0.5 * s) * noise[:, channel].double().flatten()
        deviation = z.std().clamp_min(1e-12)
        place = ((z - z.mean()) / deviation).clamp(-6, 6)
        counts = torch.histc(place.float(), bins, -6.0, 6.0).double()
        p = counts / counts.sum()
        width = 12.0 / bins * deviation
        entropy = -(p * p.clamp_min(1e-30).log()).sum() + width.log()
        conditional = 0.5 * (math.log(2 * math.pi * math.e) + s).mean()
        found.append(float(entropy - conditional))
    return found


def maximum_mean_discrepancy(
    samples: Tensor, references: Tensor, permutations: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Unbiased squared MMD of two sets (n, d) and (n, d), and its p-value by permutation. Gretton et al. 2012, eq. 3.

    The kernel is the mean of three Gaussians, at 0.5, 1 and 2 times the median distance. The p-value assumes
    independent rows; positions of one image are not, which makes it small too easily.
    """
    n = len(samples)
    if n != len(references) or n < 4:
        raise ValueError(f"maximum_mean_discrepancy: {n} and {len(references)} rows; give two sets of 4 or more, equal")
    pooled = torch.cat([samples, references]).float()
    squared = torch.cdist(pooled, pooled).square()
    median = squared[torch.triu(torch.ones_like(squared, dtype=torch.bool), 1)].median().clamp_min(1e-12)
    kernel = sum(torch.exp(-squared / (2 * factor**2 * median)) for factor in (0.5, 1.0, 2.0)) / 3.0
    assert isinstance(kernel, Tensor)
    kernel.fill_diagonal_(0.0)
    members = torch.zeros(2 * n, permutations + 1)
    members[:n, 0] = 1.0
    rng = generator(seed, "mmd")
    for column in range(1, permutations + 1):
        members[torch.randperm(2 * n, generator=rng)[:n], column] = 1.0
    towards = (kernel @ members).double()
    members = members.double()
    within = (members * towards).sum(dim=0)
    others = kernel.double().sum(dim=1, keepdim=True) - towards
    across = (members * others).sum(dim=0)
    outside = ((1 - members) * others).sum(dim=0)
    values = (within + outside) / (n * (n - 1)) - 2 * across / n**2
    p_value = (1 + int((values[1:] >= values[0]).sum())) / (permutations + 1)
    return float(values[0]), p_value


def spread_positions(latents: Tensor, count: int, per_image: int = 8, seed: int = 0) -> Tensor:
    """At most `count` positions of (n, c, h, w), the same number from each image, at random places: (m, c)."""
    images, channels = latents.shape[:2]
    flat = latents.flatten(2)
    each = max(1, min(per_image, count // images, flat.shape[2]))
    rng = generator(seed, "positions")
    rows = [flat[i][:, torch.randperm(flat.shape[2], generator=rng)[:each]].T for i in range(min(images, count))]
    return torch.cat(rows).reshape(-1, channels)
