"""Integer probability tables of a quantised logistic distribution, the same numbers on every machine.

A table belongs to a mean's fraction of a step and to a scale in steps. Its entries are weights that sum to 2**22, of
the residuals -255 ... 255 and of an escape for everything else. They come from decimal arithmetic, which is exact to
the digit wherever Python runs, and from integers; floats only carry the finished weights to the coder, which they do
exactly. Which table a symbol gets is the entropy model's business.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import lru_cache
from math import isqrt

import numpy as np

TOTAL_BITS = 22
"""Weights sum to 2**22: a weight over the sum is exact in float32, and so are sums of them in any order."""
FRACTIONS = 8
"""Means within a step: 0, 1/8 ... 7/8."""
SCALES = 41
"""2**-4, 2**-3.75 ... 2**6 steps."""
SCALES_PER_OCTAVE = 4
FIRST_SCALE_OCTAVE = -4
REACH = 255
ESCAPE = 2 * REACH + 1

SAMPLES_PER_UNIT = 64
SAMPLED_REACH = 16
POSITION_BITS = 16


@lru_cache(maxsize=1)
def probability_tables() -> np.ndarray:
    """(SCALES * FRACTIONS, 512) float32: the table of scale j and fraction f is row j * FRACTIONS + f. Read-only."""
    tables = (integer_tables() / float(1 << TOTAL_BITS)).astype(np.float32)
    tables.flags.writeable = False
    return tables


@lru_cache(maxsize=1)
def integer_tables() -> np.ndarray:
    """The weights, int64, each row summing to 2**22; a weight of 0 gets the coder's smallest probability."""
    curve = _sampled_logistic()
    residuals = np.arange(-REACH - 1, REACH + 1, dtype=np.int64)
    tables = np.empty((SCALES * FRACTIONS, ESCAPE + 1), np.int64)
    for scale in range(SCALES):
        for fraction in range(FRACTIONS):
            edges = 16 * residuals + 8 - 2 * fraction  # upper edges of the residuals, in sixteenths of a step
            cumulative = _interpolated(curve, edges * _inverse_scale(scale))
            weights = np.diff(cumulative)
            tables[scale * FRACTIONS + fraction] = [*weights, (1 << TOTAL_BITS) - int(weights.sum())]
    tables.flags.writeable = False
    return tables


def _sampled_logistic() -> np.ndarray:
    """1 / (1 + exp(-x)) times 2**22 at x = -16, -16 + 1/64 ... 16, rounded, int64."""
    with localcontext() as context:
        context.prec = 30
        half = [
            int((Decimal(1 << TOTAL_BITS) / (1 + (-Decimal(k) / SAMPLES_PER_UNIT).exp())).to_integral_value())
            for k in range(SAMPLES_PER_UNIT * SAMPLED_REACH + 1)
        ]
    return np.array([*((1 << TOTAL_BITS) - value for value in half[:0:-1]), *half], np.int64)


def _inverse_scale(scale: int) -> int:
    """64 samples per unit over the scale, for edges in sixteenths of a step: 2**(6 - scale / 4) with 16 more bits."""
    return isqrt(isqrt(1 << (4 * (POSITION_BITS + 6) - scale)))


def _interpolated(curve: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The curve at positions in samples from its centre, with 16 fractional bits; level beyond its ends."""
    centre = SAMPLES_PER_UNIT * SAMPLED_REACH
    whole = (positions >> POSITION_BITS).clip(-centre, centre - 1)
    rest = (positions - (whole << POSITION_BITS)).clip(0, 1 << POSITION_BITS)
    low, high = curve[whole + centre], curve[whole + centre + 1]
    return low + ((high - low) * rest >> POSITION_BITS)


def rounded_log2(numerator: int, denominator: int, per_octave: int) -> int:
    """floor(per_octave * log2(numerator / denominator)) of positive integers, exactly."""
    above, below = numerator**per_octave, denominator**per_octave
    result = above.bit_length() - below.bit_length()
    larger = above >= below << result if result >= 0 else above << -result >= below
    return result if larger else result - 1


def scale_index(scale_numerator: int, scale_denominator: int) -> int:
    """The row of scales that is nearest to a scale in steps, given as a fraction of positive integers."""
    eighths = rounded_log2(scale_numerator, scale_denominator, 2 * SCALES_PER_OCTAVE)
    return min(max((eighths + 1) // 2 - SCALES_PER_OCTAVE * FIRST_SCALE_OCTAVE, 0), SCALES - 1)


def best_scale(symbols: np.ndarray) -> int:
    """The scale (fraction 0) that codes integer symbols of any shape in the fewest bits."""
    clipped = np.where(np.abs(symbols) > REACH, ESCAPE - REACH, symbols).reshape(-1) + REACH
    counts = np.bincount(clipped, minlength=ESCAPE + 1)
    return int(np.argmin(-(np.log2(np.maximum(integer_tables()[::FRACTIONS], 0.25)) @ counts)))
