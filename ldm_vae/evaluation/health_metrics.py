"""What a set of latents (or images) looks like as data: spectrum, tails, information, distance from a Gaussian.

Pure functions of tensors on the CPU; which latents, and what follows from the figures, belongs to `diagnosis.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.health import RULES, PosteriorStatistics, check_rule, effective_rank
from ldm_vae.autoencoder.klt import Moments, block_moments, solve_klt
from ldm_vae.autoencoder.rate import bits_per_dimension, bits_per_pixel
from ldm_vae.errors import UserError
from ldm_vae.metrics import psnr, water_level
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
    """Mutual information of a channel and image with position in nats, H(z) - H(z | x), H(z) from a histogram of z.

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
    toward = (kernel @ members).double()
    members = members.double()
    within = (members * toward).sum(dim=0)
    others = kernel.double().sum(dim=1, keepdim=True) - toward
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


# What an autoencoder does with latents that are exchanged, noisy, drawn from the prior, constant or coded repeatedly.

BORDER = 8
NEAR = 4
NOISE_LEVELS = (0.05, 0.1, 0.2, 0.4)
FLAT_COLORS = {
    "dark": (-0.8, -0.8, -0.8),
    "gray": (0.0, 0.0, 0.0),
    "light": (0.8, 0.8, 0.8),
    "red": (0.6, -0.6, -0.6),
    "green": (-0.5, 0.4, -0.4),
    "blue": (-0.5, -0.3, 0.6),
}


def decode_all(autoencoder: Autoencoder, latents: Tensor, batch: int) -> Tensor:
    """Decode (n, c, h, w) in batches."""
    return torch.cat([autoencoder.decode_images(part) for part in latents.split(batch)])


