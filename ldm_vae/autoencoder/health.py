"""The health of an autoencoder from its posteriors: sums over many images, a few scalars per batch, alarms.

Everything here needs means and log-variances only, so it is cheap enough for training. Checks that need the decoder are
in `ldm_vae.evaluation.diagnosis`, thresholds and words in `verdicts.py`, formulas and sources in docs/how-to/health.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from ldm_vae.autoencoder.rate import kl_divergence

__all__ = ["PosteriorStatistics", "Verdict", "batch_health", "effective_rank", "training_alarms"]

PASSIVE_VARIANCE = 0.9
CLAMP_MARGIN = 0.1
NO_NOISE_LOGVAR = -29.999
"""Bound for median log-variances: at diffusers' lower clamp of -30 there is no posterior noise."""
HISTOGRAM_LOW, HISTOGRAM_HIGH, HISTOGRAM_BINS = -32.0, 22.0, 1080

SHORT_RUN = 1000
"""A run with fewer steps is not expected to reach its target rate: the controller waits for the encoder for 100 steps
and up to a fifth of the run, and a fast-learning encoder still changes while beta is locked at the end."""

ReduceFunction = Callable[[Tensor, Literal["sum", "max", "min"]], Tensor]


class PosteriorStatistics:
    """Moments of posteriors, summed in float64 on the device without a host sync.

    Args:
        channels: channels of the latent.
        device: device of the tensors to add.
        logvar_bounds: bounds to which the encoder clamps its log-variance; diffusers' (-30, 20) by default.
    """

    def __init__(
        self,
        channels: int,
        device: torch.device | str = "cpu",
        logvar_bounds: tuple[float, float] = (-30.0, 20.0),
    ) -> None:
        self.channels, self.logvar_bounds = channels, logvar_bounds

        def filled(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.float64, device=device)

        names = ("nats", "noise", "passive", "clamped", "first", "second", "third", "fourth", "neighbors")
        self._images = filled(0.0)
        self._sums = {name: filled(0.0, channels) for name in names}
        self._products = filled(0.0, channels, channels)
        self._histogram = filled(0.0, channels, HISTOGRAM_BINS)
        self._highest, self._lowest = filled(-math.inf, channels), filled(math.inf, channels)
        self._highest_logvar = filled(-math.inf, channels)
        self._position_sums: Tensor | None = None  # (3, c, h, w): mean, its square and variance, summed over images

    @torch.no_grad()
    def add(self, mean: Tensor, logvar: Tensor) -> None:
        """Add the posteriors of some images, both (n, c, h, w).

        Raises:
            ValueError: another height or width than before; positions are compared between images.
        """
        mean, logvar = mean.detach().double(), logvar.detach().double()
        if self._position_sums is None:
            self._position_sums = torch.zeros(3, *mean.shape[1:], dtype=torch.float64, device=mean.device)
        if self._position_sums.shape[1:] != mean.shape[1:]:
            before, now = tuple(self._position_sums.shape[1:]), tuple(mean.shape[1:])
            raise ValueError(f"PosteriorStatistics: latents of {now} after {before}; give images of one size")
        self._images += len(mean)
        variance, squares = logvar.exp(), mean.square()
        low, high = self.logvar_bounds
        values = {
            "nats": 0.5 * (squares + variance - 1.0 - logvar),
            "noise": variance,
            "passive": variance > PASSIVE_VARIANCE,
            "clamped": (logvar < low + CLAMP_MARGIN) | (logvar > high - CLAMP_MARGIN),
            "first": mean,
            "second": squares,
            "third": squares * mean,
            "fourth": squares.square(),
        }
        for name, value in values.items():
            self._sums[name] += value.sum(dim=(0, 2, 3), dtype=torch.float64)
        across = (mean[..., :-1] * mean[..., 1:]).sum(dim=(0, 2, 3))
        down = (mean[..., :-1, :] * mean[..., 1:, :]).sum(dim=(0, 2, 3))
        self._sums["neighbors"] += across + down
        rows = mean.transpose(0, 1).flatten(1)
        self._products += rows @ rows.T
        self._position_sums += torch.stack([value.sum(dim=0) for value in (mean, squares, variance)])
        self._highest = torch.maximum(self._highest, mean.amax(dim=(0, 2, 3)))
        self._lowest = torch.minimum(self._lowest, mean.amin(dim=(0, 2, 3)))
        self._highest_logvar = torch.maximum(self._highest_logvar, logvar.amax(dim=(0, 2, 3)))
        share = (logvar - HISTOGRAM_LOW) / (HISTOGRAM_HIGH - HISTOGRAM_LOW)
        bins = (share * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1).transpose(0, 1).flatten(1)
        self._histogram.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float64))

    def all_reduce(self, reduce: ReduceFunction) -> None:
        """Combine processes: `reduce(tensor, "sum" | "max" | "min")` returns the tensor over all of them.

        Every process must have added at least one image of the same size.
        """
        assert self._position_sums is not None, "all_reduce before the first add"
        self._images = reduce(self._images, "sum")
        self._sums = {name: reduce(value, "sum") for name, value in self._sums.items()}
        self._products = reduce(self._products, "sum")
        self._histogram = reduce(self._histogram, "sum")
        self._position_sums = reduce(self._position_sums, "sum")
        self._highest, self._lowest = reduce(self._highest, "max"), reduce(self._lowest, "min")
        self._highest_logvar = reduce(self._highest_logvar, "max")

    @property
    def deterministic(self) -> bool:
        """Whether every log-variance is at the lower clamp of -30: no noise, so no rate."""
        return bool((self._highest_logvar <= NO_NOISE_LOGVAR).all())

    def result(self) -> dict[str, list[float]]:
        """Per channel, lists of c numbers. Units: nats and bits per latent dimension; variances are of raw latents.

        `nats` is KL_c, `mean` m_c, `variance` v_c = Var(mu), `noise` e_c = E[sigma^2], `snr` v/e, `capacity_bits`
        0.5 log2(1 + snr), `marginal_nats` the KL of a Gaussian aggregate over images and positions,
        `information_nats` nats minus the same KL at each position: the information of z about the image if the
        position is known. The rest of nats - marginal_nats is the information about the position alone.
        `image_variance` A_c = E_positions Var_images(mu), `static_share` 1 - A_c / v_c, `passive_share`,
        `clamp_share`, `hot_sigmas` max |mu - m| / sqrt(v), `skewness`, `kurtosis` (excess), `neighbour_correlation`.
        """
        assert self._position_sums is not None, "no posterior was added"
        height, width = self._position_sums.shape[-2:]
        count = self._images * height * width
        sums = {name: value / count for name, value in self._sums.items()}
        m, e = sums["first"], sums["noise"]
        v = (sums["second"] - m.square()).clamp_min(0.0)
        safe = v.clamp_min(1e-20)
        third = sums["third"] - 3 * m * sums["second"] + 2 * m**3
        fourth = sums["fourth"] - 4 * m * sums["third"] + 6 * m.square() * sums["second"] - 3 * m**4
        by_position = self._position_sums / self._images
        between_images = (by_position[1] - by_position[0].square()).clamp_min(0.0)
        image_variance = between_images.mean(dim=(1, 2))
        pairs = self._images * (height * (width - 1) + (height - 1) * width)
        neighbors = self._sums["neighbors"] / pairs.clamp_min(1) - m.square()
        marginal = 0.5 * (m.square() + v + e - 1 - (v + e).clamp_min(1e-20).log())
        unbiased = self._images / (self._images - 1).clamp_min(1)  # the mean is over the same few images
        spread = unbiased * between_images + by_position[2]
        at_positions = 0.5 * (by_position[1] + by_position[2] - 1 - spread.clamp_min(1e-20).log()).mean(dim=(1, 2))
        farthest = torch.maximum(self._highest - m, m - self._lowest)
        alive = v > 1e-12
        found = {
            "nats": sums["nats"],
            "mean": m,
            "variance": v,
            "noise": e,
            "snr": v / e.clamp_min(1e-20),
            "capacity_bits": 0.5 * torch.log2(1 + v / e.clamp_min(1e-20)),
            "marginal_nats": marginal,
            "information_nats": sums["nats"] - at_positions,
            "image_variance": image_variance,
            "static_share": torch.where(alive, 1 - image_variance / safe, 0.0),
            "passive_share": sums["passive"],
            "clamp_share": sums["clamped"],
            "hot_sigmas": torch.where(alive, farthest / safe.sqrt(), 0.0),
            "skewness": torch.where(alive, third / safe**1.5, 0.0),
            "kurtosis": torch.where(alive, fourth / safe.square() - 3, 0.0),
            "neighbour_correlation": torch.where(alive, neighbors / safe, 0.0),
        }
        return {name: value.tolist() for name, value in found.items()}

    def summary(self) -> dict[str, float]:
        """Over all channels: `nats` per dimension, `median_logvar`, `noise_share` (mean of e / (v + e)), `images`."""
        channels = self.result()
        shares = [e / max(v + e, 1e-20) for v, e in zip(channels["variance"], channels["noise"])]
        cumulative = self._histogram.sum(dim=0).cumsum(0)
        index = int((cumulative < 0.5 * cumulative[-1]).sum())
        width = (HISTOGRAM_HIGH - HISTOGRAM_LOW) / HISTOGRAM_BINS
        return {
            "images": float(self._images),
            "nats": sum(channels["nats"]) / self.channels,
            "median_logvar": HISTOGRAM_LOW + (index + 0.5) * width,
            "noise_share": sum(shares) / self.channels,
        }

    def correlation(self, channels: list[int] | None = None) -> Tensor:
        """The correlation of posterior means between channels (or some of them), (c, c) float64 on the CPU.

        A channel without variance correlates with nothing.
        """
        assert self._position_sums is not None, "no posterior was added"
        count = self._images * self._position_sums[0, 0].numel()
        m = self._sums["first"] / count
        covariance = (self._products / count - torch.outer(m, m)).cpu()
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        scale = torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0.0)
        correlation = covariance * torch.outer(scale, scale)
        correlation.fill_diagonal_(1.0)
        return correlation if channels is None else correlation[channels][:, channels]


