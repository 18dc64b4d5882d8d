"""From the scores of held-out normal images to a threshold, a percentile and a verdict.

The threshold is an order statistic, so its promise needs no distribution: of new normal images, drawn as these were, at
most the stated rate is called anomalous on average. n images can promise no rate below 1 / (n + 1).
"""

from __future__ import annotations

import math

import numpy as np

from ldm_vae.errors import UserError


def smallest_rate(count: int) -> float:
    """The smallest false-positive rate that `count` held-out normal images support."""
    return 1 / (count + 1)


def rounded_up(rate: float) -> str:
    """A rate in four digits that is not below it."""
    return f"{math.ceil(1e4 * rate) / 1e4:.4g}"


def images_for(rate: float) -> int:
    """Held-out normal images that a false-positive rate needs."""
    return math.ceil(round(1 / rate, 9)) - 1


def check_rate(rate: float, count: int) -> None:
    """Raises: UserError when `count` held-out normal images are too few for the rate."""
    if count < images_for(rate):
        raise UserError(
            f"false_positive_rate: {rate} needs {images_for(rate)} held-out normal images, here are {count}, which "
            f"support {rounded_up(smallest_rate(count))} at the least; set that, raise data.held_out or "
            "add images"
        )


def rank_of(count: int, rate: float) -> int:
    """The threshold is the so-manyth smallest of `count` scores, 1 to `count`."""
    return math.ceil(round((count + 1) * (1 - rate), 9))


def threshold(normal: np.ndarray, rate: float) -> float:
    """What at most `rate` of new normal images exceed on average; `normal`: scores (n,). Raises: UserError."""
    check_rate(rate, len(normal))
    return float(np.sort(normal)[rank_of(len(normal), rate) - 1])


def rate_interval(count: int, rate: float, level: float = 0.95) -> tuple[float, float]:
    """Where the true rate of one threshold lies: its average is promised, its own value is Beta distributed."""
    from scipy.stats import beta

    rank = rank_of(count, rate)
    low, high = beta.ppf([(1 - level) / 2, (1 + level) / 2], count + 1 - rank, rank)
    return float(low), float(high)


def percentiles(normal: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share in percent of the held-out normal images that score below each of `values` (m,)."""
    return 100 * np.searchsorted(np.sort(normal), values, side="left") / len(normal)


def p_values(normal: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(1 + normal scores not below) / (n + 1) for each of `values` (m,): the conformal p of "this image is normal"."""
    below = np.searchsorted(np.sort(normal), values, side="left")
    return (1 + len(normal) - below) / (len(normal) + 1)
