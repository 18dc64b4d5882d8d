"""How well a score tells anomalous from normal: known figures of ranked lists, exact where values are equal.

A score is higher for what is more anomalous. `normal` (n,) and `anomalous` (m,) are its values on images of each kind.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ldm_vae.random import numpy_rng

RESAMPLES = 1000
HIGHEST_PIXEL_RATE = 0.3


def auroc(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """The chance that an anomalous image scores higher than a normal one; 0.5 says nothing."""
    below, up_to = _ranks(normal, anomalous)
    return float((below + up_to).mean() / (2 * len(normal)))


def _ranks(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many normal images score lower than each anomalous one, and not higher, (m,)."""
    ordered = np.sort(normal)
    return np.searchsorted(ordered, anomalous, side="left"), np.searchsorted(ordered, anomalous, side="right")


def auroc_interval(normal: np.ndarray, anomalous: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval, normal and anomalous images drawn apart."""
    rng = numpy_rng(0, "anomaly bootstrap")
    sizes = (len(anomalous), len(normal))
    rows, columns = (rng.multinomial(size, np.full(size, 1 / size), RESAMPLES) / size for size in sizes)
    share = np.cumsum(columns[:, np.argsort(normal)], axis=1)
    share = np.concatenate([np.zeros((RESAMPLES, 1)), share], axis=1)  # of the normal ones, drawn, that score lowest
    below, up_to = _ranks(normal, anomalous)
    found = (rows * (share[:, below] + share[:, up_to]) / 2).sum(axis=1)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rates(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate (k,) of "at least this" for every distinct value, from the highest on."""
    levels = np.unique(np.concatenate([normal, anomalous]))[::-1]
    false, true = (
        1 - np.searchsorted(np.sort(values), levels, side="left") / len(values) for values in (normal, anomalous)
    )
    return false, true


def average_precision(normal: np.ndarray, anomalous: np.ndarray, prevalence: float) -> float:
    """Area under precision over recall where a share `prevalence` of all images is anomalous; chance gives that share.

    Precision is p TPR / (p TPR + (1 - p) FPR), so the share in the test set does not matter.
    """
    false, true = rates(normal, anomalous)
    found = prevalence * true
    called = found + (1 - prevalence) * false
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    return float((np.diff(true, prepend=0.0) * precision).sum())


def false_positive_rate_at(normal: np.ndarray, anomalous: np.ndarray, true_rate: float = 0.95) -> float:
    """The smallest false positive rate at which at least `true_rate` of the anomalous images are found."""
    false, true = rates(normal, anomalous)
    return float(false[np.argmax(true >= true_rate - 1e-12)])


def pixel_aupro(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float | None:
    """Area under the per-region overlap up to a pixel false-positive rate of 0.3, over 0.3; chance gives 0.15.

    Each connected region of a mask counts the same, whatever its size (Bergmann et al., "Uninformed Students", 2020,
    arXiv:1911.02357). None where no mask has a pixel, or no pixel is normal.

    Args:
        maps: (h, w) of each image, higher for more anomalous.
        masks: bool (h, w) of each image; empty for a normal image.
    """
    from scipy.integrate import trapezoid
    from scipy.ndimage import label

    values, overlaps, normals, regions = [], [], [], 0
    for heat, mask in zip(maps, masks, strict=True):
        named, count = label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(named.ravel(), minlength=count + 1)
        share = 1 / sizes.clip(min=1)
        share[0] = 0.0
        values.append(np.asarray(heat, np.float64).ravel())
        overlaps.append(share[named].ravel())
        normals.append(~np.asarray(mask, bool).ravel())
        regions += count
    value, overlap, normal = (np.concatenate(parts) for parts in (values, overlaps, normals))
    if not regions or not normal.any():
        return None
    order = np.argsort(-value, kind="stable")
    last = np.append(np.diff(value[order]) != 0, True)  # equal values are found together
    rate = np.concatenate([[0.0], np.cumsum(normal[order])[last] / normal.sum()])
    found = np.concatenate([[0.0], np.cumsum(overlap[order])[last] / regions])
    inside = rate <= HIGHEST_PIXEL_RATE
    rate_up_to = np.append(rate[inside], HIGHEST_PIXEL_RATE)
    found_up_to = np.append(found[inside], np.interp(HIGHEST_PIXEL_RATE, rate, found))
    return float(trapezoid(found_up_to, rate_up_to) / HIGHEST_PIXEL_RATE)


# How complex an image is, by the size of its PNG, and what of a score is nothing but that.

MATCHING_RATIO = 1.1
"""A normal image matches an anomalous one when their PNG sizes differ by no more than this factor."""
FEWEST_MATCHED = 10
"""Anomalous images with a match; of fewer there is no matched figure."""


def png_bytes(pixels: np.ndarray) -> int:
    """Size of uint8 (h, w, 3) as a PNG of Pillow's default settings."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.tell()


def matched_auroc(
    normal: np.ndarray, anomalous: np.ndarray, normal_bytes: np.ndarray, anomalous_bytes: np.ndarray
) -> tuple[float | None, float]:
    """AUROC against normal images of about the same PNG size only, and the share of anomalous images that have some.

    Each anomalous image counts once. None for fewer than 10 of them.
    """
    won, logarithms = [], np.log(normal_bytes)
    for value, size in zip(anomalous, np.log(anomalous_bytes), strict=True):
        near = np.abs(size - logarithms) <= math.log(MATCHING_RATIO) + 1e-12
        if near.any():
            won.append(auroc(normal[near], np.array([value])))
    share = len(won) / len(anomalous)
    return (float(np.mean(won)) if len(won) >= FEWEST_MATCHED else None), share


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's correlation of two vectors; None where one of them is constant."""
    from scipy.stats import rankdata

    return _correlation(rankdata(x), rankdata(y))


def partial_rank_correlation(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float | None:
    """Spearman's correlation of x and y with the ranks of `given` held fixed; None where that is undefined."""
    xy, xz, yz = rank_correlation(x, y), rank_correlation(x, given), rank_correlation(y, given)
    if xy is None or xz is None or yz is None:
        return None
    left = (1 - xz**2) * (1 - yz**2)
    return float((xy - xz * yz) / math.sqrt(left)) if left > 1e-12 else None


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / size) if size > 0 else None