def effective_rank(correlation: Tensor) -> float:
    """exp(entropy of the eigenvalues) of a correlation matrix (c, c), between 1 and c. Roy & Vetterli 2007."""
    weights = torch.linalg.eigvalsh(correlation).clamp_min(0)
    weights = weights / weights.sum()
    return float(torch.exp(-(weights * weights.clamp_min(1e-30).log()).sum()))


@torch.no_grad()
def batch_health(mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """Scalar float32 tensors for the log of a training step, from posteriors (n, c, h, w); no host sync.

    `health/least_channel_nats` KL of the quietest channel; `health/dead_channels` their number by the rule of the
    report, on this batch; `health/passive_share` positions with posterior variance above 0.9; `health/median_logvar`;
    `health/hottest_sigmas` the largest |mu - m| / sqrt(v) over channels; `health/noise_share` mean of e / (v + e).
    """
    mean, logvar = mean.detach().float(), logvar.detach().float()
    limits = RULES["dead_channel"].limits
    dims = (0, 2, 3)
    variance = logvar.exp()
    nats = kl_divergence(mean, logvar).mean(dim=dims)
    passive = (variance > PASSIVE_VARIANCE).float().mean(dim=dims)
    by_image = mean.var(dim=0, unbiased=False).mean(dim=(1, 2))
    spread, noise = mean.var(dim=dims, unbiased=False), variance.mean(dim=dims)
    farthest = (mean - mean.mean(dim=dims, keepdim=True)).abs().amax(dim=dims)
    still = (by_image < _fail(limits["image_variance"])) | (passive > _fail(limits["passive_share"]))
    dead = (nats < _fail(limits["nats"])) & still
    return {
        "health/least_channel_nats": nats.min(),
        "health/dead_channels": dead.float().sum(),
        "health/passive_share": passive.mean(),
        "health/median_logvar": logvar.flatten().median(),
        "health/hottest_sigmas": torch.where(spread > 1e-12, farthest / spread.clamp_min(1e-12).sqrt(), 0.0).max(),
        "health/noise_share": (noise / (spread + noise).clamp_min(1e-20)).mean(),
    }


def _fail(limit: Any) -> float:
    assert limit.fail is not None
    return float(limit.fail)


def training_alarms(
    metrics: dict[str, float],
    *,
    rate_mode: str,
    target_nats: float | None,
    beta: float | None,
    pinned_share: float,
    locked: bool,
    steps: int,
) -> list[Verdict]:
    """Alarms from the averaged metrics of some steps, most severe first. A pure function.

    Call it on log steps after the warmup: an untrained encoder uses no bits for some hundred steps, which resembles a
    collapse. Missing and non-finite metrics raise no alarm.

    Args:
        metrics: `rate/nats_per_dim` and the keys of `batch_health`.
        rate_mode: `RateConfig.mode`; the target is checked in mode `target` only.
        beta: the current weight; 0 switches the KL off.
        pinned_share: `RateController.pinned_share`.
        locked: whether beta is frozen, so that the rate should sit at its target.
        steps: steps of the run; with fewer than `SHORT_RUN`, a missed rate raises no alarm.
    """
    nats = _finite(metrics.get("rate/nats_per_dim"))
    target = target_nats if rate_mode == "target" else None
    long_enough = severity_of_rate(steps) is None
    error = abs(nats - target) / target if target and nats is not None else None
    found = [
        check_rule(
            "rate_unreachable", {"pinned_share": pinned_share if target and long_enough else None}, training=True
        ),
        check_rule("posterior_collapse", {"nats": nats}, training=True),
    ]
    if found[1] is None:
        if (_finite(metrics.get("health/dead_channels")) or 0.0) >= 0.5:  # an average over steps and processes
            found.append(check_rule("dead_channel", {"nats": _finite(metrics.get("health/least_channel_nats"))}))
        met = error is not None and error < 0.15  # a rate under control is not inactive, however high it is
        if beta != 0.0 and not met:
            logvar = _finite(metrics.get("health/median_logvar"))
            found.append(check_rule("kl_inactive", {"median_logvar": logvar, "nats": nats}, training=True))
        hottest = _finite(metrics.get("health/hottest_sigmas"))
        found.append(check_rule("smuggling", {"hot_sigmas": hottest}, training=True))
        if locked and long_enough and found[0] is None:
            found.append(check_rule("rate_miss", {"relative_error": error}, training=True))
    return by_severity(verdict for verdict in found if verdict)


def severity_of_rate(steps: int | None) -> Severity | None:
    """The severity of a missed target rate: `info` after a short run, else None, as in the table."""
    return "info" if steps is not None and steps < SHORT_RUN else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# The verdicts of the health report: a frozen table of limits, each with its likely cause and the setting to change.

Severity = Literal["fail", "warn", "info"]
SEVERITIES: tuple[Severity, ...] = ("fail", "warn", "info")


@dataclass(frozen=True)
class Verdict:
    """One finding: a metric beyond its threshold (or a statement, if both are equal), its cause and its cure."""

    name: str
    severity: Severity
    metric: str
    value: float
    threshold: float
    channel: int | None
    cause: str
    knob: str

    def sentence(self) -> str:
        """One line: the finding, its distance from the threshold, the cause, and the cure."""
        return f"{self.name} ({self.severity}): {self.finding()}. {_sentence(self.cause)} Try: {self.knob}."

    def finding(self) -> str:
        """Metric, value and threshold, as `channel 2, KL in nats per dimension: 0.001, below 0.02`."""
        where = "" if self.channel is None else f"channel {self.channel}, "
        relation = "above" if self.value > self.threshold else "below" if self.value < self.threshold else "at"
        return f"{where}{self.metric}: {self.value:.4g}, {relation} {self.threshold:.4g}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the sentence."""
        return asdict(self) | {"sentence": self.sentence()}


@dataclass(frozen=True)
class Limit:
    """The limits of one metric: `fail`, `warn` and `info` are crossed from below, or from above with `below`."""

    metric: str
    fail: float | None = None
    warn: float | None = None
    info: float | None = None
    below: bool = False

    def crossed(self, value: float | None) -> tuple[Severity, float] | None:
        """The most severe crossed threshold; None if none is crossed, or the value is None or NaN."""
        if value is None:
            return None
        for severity in SEVERITIES:
            threshold: float | None = getattr(self, severity)
            if threshold is not None and (value < threshold if self.below else value > threshold):
                return severity, threshold
        return None


@dataclass(frozen=True)
class Rule:
    """A verdict's limits by metric key, its likely cause and the setting to change."""

    limits: Mapping[str, Limit]
    cause: str
    knob: str


def _rule(cause: str, knob: str, **limits: Limit) -> Rule:
    return Rule(MappingProxyType(limits), cause, knob)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "rate_unreachable": _rule(
            "the controller's weight sat at its bound while the KL missed the target: no weight gives this rate here",
            "change rate.target_nats, raise autoencoder.latent_channels, or train longer",
            pinned_share=Limit("share of the steps with beta at a bound and the target missed", fail=0.05),
        ),
        "posterior_collapse": _rule(
            "the latents say nothing about the image: the KL outweighs reconstruction, or training has hardly begun",
            "lower rate.beta, or set rate.mode=target; check that the reconstruction loss reaches the encoder",
            nats=Limit("mean KL in nats per dimension", fail=0.05, below=True),
            permutation=Limit("error with latents of other images, relative to the right ones", fail=1.05, below=True),
        ),
        "dead_channel": _rule(
            "the posterior of this channel equals the prior for every image",
            "raise rate.target_nats, set rate.mode=free_bits, or lower autoencoder.latent_channels",
            nats=Limit("KL in nats per dimension", fail=0.02, below=True),
            image_variance=Limit("variance of the mean over images", fail=0.01, below=True),
            passive_share=Limit("share of positions with posterior variance above 0.9", fail=0.95),
            dead_share=Limit("share of dead channels from which a dead channel fails, with more than 4", fail=0.25),
        ),
        "ignored_channel": _rule(
            "bits are spent on this channel and the decoder does not look at it",
            "train longer, lower autoencoder.latent_channels, or check the decoder's first layer",
            capacity_bits=Limit("capacity in bits per position", warn=0.3),
            decoder_use=Limit("effect of exchanging the channel between images", warn=0.002, below=True),
        ),
        "static_channel": _rule(
            "the channel encodes the position in the image or a constant, not the image",
            "train on random crops, check the padding, or lower autoencoder.latent_channels",
            static_share=Limit("share of the variance that is the same for all images", warn=0.9),
        ),
        "redundant": _rule(
            "channels repeat each other",
            "lower autoencoder.latent_channels, or train longer",
            effective_rank=Limit("effective rank of the channels' correlation, per channel", warn=0.6, below=True),
            correlation=Limit("largest correlation between two channels", warn=0.95),
        ),
        "kl_inactive": _rule(
            "this is a deterministic autoencoder in practice: the KL weight has no effect",
            "set rate.mode=target with rate.target_nats of 1.5 to 3.5, or raise rate.beta",
            median_logvar=Limit("median log-variance of the posterior", fail=-10.0, below=True),
            nats=Limit("mean KL in nats per dimension", fail=6.0),
        ),
        "clamped": _rule(
            "the encoder pushes the log-variance against its bound, where the gradient vanishes",
            "lower the floor (it follows rate.target_nats), or train with a lower learning rate",
            clamp_share=Limit("share of log-variances within 0.1 of a bound", warn=0.01),
        ),
        "smuggling": _rule(
            "single latent positions carry something global, as the gain of a normalization layer (SD's black spot)",
            "use autoencoder.architecture=wavelet (no GroupNorm), clip gradients, or lower the learning rate",
            hot_sigmas=Limit("largest distance from the channel's mean in standard deviations", warn=8.0, fail=12.0),
            tail_share=Limit("share of the channel's energy in 0.1 % of the positions", warn=0.05, fail=0.10),
        ),
        "rate_miss": _rule(
            "the run was short, its loss changed near the end, or these images differ from those of the training",
            "more steps, a change of loss before the last fifth, a higher rate.integral_gain, or other images",
            relative_error=Limit("distance from the target rate, relative to it", warn=0.05, fail=0.15),
        ),
        "brittle_decoder": _rule(
            "the decoder reacts strongly to latents slightly off the posterior mean",
            "train on posterior samples to the end, lower rate.target_nats, or polish the decoder with latent noise",
            gap_db=Limit("PSNR of decode(mean) over decode(sample) in dB", warn=1.0),
            tolerance=Limit("noise that costs 1 dB, in posterior standard deviations", warn=0.5, below=True),
        ),
        "worse_than_linear": _rule(
            "as many principal components of the pixel blocks at the same rate describe these images better",
            "train longer, set autoencoder.linear_path=true to start from them, or lower autoencoder.latent_channels",
            linear_margin_db=Limit("PSNR over the block KLT of equal channels and rate in dB", warn=-0.5, below=True),
        ),
        "near_linear": _rule(
            "the network has learned little beyond as many principal components of the pixel blocks at the same rate",
            "train longer, at a higher learning rate, or with a larger preset",
            linear_margin_db=Limit("PSNR over the block KLT of equal channels and rate in dB", warn=1.0, below=True),
        ),
        "prior_hole": _rule(
            "the prior N(0, 1) is not where the latents are; expected at a high rate, and a diffusion model handles it",
            "nothing, unless you sample the prior directly; then lower rate.target_nats",
            cycle_ratio=Limit("round-trip error of prior samples, relative to posterior samples", info=3.0),
        ),
        "non_gaussian": _rule(
            "the marginal distribution of this channel is skewed or heavy-tailed",
            "standardize per channel (the latent shards do); an arcsinh before diffusion helps with heavy tails",
            skewness=Limit("size of the skewness", info=1.0),
            kurtosis=Limit("excess kurtosis", info=3.0),
        ),
        "grid": _rule(
            "the decoder leaves a pattern on constant color, as pixel-shuffle and strided heads do",
            "use nearest-neighbor upsampling with convolutions (autoencoder.architecture=wavelet), or train longer",
            flat_std=Limit("standard deviation on a constant image", warn=0.004),
            harmonics=Limit("power at the harmonics of the stride, relative to their neighbors", warn=5.0),
        ),
        "border": _rule(
            "the outer pixels are reconstructed worse than the rest, as zero padding does",
            "use replicated or reflected padding, or train on larger crops",
            border_ratio=Limit("squared error of the outer 8 pixels, relative to the rest", warn=1.5),
        ),
    }
)

