"""Measuring an autoencoder's health on images: one pass over all of them, then probes on a bounded few.

Owns which images each quantity is measured on, so that memory is bounded for any number of them. The quantities are in
`ldm_vae.autoencoder.health`, `latent_statistics.py` and `decoder_probes.py`; verdicts in `judgement.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_vae.autoencoder.health import PosteriorStatistics, effective_rank
from ldm_vae.autoencoder.interface import decode, encode_moments, is_deterministic
from ldm_vae.autoencoder.klt import Moments, block_moments, solve_klt
from ldm_vae.autoencoder.models import downsampling, latent_channels, only_side
from ldm_vae.autoencoder.rate import bits_per_dimension, bits_per_pixel
from ldm_vae.errors import UserError
from ldm_vae.evaluation.fidelity.measurement import codebook_size
from ldm_vae.evaluation.health import decoder_probes, latent_statistics
from ldm_vae.evaluation.health.judgement import dead_channels
from ldm_vae.evaluation.metrics import psnr
from ldm_vae.evaluation.water_filling import water_level
from ldm_vae.random import generator

LEAST_IMAGES = 8
PROBE_IMAGES = 64
PROBE_CHANNEL_DECODES = 1024
"""Decodes spent on the channels' use: fewer images for a latent of many channels, 8 at least."""
ROUND_TRIP_IMAGES = 16
BUFFERED_NUMBERS = 1 << 25
"""Numbers kept of the means, and as many of the log-variances: all 256 default images up to 128 channels."""
BLOCKS_PER_DIMENSION = 10
"""Fewer than so many blocks of the images for each number in one, and their own linear code would fit them by heart."""
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
    flat: decoder_probes.FlatField
    decoded_mean: Tensor
    decoded_sample: Tensor
    prior_images: Tensor


class _Collector:
    """The pass over all images: sums, PSNR of both decodings, border error, a buffer of posteriors, the probes."""

    def __init__(self, autoencoder: Any, expected: int, seed: int, device: torch.device) -> None:
        self.autoencoder, self.seed = autoencoder, seed
        channels = latent_channels(autoencoder)
        self.statistics = PosteriorStatistics(channels, device, logvar_bounds(autoencoder))
        self.border = decoder_probes.BorderError()
        self.factor = downsampling(autoencoder)
        # codes of so many bits are no numbers, and one vector an image has no blocks
        mapped = has_positions(autoencoder) and codebook_size(autoencoder) is None
        self.has_linear_counterpart = mapped and self.factor <= LARGEST_BLOCK
        self.blocks: Moments | None = None
        self.decibels: dict[str, list[float]] = {"mean": [], "sample": []}
        self.every = max(1, expected // PROBE_IMAGES)
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.buffered: list[tuple[Tensor, Tensor, Tensor]] = []
        self.buffered_numbers = 0
        self.count = 0

    def add(self, images: Tensor) -> None:
        mean, logvar = encode_moments(self.autoencoder, images)
        keys = range(self.count, self.count + len(images))
        shape = mean.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=generator(self.seed, "diagnosis", key)) for key in keys])
        noise = noise.to(images.device)
        self.statistics.add(mean, logvar)
        height, width = images.shape[-2:]
        decoded = decode(self.autoencoder, mean)[..., :height, :width]
        sampled = decode(self.autoencoder, mean + torch.exp(0.5 * logvar) * noise)[..., :height, :width]
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
    autoencoder: Any, batches: Iterable[Tensor], expected: int, batch: int, seed: int, device: torch.device
) -> Measured:
    """All figures of the report.

    Args:
        autoencoder: any with the diffusers interface, on the device, in eval mode.
        batches: images (n, 3, r, r) in [-1, 1] of one resolution.
        expected: how many images about will come; spreads the probes.
        batch: images per forward pass of the probes.
        seed: of all noise.

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
    prior = _prior(probes, figures["channels"], deterministic, seed)
    flat = decoder_probes.flat_field(autoencoder, probes.images.shape[-1], downsampling(autoencoder), device)
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
    pictures = [decoder_probes.decode_all(autoencoder, z[few], batch) for z in (probes.mean, probes.sample, prior)]
    return Measured(_without_nan(figures), probes, flat, *pictures)


def has_positions(autoencoder: Any) -> bool:
    """Whether latents are maps. Of one vector an image, that a constant colour stays constant is not to be expected,
    and no position stands out from others."""
    return only_side(autoencoder) is None


def logvar_bounds(autoencoder: Any) -> tuple[float, float]:
    """Where the autoencoder clamps its log-variance: ours at a configured floor and 2, diffusers' at -30 and 20."""
    floor = getattr(autoencoder.config, "logvar_floor", None)
    return (-30.0, 20.0) if floor is None else (float(floor), 2.0)


