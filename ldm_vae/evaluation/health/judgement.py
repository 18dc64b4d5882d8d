"""From the figures of a health report to its verdicts: which rule looks at what, and which finding explains another.

Owns the precedence: a cause suppresses its symptoms, so that one fault gives one verdict. Thresholds and words are
those of `ldm_vae.autoencoder.verdicts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_vae.autoencoder.verdicts import RULES, Severity, Verdict, in_order, judge

Figures = Mapping[str, Any]

PLAIN = "trained with beta = 0: a plain autoencoder"
COSTS_FIDELITY = frozenset(
    ("dead_channel", "ignored_channel", "static_channel", "redundant", "smuggling", "brittle_decoder", "border")
)
"""A code with one of these has less than its channels to describe an image with, or a decoder that is off: that it is
worse than a linear one follows."""
ELSEWHERE = 0.2
"""A hot position with no more of its effect on the image elsewhere describes its own place."""
DETERMINISTIC = "deterministic autoencoder, no rate"


def verdicts(figures: Figures, training: Figures) -> list[Verdict]:
    """All findings, most severe first.

    Args:
        figures: what `diagnosis.measure` returns; None stands for a quantity that does not apply.
        training: the `rate` record of training.json (`mode`, `target_nats`, `final_beta`, `pinned_share`), or empty.
    """
    rate, decoder = figures["rate"], figures["decoder"]
    unreachable = judge("rate_unreachable", {"pinned_share": _pinned_share(training)})
    collapse = judge("posterior_collapse", {"nats": rate["nats_per_dim"], "permutation": decoder["permutation"]})
    inactive = _kl_inactive(rate, training)
    if collapse:  # everything else that could be said about the latents or the picture follows from it
        statement = inactive if inactive and inactive.severity == "info" else None
        return in_order(verdict for verdict in (unreachable, collapse, statement) if verdict)
    found = [unreachable, inactive]
    if unreachable is None:
        found.append(judge("rate_miss", {"relative_error": relative_error(rate["nats_per_dim"], training)}))
    plain = inactive is not None and inactive.severity == "info"  # then nothing keeps the log-variance off its bound
    found += [v for v in _channel_verdicts(figures) if v and not (plain and v.name == "clamped")]
    found.append(judge("redundant", {key: figures["latents"][key] for key in ("effective_rank", "correlation")}))
    found.append(judge("brittle_decoder", {key: decoder[key] for key in ("gap_db", "tolerance")}))
    found.append(judge("prior_hole", {"cycle_ratio": decoder["cycle_ratio"]}))
    visible = decoder["flat_std"] is not None and decoder["flat_std"] > 0.001  # an eighth of one 8-bit level
    harmonics = decoder["harmonics"] if visible else None
    found.append(judge("grid", {"flat_std": decoder["flat_std"], "harmonics": harmonics}))
    found.append(judge("border", {"border_ratio": decoder["border_ratio"]}))
    if not any(verdict and verdict.name in COSTS_FIDELITY and verdict.severity != "info" for verdict in found):
        found.append(judge("worse_than_linear", {"linear_margin_db": decoder["linear_margin_db"]}))
    return in_order(verdict for verdict in found if verdict)


def relative_error(nats: float | None, training: Figures) -> float | None:
    """|nats - target| / target for a training with a target rate; None for any other."""
    target = training.get("target_nats")
    if nats is None or training.get("mode") != "target" or not target:
        return None
    return abs(nats - target) / target


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


def _channel_verdicts(figures: Figures) -> list[Verdict | None]:
    dead = dead_channels(figures)
    count = len(figures["channels"])
    many = RULES["dead_channel"].limits["dead_share"].crossed(len(dead) / count)
    severity: Severity = "fail" if count <= 4 or many else "warn"
    found: list[Verdict | None] = []
    for index, channel in enumerate(figures["channels"]):
        if index in dead:
            keys = ("nats", "image_variance", "passive_share")
            found.append(judge("dead_channel", {key: channel[key] for key in keys}, index, severity))
            continue
        smuggling = _smuggling(channel, index)
        static = judge("static_channel", {"static_share": channel["static_share"]}, index)
        if smuggling:  # a hot position that never moves makes most of the variance the same for all images
            static = None
        found += [smuggling, static, judge("clamped", {"clamp_share": channel["clamp_share"]}, index)]
        capacity = RULES["ignored_channel"].limits["capacity_bits"]
        spends = channel["capacity_bits"] is None or capacity.crossed(channel["capacity_bits"])
        if spends and not static and not smuggling:  # exchanging what is the same for all images changes nothing
            found.append(judge("ignored_channel", {"decoder_use": channel["decoder_use"]}, index))
        if not smuggling and not static:
            shape = {"skewness": abs(channel["skewness"]), "kurtosis": channel["kurtosis"]}
            found.append(judge("non_gaussian", shape, index))
    return found


def _smuggling(channel: Mapping[str, Any], index: int) -> Verdict | None:
    """Hot alone is no fault: a sharp edge is rare in the pixels too. It is one where it is about another place."""
    reach = channel["hot_reach"]
    if reach is not None and reach <= ELSEWHERE:
        return None
    return judge("smuggling", {key: channel[key] for key in ("hot_sigmas", "tail_share")}, index)


def _kl_inactive(rate: Figures, training: Figures) -> Verdict | None:
    """A failure, unless no rate was wanted: then a statement."""
    limit = RULES["kl_inactive"].limits["median_logvar"]
    assert limit.fail is not None
    if rate["deterministic_by_design"]:
        knob = "nothing, if it was meant to be; its latents take any scale, so normalise them before diffusion"
        return Verdict(
            "kl_inactive", "info", limit.metric, rate["median_logvar"], limit.fail, None, DETERMINISTIC, knob
        )
    found = judge("kl_inactive", {"median_logvar": rate["median_logvar"], "nats": rate["nats_per_dim"]})
    if training.get("mode") == "fixed" and training.get("final_beta") == 0:
        knob = "nothing, if it was meant to be; rate.mode=target gives a rate"
        return Verdict("kl_inactive", "info", limit.metric, rate["median_logvar"], limit.fail, None, PLAIN, knob)
    return found


def _pinned_share(training: Figures) -> float | None:
    share = training.get("pinned_share")
    return float(share) if share is not None and training.get("mode") == "target" else None