TRAINING_LIMITS: Mapping[tuple[str, str], Limit] = MappingProxyType(
    {
        # In one batch of crops, a channel's deviation is estimated from few images: a smooth batch with one bright
        # object
        # has a high ratio. The rate depends on the content.
        ("smuggling", "hot_sigmas"): replace(RULES["smuggling"].limits["hot_sigmas"], warn=12.0, fail=20.0),
        ("rate_miss", "relative_error"): replace(RULES["rate_miss"].limits["relative_error"], warn=0.10, fail=0.25),
    }
)
"""Limits for one training batch that differ from those of the report."""


def check_rule(
    name: str,
    values: Mapping[str, float | None],
    channel: int | None = None,
    severity: Severity | None = None,
    training: bool = False,
) -> Verdict | None:
    """The verdict `name` if a metric in `values` crosses its limit, by the most severe one; else None.

    `severity` replaces the table's; `training` takes the limits for one batch.
    """
    rule = RULES[name]
    found: list[Verdict] = []
    for key, value in values.items():
        limit = TRAINING_LIMITS.get((name, key), rule.limits[key]) if training else rule.limits[key]
        crossed = limit.crossed(value)
        if crossed and value is not None:
            found.append(
                Verdict(
                    name, severity or crossed[0], limit.metric, float(value), crossed[1], channel, rule.cause, rule.knob
                )
            )
    return min(found, key=lambda verdict: SEVERITIES.index(verdict.severity), default=None)


def by_severity(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Failures first, then warnings, then information; each in the order of the table."""
    names = list(RULES)

    def place(verdict: Verdict) -> tuple[int, int, int]:
        channel = -1 if verdict.channel is None else verdict.channel
        return SEVERITIES.index(verdict.severity), names.index(verdict.name), channel

    return sorted(verdicts, key=place)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