def _channels(
    autoencoder: Any,
    statistics: PosteriorStatistics,
    probes: Probes,
    buffered: tuple[Tensor, Tensor, Tensor],
    batch: int,
) -> list[dict[str, float | None]]:
    columns: dict[str, list[Any]] = dict(statistics.result())
    tails = latent_statistics.tail_shares(buffered[0])
    columns["tail_share"] = tails if has_positions(autoencoder) else [None] * len(tails)
    columns["information_histogram_nats"] = latent_statistics.histogram_information(*buffered)
    images = max(LEAST_IMAGES, PROBE_CHANNEL_DECODES // statistics.channels)
    columns["decoder_use"] = decoder_probes.decoder_use(autoencoder, probes.sample[:images], batch)
    columns["hot_reach"] = (
        decoder_probes.hot_reach(autoencoder, probes.mean, downsampling(autoencoder))
        if has_positions(autoencoder)
        else [None] * statistics.channels
    )
    if statistics.deterministic:
        nothing = ("nats", "snr", "capacity_bits", "marginal_nats", "information_nats", "information_histogram_nats")
        columns |= {name: [None] * statistics.channels for name in (*nothing, "clamp_share", "passive_share")}
    return [{name: column[c] for name, column in columns.items()} for c in range(statistics.channels)]


def _rate(autoencoder: Any, statistics: PosteriorStatistics, deterministic: bool) -> dict[str, Any]:
    summary = statistics.summary()
    nats = None if deterministic else summary["nats"]
    channels, factor = statistics.channels, downsampling(autoencoder)
    return {
        "deterministic": deterministic,
        "deterministic_by_design": is_deterministic(autoencoder),
        "nats_per_dim": nats,
        "bits_per_dim": None if nats is None else bits_per_dimension(nats),
        "bits_per_pixel": None if nats is None else bits_per_pixel(nats, channels, factor),
        "median_logvar": summary["median_logvar"],
        "noise_share": 0.0 if deterministic else summary["noise_share"],
    }


def _latents(
    figures: dict[str, Any], statistics: PosteriorStatistics, probes: Probes, sample: Tensor, seed: int
) -> dict[str, Any]:
    """Structure over channels (dead ones left out) and positions, and how far normalised samples are from N(0, I)."""
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
    chosen = latent_statistics.spread_positions((sample - m) / deviation.clamp_min(1e-6), MMD_POSITIONS, seed=seed)
    gaussian = torch.randn(chosen.shape, generator=generator(seed, "gaussian"))
    discrepancy, p_value = latent_statistics.maximum_mean_discrepancy(chosen, gaussian, seed=seed)
    return {
        "effective_rank": rank,
        "correlation": correlation,
        "correlated_channels": pair,
        "mmd2": discrepancy,
        "mmd_p_value": p_value,
        "mmd_positions": len(chosen),
        "image_slope": latent_statistics.spectral_slope(*latent_statistics.power_spectrum(probes.images)),
        "latent_slope": latent_statistics.spectral_slope(*latent_statistics.power_spectrum(probes.mean)),
        "high_frequency_share_mean": latent_statistics.high_frequency_share(probes.mean),
        "high_frequency_share_sample": latent_statistics.high_frequency_share(probes.sample),
    }


def _prior(probes: Probes, channels: list[dict[str, Any]], deterministic: bool, seed: int) -> Tensor:
    """Latents from N(0, I); without a rate there is no prior, so from the Gaussian with the latents' moments."""
    noise = torch.randn(probes.mean.shape, generator=generator(seed, "prior")).to(probes.mean)
    if not deterministic:
        return noise
    m = noise.new_tensor([channel["mean"] for channel in channels]).view(1, -1, 1, 1)
    v = noise.new_tensor([channel["variance"] for channel in channels]).view(1, -1, 1, 1)
    return m + v.sqrt() * noise


def _decoder(autoencoder: Any, figures: dict[str, Any], probes: Probes, prior: Tensor, batch: int) -> dict[str, Any]:
    channels = figures["channels"]
    deviation = torch.tensor([channel["variance"] ** 0.5 for channel in channels]).to(probes.mean)
    curve = decoder_probes.noise_curve(autoencoder, probes.images, probes.mean, deviation, probes.noise, batch)
    bearable = decoder_probes.noise_for_one_decibel(curve)
    tolerance = None
    if bearable is not None and not figures["rate"]["deterministic"]:
        dead = dead_channels(figures)
        living = [channel for index, channel in enumerate(channels) if index not in dead] or channels
        posterior = torch.tensor([(c["noise"] / max(c["variance"], 1e-12)) ** 0.5 for c in living]).median()
        tolerance = bearable / float(posterior)
    decoded = decoder_probes.decode_all(autoencoder, probes.sample, batch)
    trips = decoder_probes.round_trips(autoencoder, probes.images[:ROUND_TRIP_IMAGES], batch)
    cycle_prior = decoder_probes.cycle_error(autoencoder, prior, batch)
    cycle_posterior = decoder_probes.cycle_error(autoencoder, probes.sample, batch)
    return {
        "permutation": decoder_probes.permutation_ratio(probes.images, decoded),
        "noise_curve": {f"{tau:g}": value for tau, value in curve.items()},
        "noise_for_one_decibel": bearable,
        "tolerance": tolerance,
        "cycle_prior": cycle_prior,
        "cycle_posterior": cycle_posterior,
        "cycle_ratio": cycle_prior / max(cycle_posterior, 1e-6),
        "round_trips": trips,
        "round_trip_drift_db": trips[0] - trips[-1],
        "droplet_score": decoder_probes.droplet_score(autoencoder, probes.mean[:batch]),
    }


def _linear_margin(blocks: Moments | None, figures: dict[str, Any], probes: Probes, factor: int) -> float | None:
    """PSNR of decode(mean) over that of the block KLT with as many numbers a position and the same rate, on the probes.

    At a rate the best linear decoder shrinks each coefficient by 1 - water level / eigenvalue, since it reads noisy
    ones; it is asked for the mean here as the autoencoder is. The transform is fitted on the very images of the report,
    which favours it; None where they are too few for that. In dB.
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
        frequencies, power = latent_statistics.power_spectrum(images)
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