def decoder_use(autoencoder: Autoencoder, latents: Tensor, batch: int) -> list[float]:
    """S_c: the change when channel c comes from another image, relative to that when all channels do, (c,).

    Each image's partner is half the set away. All NaN when exchanging everything changes nothing.
    """
    partners = latents.roll(len(latents) // 2, dims=0)
    changes = torch.zeros(latents.shape[1], dtype=torch.float64)
    whole = 0.0
    for rows, others in zip(latents.split(batch), partners.split(batch)):
        decoded = autoencoder.decode_images(rows)
        whole += float((autoencoder.decode_images(others) - decoded).double().square().sum())
        for channel in range(latents.shape[1]):
            exchanged = rows.clone()
            exchanged[:, channel] = others[:, channel]
            changes[channel] += float((autoencoder.decode_images(exchanged) - decoded).double().square().sum())
    return (changes / whole).tolist() if whole > 1e-9 * latents[:, :1].numel() else [float("nan")] * len(changes)


def hot_reach(autoencoder: Autoencoder, mean: Tensor, factor: int) -> list[float]:
    """Share of what a channel's hottest position does to the image that it does elsewhere, (c,); NaN: it does nothing.

    The position of `mean` (n, c, h, w) farthest from its channel's mean is set to that mean, and the images decoded
    before and after are compared; elsewhere is more than `NEAR` positions away (an eighth of a small latent's side).
    What describes its own place has nearly 0, what carries a gain of the whole image nearly 1.
    """
    average = mean.mean(dim=(0, 2, 3), keepdim=True)
    distances = (mean - average).abs()
    height, width = mean.shape[-2:]
    near = max(1, min(NEAR, min(height, width) // 8))
    shares = []
    for channel in range(mean.shape[1]):
        place = int(distances[:, channel].argmax())
        image, row, column = place // (height * width), place // width % height, place % width
        latents = mean[image : image + 1].expand(2, -1, -1, -1).clone()
        latents[1, channel, row, column] = average[0, channel, 0, 0]
        before, after = autoencoder.decode_images(latents).double()
        change = (after - before).square().sum(dim=0)
        rows, columns = (slice(max(0, at - near) * factor, (at + near + 1) * factor) for at in (row, column))
        total = float(change.sum())
        shares.append(1 - float(change[rows, columns].sum()) / total if total > 1e-9 else float("nan"))
    return shares


def permutation_ratio(images: Tensor, decoded: Tensor) -> float:
    """MSE of images decoded from another image's latents, relative to that of their own; 1 when latents say nothing."""
    right = (decoded - images).square().mean()
    wrong = (decoded.roll(len(decoded) // 2, dims=0) - images).square().mean()
    return float(wrong / right.clamp_min(1e-10))


def noise_curve(
    autoencoder: Autoencoder, images: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor, batch: int
) -> dict[float, float]:
    """PSNR in dB (mean over images) of decode(mean + tau * deviation * noise) by tau; tau = 0 is decode(mean).

    Args:
        deviation: (c,), of each channel over the data.
        noise: standard normal, shaped like the mean.
    """
    scaled = deviation.view(1, -1, 1, 1) * noise
    curve = {}
    for tau in (0.0, *NOISE_LEVELS):
        curve[tau] = float(psnr(decode_all(autoencoder, mean + tau * scaled, batch), images).mean())
    return curve


def noise_for_one_decibel(curve: dict[float, float]) -> float | None:
    """The tau at which the curve has lost 1 dB, the error linear in tau^2 between points; None beyond the last."""
    points = sorted(curve.items())
    errors = [(tau, 10 ** (-decibels / 10)) for tau, decibels in points]
    wanted = errors[0][1] * 10**0.1
    for (tau, error), (next_tau, next_error) in itertools.pairwise(errors):
        if next_error >= wanted:
            share = (wanted - error) / max(next_error - error, 1e-30)
            return float((tau**2 + share * (next_tau**2 - tau**2)) ** 0.5)
    return None


def cycle_error(autoencoder: Autoencoder, latents: Tensor, batch: int) -> float:
    """Root mean square of E(D(z)) - z, E being the posterior's mean."""
    squared = [
        (autoencoder.encode_moments(autoencoder.decode_images(part))[0] - part).square().mean(dim=(1, 2, 3))
        for part in latents.split(batch)
    ]
    return float(torch.cat(squared).mean().sqrt())


def round_trips(autoencoder: Autoencoder, images: Tensor, batch: int, count: int = 10) -> list[float]:
    """PSNR in dB against the originals after 1, 2 ... `count` times encoding and decoding the result again."""
    found = torch.zeros(count)
    for originals in images.split(batch):
        current = originals
        for trip in range(count):
            current = autoencoder.decode_images(autoencoder.encode_moments(current)[0])[..., : images.shape[-2], :]
            current = current[..., : images.shape[-1]]
            found[trip] += psnr(current, originals).sum().cpu()
    return (found / len(images)).tolist()


class BorderError:
    """Squared error of the outer 8 pixels, and of the four 8 x 8 corners, relative to the inner pixels."""

    def __init__(self) -> None:
        self.sums = {"outer": 0.0, "corner": 0.0, "inner": 0.0}
        self.counts = dict.fromkeys(self.sums, 0)

    def add(self, decoded: Tensor, images: Tensor) -> None:
        error = (decoded - images).square().mean(dim=1).double()
        edge = BORDER
        inner = error[:, edge:-edge, edge:-edge]
        corners = torch.cat([error[:, rows, :] for rows in (slice(None, edge), slice(-edge, None))], dim=1)
        corners = torch.cat([corners[..., :edge], corners[..., -edge:]], dim=-1)
        parts = {"inner": (float(inner.sum()), inner.numel()), "corner": (float(corners.sum()), corners.numel())}
        parts["outer"] = (float(error.sum()) - parts["inner"][0], error.numel() - inner.numel())
        for name, (total, count) in parts.items():
            self.sums[name] += total
            self.counts[name] += count

    def ratio(self, part: str) -> float:
        inner = self.sums["inner"] / max(1, self.counts["inner"])
        return self.sums[part] / max(1, self.counts[part]) / max(inner, 1e-12)


@dataclass(frozen=True)
class FlatField:
    """Constant colors decoded: `std` the largest deviation over colors and channels inside, `harmonics` the power at
    the stride's harmonics relative to their neighbors, `decoded` {color: (3, h, w)}."""

    std: float
    harmonics: float
    decoded: dict[str, Tensor]


def flat_field(autoencoder: Autoencoder, resolution: int, stride: int, device: torch.device) -> FlatField:
    """Encode and decode constant images, and look at the inner half, away from what padding does.

    The ratio of powers has a floor: a periodic pattern far under one 8-bit level (a deviation of 0.0005) is none.
    """
    decoded = {}
    worst, ratios = 0.0, []
    margin = resolution // 4 // stride * stride
    for name, color in FLAT_COLORS.items():
        image = torch.tensor(color, device=device).view(1, 3, 1, 1).expand(1, 3, resolution, resolution)
        result = autoencoder.decode_images(autoencoder.encode_moments(image)[0])[0].cpu()
        decoded[name] = result
        inner = result[:, margin : resolution - margin, margin : resolution - margin].double()
        worst = max(worst, float(inner.std(dim=(1, 2), unbiased=False).max()))
        ratios.append(harmonic_ratio(inner, stride))
    return FlatField(worst, max(ratios), decoded)


def harmonic_ratio(field: Tensor, stride: int) -> float:
    """Mean power of (c, h, w) at multiples of 1 / stride (not 0), relative to the bins around them; flat: 0."""
    side = min(field.shape[-2:]) // stride * stride
    if side < 4 * stride:  # harmonics and neighbors would touch
        return 0.0
    field = field[:, :side, :side]
    window = torch.hann_window(side, dtype=field.dtype)  # else slow shading would leak along the axes
    window = window / window.square().mean().sqrt()
    field = (field - field.mean(dim=(1, 2), keepdim=True)) * window * window[:, None]
    power = (torch.fft.fft2(field).abs() / side**2).square().mean(dim=0)
    step = side // stride
    distance = torch.minimum(torch.arange(side) % step, -torch.arange(side) % step)
    distance = torch.maximum(distance, distance[:, None])  # to the nearest harmonic; the window fills distance 1
    from_zero = torch.minimum(torch.arange(side), side - torch.arange(side))
    from_zero = torch.maximum(from_zero, from_zero[:, None])
    harmonics = (distance == 0) & (from_zero > 0)
    near = (distance == 2) & (from_zero > 2)
    floor = 0.0005**2 / int(harmonics.sum())
    return float(power[harmonics].mean() / (power[near].mean() + floor))


def droplet_score(autoencoder: Autoencoder, latents: Tensor) -> float | None:
    """Largest max|activation| / median|activation| over the decoder's stages; None where it has no stages.

    Normalizing decoders grow isolated spikes of this kind ("droplets", Karras et al., arXiv:1912.04958).
    """
    scores: list[float] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            sizes = output.detach().float().abs()
            scores.append(float(sizes.max() / sizes.median().clamp_min(1e-6)))

    with _hooked(decoder_stages(autoencoder), look):
        autoencoder.decode_images(latents)
    return max(scores, default=None)


def decoder_stages(autoencoder: Autoencoder) -> list[nn.Module]:
    """The decoder's stages: the entries of its module lists, as in diffusers' `up_blocks` and our `stages`."""
    decoder = getattr(autoencoder, "decoder", None)
    if not isinstance(decoder, nn.Module):
        return []
    return [stage for child in decoder.children() if isinstance(child, nn.ModuleList) for stage in child]


@contextmanager
def _hooked(modules: list[nn.Module], look: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(look) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Measuring an autoencoder's health on images: one pass over all of them, then probes on a bounded few.

LEAST_IMAGES = 8
PROBE_IMAGES = 64
PROBE_CHANNEL_DECODES = 1024
"""Decodes spent on the channels' use: fewer images for a latent of many channels, 8 at least."""
ROUND_TRIP_IMAGES = 16
BUFFERED_NUMBERS = 1 << 25
"""Numbers kept of the means, and as many of the log-variances: all 256 default images up to 128 channels."""
BLOCKS_PER_DIMENSION = 10
"""Least number of blocks for each number in a block; with fewer, the images' own linear code would overfit them."""
LARGEST_BLOCK = 32
"""Side in pixels up to which blocks are compared with a linear code: their covariance grows with its fourth power."""
MMD_POSITIONS = 2000
HISTOGRAM_BINS = 60
PICTURES = 8


@dataclass(frozen=True)
class Probes:
    """A bounded set of images with their posteriors, on the device. `noise` is standard normal, one draw an image."""

    images: Tensor
    mean: Tensor
    logvar: Tensor
    noise: Tensor

    @property
    def sample(self) -> Tensor:
        return self.mean + torch.exp(0.5 * self.logvar) * self.noise


@dataclass(frozen=True)
class Measured:
    """`figures`: JSON-able, None where a quantity does not apply; the rest is for the pictures of the page.

    `decoded_mean`, `decoded_sample`, `prior_images`: (8, 3, r, r) or fewer, of the first probes and of prior latents.
    """

    figures: dict[str, Any]
    probes: Probes
    flat: FlatField
    decoded_mean: Tensor
    decoded_sample: Tensor
    prior_images: Tensor


class _Collector:
    """The pass over all images: sums, PSNR of both decodings, border error, a buffer of posteriors, the probes."""

    def __init__(self, autoencoder: Autoencoder, expected: int, seed: int, device: torch.device) -> None:
        self.autoencoder, self.seed = autoencoder, seed
        channels = autoencoder.latent_channels
        self.statistics = PosteriorStatistics(channels, device, autoencoder.logvar_bounds)
        self.border = BorderError()
        self.factor = autoencoder.downsampling
        # codes are not numbers, and a vector for the whole image has no blocks
        mapped = has_positions(autoencoder) and autoencoder.codebook_size is None
        self.has_linear_counterpart = mapped and self.factor <= LARGEST_BLOCK
        self.blocks: Moments | None = None
        self.decibels: dict[str, list[float]] = {"mean": [], "sample": []}
        self.every = max(1, expected // PROBE_IMAGES)
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.buffered: list[tuple[Tensor, Tensor, Tensor]] = []
        self.buffered_numbers = 0
        self.count = 0

    def add(self, images: Tensor) -> None:
        mean, logvar = self.autoencoder.encode_moments(images)
        keys = range(self.count, self.count + len(images))
        shape = mean.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=generator(self.seed, "diagnosis", key)) for key in keys])
        noise = noise.to(images.device)
        self.statistics.add(mean, logvar)
        height, width = images.shape[-2:]
        decoded = self.autoencoder.decode_images(mean)[..., :height, :width]
        sampled = self.autoencoder.decode_images(mean + torch.exp(0.5 * logvar) * noise)[..., :height, :width]
        self.decibels["mean"] += psnr(decoded, images).tolist()
        self.decibels["sample"] += psnr(sampled, images).tolist()
        self.border.add(decoded, images)
        if self.has_linear_counterpart:
            moments = block_moments(images, self.factor)
            self.blocks = moments if self.blocks is None else self.blocks + moments
        if self.buffered_numbers < BUFFERED_NUMBERS:
            self.buffered.append((mean.cpu(), logvar.cpu(), noise.cpu()))
            self.buffered_numbers += mean.numel()
        chosen = [row for row, key in enumerate(keys) if key % self.every == 0]
        chosen = chosen[: PROBE_IMAGES - sum(len(part[0]) for part in self.parts)]
        if chosen:
            self.parts.append((images[chosen], mean[chosen], logvar[chosen], noise[chosen]))
        self.count += len(images)

    def probes(self) -> Probes:
        return Probes(*(torch.cat(list(parts)) for parts in zip(*self.parts)))


def measure(
    autoencoder: Autoencoder,
    batches: Iterable[Tensor],
    expected: int,
    batch: int,
    seed: int,
    device: torch.device,
    plain: bool = False,
) -> Measured:
    """All figures of the report.

    Args:
        autoencoder: any with the diffusers interface, on the device, in eval mode.
        batches: images (n, 3, r, r) in [-1, 1] of one resolution.
        expected: how many images about will come; spreads the probes.
        batch: images per forward pass of the probes.
        seed: of all noise.
        plain: it was trained with beta = 0, so that nothing gave its latents the scale of N(0, I).

    Raises:
        UserError: fewer than 8 images; most quantities compare images.
    """
    collector = _Collector(autoencoder, expected, seed, device)
    for images in batches:
        collector.add(images.to(device))
    if collector.count < LEAST_IMAGES:
        raise UserError(
            f"data: {collector.count} images are too few for the report; give at least {LEAST_IMAGES}, "
            "better 256 (part=all takes all images of the data)"
        )
    statistics, probes = collector.statistics, collector.probes()
    mean, logvar, noise = (torch.cat(list(parts)) for parts in zip(*collector.buffered))
    deterministic = statistics.deterministic
    figures: dict[str, Any] = {"channels": _channels(autoencoder, statistics, probes, (mean, logvar, noise), batch)}
    figures["rate"] = _rate(autoencoder, statistics, deterministic)
    figures["latents"] = _latents(figures, statistics, probes, mean + torch.exp(0.5 * logvar) * noise, seed)
    rate = figures["rate"]
    inactive = check_rule("kl_inactive", {"median_logvar": rate["median_logvar"], "nats": rate["nats_per_dim"]})
    without_prior = deterministic or plain or inactive is not None
    prior = _prior(probes, figures["channels"], without_prior, seed)
    flat = flat_field(autoencoder, probes.images.shape[-1], autoencoder.downsampling, device)
    figures["decoder"] = _decoder(autoencoder, figures, probes, prior, batch)
    figures["decoder"] |= {
        "psnr_mean": _average(collector.decibels["mean"]),
        "psnr_sample": _average(collector.decibels["sample"]),
        "gap_db": None
        if deterministic
        else _average(collector.decibels["mean"]) - _average(collector.decibels["sample"]),
        "border_ratio": collector.border.ratio("outer"),
        "corner_ratio": collector.border.ratio("corner"),
        "linear_margin_db": _linear_margin(collector.blocks, figures, probes, collector.factor),
        "flat_std": flat.std if has_positions(autoencoder) else None,
        "harmonics": flat.harmonics,
    }
    figures["curves"] = _curves(probes, mean, logvar)
    figures["images"] = {"count": collector.count, "probes": len(probes.images), "buffered": len(mean)}
    few = slice(PICTURES)
    pictures = [decode_all(autoencoder, z[few], batch) for z in (probes.mean, probes.sample, prior)]
    return Measured(_without_nan(figures), probes, flat, *pictures)


def has_positions(autoencoder: Autoencoder) -> bool:
    """Whether latents are maps. Of one vector an image, that a constant color stays constant is not to be expected,
    and no position stands out from others."""
    return autoencoder.only_side is None


def _channels(
    autoencoder: Autoencoder,
    statistics: PosteriorStatistics,
    probes: Probes,
    buffered: tuple[Tensor, Tensor, Tensor],
    batch: int,
) -> list[dict[str, float | None]]:
    columns: dict[str, list[Any]] = dict(statistics.result())
    tails = tail_shares(buffered[0])
    columns["tail_share"] = tails if has_positions(autoencoder) else [None] * len(tails)
    columns["information_histogram_nats"] = histogram_information(*buffered)
    images = max(LEAST_IMAGES, PROBE_CHANNEL_DECODES // statistics.channels)
    columns["decoder_use"] = decoder_use(autoencoder, probes.sample[:images], batch)
    columns["hot_reach"] = (
        hot_reach(autoencoder, probes.mean, autoencoder.downsampling)
        if has_positions(autoencoder)
        else [None] * statistics.channels
    )
    if statistics.deterministic:
        nothing = ("nats", "snr", "capacity_bits", "marginal_nats", "information_nats", "information_histogram_nats")
        columns |= {name: [None] * statistics.channels for name in (*nothing, "clamp_share", "passive_share")}
    return [{name: column[c] for name, column in columns.items()} for c in range(statistics.channels)]


def _rate(autoencoder: Autoencoder, statistics: PosteriorStatistics, deterministic: bool) -> dict[str, Any]:
    summary = statistics.summary()
    nats = None if deterministic else summary["nats"]
    channels, factor = statistics.channels, autoencoder.downsampling
    return {
        "deterministic": deterministic,
        "deterministic_by_design": autoencoder.deterministic,
        "nats_per_dim": nats,
        "bits_per_dim": None if nats is None else bits_per_dimension(nats),
        "bits_per_pixel": None if nats is None else bits_per_pixel(nats, channels, factor),
        "median_logvar": summary["median_logvar"],
        "noise_share": 0.0 if deterministic else summary["noise_share"],
    }


def _latents(
    figures: dict[str, Any], statistics: PosteriorStatistics, probes: Probes, sample: Tensor, seed: int
) -> dict[str, Any]:
    """Structure over channels (dead ones left out) and positions, and how far normalized samples are from N(0, I)."""
    dead = dead_channels(figures)
    living = [index for index in range(statistics.channels) if index not in dead]
    rank = correlation = pair = None
    if len(living) > 1:
        matrix = statistics.correlation(living)
        rank = effective_rank(matrix) / len(living)
        sizes = (matrix - torch.eye(len(living), dtype=matrix.dtype)).abs()
        correlation = float(sizes.max())
        place = int(sizes.argmax())
        pair = [living[place // len(living)], living[place % len(living)]]
    m, deviation = sample.mean(dim=(0, 2, 3), keepdim=True), sample.std(dim=(0, 2, 3), keepdim=True)
    chosen = spread_positions((sample - m) / deviation.clamp_min(1e-6), MMD_POSITIONS, seed=seed)
    gaussian = torch.randn(chosen.shape, generator=generator(seed, "gaussian"))
    discrepancy, p_value = maximum_mean_discrepancy(chosen, gaussian, seed=seed)
    return {
        "effective_rank": rank,
        "correlation": correlation,
        "correlated_channels": pair,
        "mmd2": discrepancy,
        "mmd_p_value": p_value,
        "mmd_positions": len(chosen),
        "image_slope": spectral_slope(*power_spectrum(probes.images)),
        "latent_slope": spectral_slope(*power_spectrum(probes.mean)),
        "high_frequency_share_mean": high_frequency_share(probes.mean),
        "high_frequency_share_sample": high_frequency_share(probes.sample),
    }


def _prior(probes: Probes, channels: list[dict[str, Any]], without_prior: bool, seed: int) -> Tensor:
    """Latents from N(0, I); where no KL gave the latents its scale, from the Gaussian with their own moments.

    These are a channel's mean, and its variance with that of the posterior noise.
    """
    noise = torch.randn(probes.mean.shape, generator=generator(seed, "prior")).to(probes.mean)
    if not without_prior:
        return noise
    m = noise.new_tensor([channel["mean"] for channel in channels]).view(1, -1, 1, 1)
    v = noise.new_tensor([channel["variance"] + channel["noise"] for channel in channels]).view(1, -1, 1, 1)
    return m + v.sqrt() * noise


def _decoder(
    autoencoder: Autoencoder, figures: dict[str, Any], probes: Probes, prior: Tensor, batch: int
) -> dict[str, Any]:
    channels = figures["channels"]
    deviation = torch.tensor([channel["variance"] ** 0.5 for channel in channels]).to(probes.mean)
    curve = noise_curve(autoencoder, probes.images, probes.mean, deviation, probes.noise, batch)
    bearable = noise_for_one_decibel(curve)
    tolerance = None
    if bearable is not None and not figures["rate"]["deterministic"]:
        dead = dead_channels(figures)
        living = [channel for index, channel in enumerate(channels) if index not in dead] or channels
        posterior = torch.tensor([(c["noise"] / max(c["variance"], 1e-12)) ** 0.5 for c in living]).median()
        tolerance = bearable / float(posterior)
    decoded = decode_all(autoencoder, probes.sample, batch)
    trips = round_trips(autoencoder, probes.images[:ROUND_TRIP_IMAGES], batch)
    cycle_prior = cycle_error(autoencoder, prior, batch)
    cycle_posterior = cycle_error(autoencoder, probes.sample, batch)
    return {
        "permutation": permutation_ratio(probes.images, decoded),
        "noise_curve": {f"{tau:g}": value for tau, value in curve.items()},
        "noise_for_one_decibel": bearable,
        "tolerance": tolerance,
        "cycle_prior": cycle_prior,
        "cycle_posterior": cycle_posterior,
        "cycle_ratio": cycle_prior / max(cycle_posterior, 1e-6),
        "round_trips": trips,
        "round_trip_drift_db": trips[0] - trips[-1],
        "droplet_score": droplet_score(autoencoder, probes.mean[:batch]),
    }


def _linear_margin(blocks: Moments | None, figures: dict[str, Any], probes: Probes, factor: int) -> float | None:
    """PSNR of decode(mean) over that of the block KLT with as many numbers a position and the same rate, on the probes.

    At a rate the best linear decoder shrinks each coefficient by 1 - water level / eigenvalue, since it reads noisy
    ones; it is asked for the mean here as the autoencoder is. The transform is fitted on the very images of the report,
    which favors it; None where they are too few for that. In dB.
    """
    if blocks is None or blocks.count < BLOCKS_PER_DIMENSION * len(blocks.total):
        return None
    components = min(len(figures["channels"]), len(blocks.total))
    klt, nats = solve_klt([blocks], factor), figures["rate"]["nats_per_dim"]
    variances = klt.eigenvalues[:components]
    level = 0.0 if nats is None else water_level(variances.tolist(), nats * len(figures["channels"]))
    gains = (1 - level / variances.clamp_min(1e-12)).clamp_min(0)
    linear = klt.reconstruct(probes.images, components, gains).clamp(-1, 1)
    return float(figures["decoder"]["noise_curve"]["0"] - psnr(linear, probes.images).mean())


def _curves(probes: Probes, mean: Tensor, logvar: Tensor) -> dict[str, Any]:
    """Spectra and histograms, for the plots."""
    spectra = {"image": probes.images, "latent_mean": probes.mean, "latent_sample": probes.sample}
    found: dict[str, Any] = {}
    for name, images in spectra.items():
        frequencies, power = power_spectrum(images)
        found[name] = {"frequency": frequencies.tolist(), "power": power.tolist()}
    deviation = torch.exp(0.5 * logvar)
    found["mean_histograms"] = _histograms(mean)
    found["deviation_histograms"] = _histograms(deviation)
    return found


def _histograms(latents: Tensor) -> list[dict[str, Any]]:
    """Per channel of (n, c, h, w), between its 0.1 % and 99.9 % points: edges (61,) and shares (60,)."""
    found = []
    for channel in latents.transpose(0, 1).flatten(1).double():
        ordered = channel.sort().values
        skip = len(ordered) // 1000
        low, high = float(ordered[skip]), float(ordered[-1 - skip])
        if high - low < 1e-9:
            low, high = low - 0.5, high + 0.5
        counts = torch.histc(channel.float(), HISTOGRAM_BINS, low, high).double() / len(channel)
        edges = torch.linspace(low, high, HISTOGRAM_BINS + 1, dtype=torch.float64)
        found.append({"edges": edges.tolist(), "shares": counts.tolist()})
    return found


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figures = Mapping[str, Any]


def dead_channels(figures: Figures) -> list[int]:
    """Channels that say nothing by the rule of the table. Without a rate, those without variance between images."""
    channels = figures["channels"]
    limits = RULES["dead_channel"].limits
    typical = sum(channel["variance"] for channel in channels) / len(channels)
    dead = []
    for index, channel in enumerate(channels):
        if channel["nats"] is None:
            still = limits["image_variance"].crossed(channel["image_variance"] / max(typical, 1e-20))
        else:
            still = limits["nats"].crossed(channel["nats"]) and (
                limits["image_variance"].crossed(channel["image_variance"])
                or limits["passive_share"].crossed(channel["passive_share"])
            )
        if still:
            dead.append(index)
    return dead
