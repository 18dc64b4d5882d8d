"""The figures of one score on labelled images, and of all of them; nothing here knows a model or a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldm_vae.applications.anomaly import curves
from ldm_vae.applications.anomaly.complexity import matched_auroc, partial_rank_correlation, rank_correlation
from ldm_vae.applications.anomaly.labelled import NORMAL
from ldm_vae.applications.anomaly.scores import base, title

PNG_SIZE = "png_size"
"""Reported as if it were a score: what complexity alone does."""
STANDS_OUT = 1.5
"""Times the error around a defect, from which on it does not count as reconstructed."""
FEW_FOUND = 0.25
"""Share of the anomalous images: a few odd normal images set the threshold high, however well the ranks look."""
CLEARLY_BETTER = 0.05
"""Of an AUROC over another."""


@dataclass
class Table:
    """Everything measured of labelled images, one entry per image.

    Args:
        values: score -> its values. maps: quantity -> heat maps (h, w) float32, only where masks are known.
        masks: bool on the grid of the heat maps; empty where none is known.
        inside, outside: mean L1 within and around the mask of each anomalous image that has one.
    """

    ids: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    png_bytes: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    maps: dict[str, list[np.ndarray]] = field(default_factory=dict)
    masks: list[np.ndarray] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)

    @property
    def anomalous(self) -> np.ndarray:
        """bool (n,)."""
        return np.array([kind != NORMAL for kind in self.kinds])


def figures(table: Table, thresholds: dict[str, float], prevalence: float) -> dict[str, dict[str, Any]]:
    """Score -> its figures; those of the size of the PNG are the last."""
    found = {name: _of_score(table, name, thresholds[name], prevalence) for name in table.values}
    size = np.log(np.array(table.png_bytes, np.float64))
    found[PNG_SIZE] = {"title": "size of the PNG alone"} | _separation(size, table.anomalous, prevalence)
    return found


def _of_score(table: Table, name: str, threshold: float, prevalence: float) -> dict[str, Any]:
    values, anomalous = np.array(table.values[name]), table.anomalous
    size = np.array(table.png_bytes, np.float64)
    matched, share = matched_auroc(values[~anomalous], values[anomalous], size[~anomalous], size[anomalous])
    found = {"title": title(name), **_separation(values, anomalous, prevalence)}
    found |= {
        "matched_auroc": matched,
        "matched_share": share,
        "png_correlation": rank_correlation(values[~anomalous], size[~anomalous]),
        "label_correlation": rank_correlation(values, anomalous),
        "label_correlation_given_png": partial_rank_correlation(values, anomalous, size),
        "threshold": threshold,
        "false_positive_rate": float((values[~anomalous] > threshold).mean()),
        "true_positive_rate": float((values[anomalous] > threshold).mean()),
        "aupro": None,
    }
    if table.masks and name in table.maps:
        found["aupro"] = curves.pixel_aupro(table.maps[name], table.masks)
    kinds = sorted({kind for kind in table.kinds if kind != NORMAL})
    if len(kinds) > 1:
        of_kind = np.array(table.kinds)
        found["kinds"] = {kind: curves.auroc(values[~anomalous], values[of_kind == kind]) for kind in kinds}
    return found


def _separation(values: np.ndarray, anomalous: np.ndarray, prevalence: float) -> dict[str, float]:
    normal, others = values[~anomalous], values[anomalous]
    low, high = curves.auroc_interval(normal, others)
    return {
        "auroc": curves.auroc(normal, others),
        "auroc_low": low,
        "auroc_high": high,
        "aupr": curves.average_precision(normal, others, prevalence),
        "false_positive_rate_at_95": curves.false_positive_rate_at(normal, others),
    }


def reason(name: str, found: dict[str, dict[str, Any]], error_ratio: float | None) -> str:
    """What became of a score and, where it fails, why: one sentence from the measured figures.

    Args:
        found: of all scores, as `figures` gives them.
        error_ratio: mean L1 within the masks over that around them; None where no mask is known.
    """
    score, size = found[name], found[PNG_SIZE]
    low, high = score["auroc_low"], score["auroc_high"]
    if high < 0.5:
        return _inverted(score, size)
    if low <= 0.5:
        return _blind(name, found, error_ratio)
    few = ", but finds few of them at its threshold" if score["true_positive_rate"] < FEW_FOUND else ""
    matched = score["matched_auroc"]
    if matched is not None and matched < 0.5 + 0.5 * (score["auroc"] - 0.5):
        return (
            f"separates, largely by complexity: AUROC {score['auroc']:.2f} falls to {matched:.2f} against normal "
            f"images of about the same PNG size{few}"
        )
    strength = "weakly" if score["auroc"] < 0.7 else "well" if score["auroc"] >= 0.9 else "partly"
    return f"separates {strength}{'' if matched is None else ', not by complexity'}{few}"


def _inverted(score: dict[str, Any], size: dict[str, Any]) -> str:
    correlation = score["png_correlation"]
    simpler, richer = size["auroc_high"] < 0.5, size["auroc_low"] > 0.5
    if correlation is not None and ((correlation > 0.3 and simpler) or (correlation < -0.3 and richer)):
        what = "simple" if correlation > 0 else "complex"
        return (
            f"fails: it ranks {what} images as normal (its correlation with the PNG size shows it), and the anomalous "
            f"ones are {'simpler' if simpler else 'more complex'} here"
        )
    return "fails: it finds the anomalous images more normal than the normal ones"


def _blind(name: str, found: dict[str, dict[str, Any]], error_ratio: float | None) -> str:
    """Why a score cannot tell the images apart."""
    peak = found.get(f"{name}_peak")
    if peak is not None and peak["auroc_low"] > 0.5 and peak["auroc"] > found[name]["auroc"] + CLEARLY_BETTER:
        return (
            f"fails: the anomalies are too small for a mean over the image (AUROC {found[name]['auroc']:.2f}; its peak "
            f"has {peak['auroc']:.2f})"
        )
    if base(name) in ("l1", "ms_ssim", "perceptual", "elbo"):
        if error_ratio is None:
            return "fails: the autoencoder reconstructs the anomalies as well as normal images"
        if error_ratio < STANDS_OUT:
            return (
                "fails: the autoencoder reconstructs the anomalies too; its L1 within the defects is "
                f"{error_ratio:.1f} times that around them"
            )
        return (
            f"fails: the defects stand out in their image (L1 within them is {error_ratio:.1f} times that around), but "
            "normal images have places that are reconstructed as badly, such as edges and textures"
        )
    if name == "regret":
        return "fails: the encoder serves the anomalies as well as normal images"
    if base(name).startswith("flow"):
        return "fails: the diffusion model explains the latents of the anomalies as well as those of normal images"
    return "fails: the latents of the anomalies are as usual as those of normal images"
