"""How complex an image is, by the size of its PNG, and what of a score is nothing but that.

Likelihoods and reconstruction errors rank simple images as normal whatever they show (Serra et al., arXiv:1909.11480;
Nalisnick et al., arXiv:1810.09136), so a score that only follows complexity has to be seen as such.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from ldm_vae.applications.anomaly.curves import auroc

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
