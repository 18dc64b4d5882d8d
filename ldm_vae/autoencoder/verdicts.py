"""The verdicts of the health report: one frozen table of limits, each with its likely cause and the knob to turn.

Owns words and thresholds. What is measured lives in `health.py` (posteriors) and in `ldm_vae.evaluation` (the decoder);
docs/health.md explains every quantity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

Severity = Literal["fail", "warn", "info"]
SEVERITIES: tuple[Severity, ...] = ("fail", "warn", "info")


@dataclass(frozen=True)
class Verdict:
    """One finding: a metric beyond its threshold (or a statement, where both are equal), its cause and its cure."""

    name: str
    severity: Severity
    metric: str
    value: float
    threshold: float
    channel: int | None
    cause: str
    knob: str

    def sentence(self) -> str:
        """One line: what was found, how far beyond the threshold, why, and what to do."""
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
    """What one metric may be: `fail`, `warn` and `info` are crossed from below, or from above with `below`."""

    metric: str
    fail: float | None = None
    warn: float | None = None
    info: float | None = None
    below: bool = False

    def crossed(self, value: float | None) -> tuple[Severity, float] | None:
        """The most severe crossed threshold; None where nothing is crossed, or the value is None or NaN."""
        if value is None:
            return None
        for severity in SEVERITIES:
            threshold: float | None = getattr(self, severity)
            if threshold is not None and (value < threshold if self.below else value > threshold):
                return severity, threshold
        return None


@dataclass(frozen=True)
class Rule:
    """A verdict's limits by metric key, its likely cause and the knob to turn."""

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
            "single latent positions carry something global, as the gain of a normalisation layer (SD's black spot)",
            "use architecture=wavelet (no GroupNorm), clip gradients, or lower the learning rate",
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
        "prior_hole": _rule(
            "the prior N(0, 1) is not where the latents are; expected at a high rate, and a diffusion model handles it",
            "nothing, unless you sample the prior directly; then lower rate.target_nats",
            cycle_ratio=Limit("round-trip error of prior samples, relative to posterior samples", info=3.0),
        ),
        "non_gaussian": _rule(
            "the marginal distribution of this channel is skewed or heavy-tailed",
            "standardise per channel (the latent shards do); an arcsinh before diffusion helps with heavy tails",
            skewness=Limit("size of the skewness", info=1.0),
            kurtosis=Limit("excess kurtosis", info=3.0),
        ),
        "grid": _rule(
            "the decoder leaves a pattern on constant colour, as pixel-shuffle and strided heads do",
            "use nearest-neighbour upsampling with convolutions (architecture=wavelet), or train longer",
            flat_std=Limit("standard deviation on a constant image", warn=0.004),
            harmonics=Limit("power at the harmonics of the stride, relative to their neighbours", warn=5.0),
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
        # One batch of crops: a channel's deviation is estimated from few images, so a calm batch with one bright thing
        # has a high ratio, and the rate moves with the content.
        ("smuggling", "hot_sigmas"): replace(RULES["smuggling"].limits["hot_sigmas"], warn=12.0, fail=20.0),
        ("rate_miss", "relative_error"): replace(RULES["rate_miss"].limits["relative_error"], warn=0.10, fail=0.25),
    }
)
"""Where a limit for one training batch differs from that of the report."""


def judge(
    name: str,
    values: Mapping[str, float | None],
    channel: int | None = None,
    severity: Severity | None = None,
    training: bool = False,
) -> Verdict | None:
    """The verdict `name` if any of its metrics in `values` crosses its limit, by the most severe one; else None.

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


def in_order(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Failures first, then warnings, then information; the table's order within."""
    names = list(RULES)

    def place(verdict: Verdict) -> tuple[int, int, int]:
        channel = -1 if verdict.channel is None else verdict.channel
        return SEVERITIES.index(verdict.severity), names.index(verdict.name), channel

    return sorted(verdicts, key=place)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
