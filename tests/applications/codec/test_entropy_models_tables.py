"""The tables are those of a logistic distribution, and the same integers everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ldm_vae.applications.codec.entropy_models import (
    ESCAPE,
    FRACTIONS,
    REACH,
    SCALES,
    TOTAL_BITS,
    best_scale,
    integer_tables,
    probability_tables,
    rounded_log2,
    scale_index,
)
from ldm_vae.files import checksum_bytes

CHECKSUM = "xxh3_128:cc182677f7eeb2dbc91aa17c6506d464"
"""Files that exist are decoded with these numbers: they may never change within a format version."""


def test_every_table_is_whole_and_the_same_everywhere():
    tables = integer_tables()
    assert tables.shape == (SCALES * FRACTIONS, ESCAPE + 1)
    assert (tables >= 0).all()
    assert (tables.sum(axis=1) == 1 << TOTAL_BITS).all()
    assert checksum_bytes(tables.astype("<i8").tobytes()) == CHECKSUM
    carried = probability_tables().astype(np.float64) * (1 << TOTAL_BITS)
    assert (carried == tables).all()  # float32 loses nothing


@pytest.mark.parametrize(("scale", "fraction"), [(0, 0), (16, 0), (17, 5), (28, 3), (40, 7)])
def test_a_table_is_a_quantized_logistic(scale, fraction):
    width, mean = 2.0 ** (scale / 4 - 4), fraction / 8

    def cumulative(x):
        return 0.5 * (1 + math.tanh((x - mean) / (2 * width)))

    residuals = np.arange(-REACH, REACH + 1)
    expected = [cumulative(r + 0.5) - cumulative(r - 0.5) for r in residuals]
    found = integer_tables()[scale * FRACTIONS + fraction]
    assert np.abs(found[:-1] / 2**TOTAL_BITS - expected).max() < 1e-4
    assert found[-1] / 2**TOTAL_BITS == pytest.approx(1 - sum(expected), abs=1e-4)


def test_logarithms_and_scales_of_fractions_are_exact():
    assert rounded_log2(8, 1, 16) == 48
    assert rounded_log2(2**60 - 1, 2**57, 16) == 47  # floats would say 48
    assert rounded_log2(1, 3, 4) == math.floor(4 * math.log2(1 / 3))
    for scale in range(SCALES):
        assert scale_index(round(2 ** (20 + scale / 4 - 4)), 2**20) == scale
    assert scale_index(1, 10**9) == 0
    assert scale_index(10**9, 1) == SCALES - 1


def test_the_best_scale_is_that_of_the_symbols():
    rng = np.random.default_rng(0)
    for scale in (8, 20, 30):
        symbols = np.rint(rng.logistic(0, 2.0 ** (scale / 4 - 4), 20_000)).astype(int)
        assert abs(best_scale(symbols) - scale) <= 1
    assert best_scale(np.array([[100_000]])) == SCALES - 1  # an escape
    assert best_scale(np.zeros((3, 3), int)) == 0
