"""Curves of quality over rate, and how far one lies from another: the Bjøntegaard rate difference.

Where two curves share no range of quality there is no figure: nothing is extrapolated. Measuring is `bench`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_POINTS = 3
"""Of each curve, once what bends back is left out."""
LEAST_OVERLAP = 0.05
"""Of the shorter curve's range of quality."""


def monotone(rates: Sequence[float], qualities: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Both by rising rate, without points that cost more and are no better."""
    kept: list[tuple[float, float]] = []
    for rate, quality in sorted(zip(rates, qualities)):
        if not kept or (quality > kept[-1][1] and rate > kept[-1][0]):
            kept.append((rate, quality))
    found = np.array(kept, np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def bd_rate(
    rates: Sequence[float], qualities: Sequence[float], other_rates: Sequence[float], other_qualities: Sequence[float]
) -> float | None:
    """Mean difference of rate at equal quality in percent of the other curve's; below 0 the first one is smaller.

    The logarithms of the rates are joined by monotone piecewise cubics and averaged over the qualities that both
    curves reach (Bjøntegaard, VCEG-M33; piecewise as in VCEG-AI11). None where they share too few.

    Args:
        rates: any unit above 0; qualities: higher is better.
    """
    from scipy.interpolate import PchipInterpolator

    first, second = monotone(rates, qualities), monotone(other_rates, other_qualities)
    if min(len(first[0]), len(second[0])) < LEAST_POINTS:
        return None
    low, high = (f(first[1][end], second[1][end]) for f, end in ((max, 0), (min, -1)))
    shorter = min(curve[1][-1] - curve[1][0] for curve in (first, second))
    if high - low < LEAST_OVERLAP * shorter:
        return None
    means = [
        float(PchipInterpolator(quality, np.log(rate)).integrate(low, high)) / (high - low)
        for rate, quality in (first, second)
    ]
    return 100.0 * float(np.expm1(means[0] - means[1]))


def rate_at(rates: Sequence[float], qualities: Sequence[float], quality: float) -> float | None:
    """The rate at which a curve reaches a quality; None outside of it."""
    from scipy.interpolate import PchipInterpolator

    x, y = monotone(rates, qualities)
    if len(x) < LEAST_POINTS or not y[0] <= quality <= y[-1]:
        return None
    return float(np.exp(PchipInterpolator(y, np.log(x))(quality)))
