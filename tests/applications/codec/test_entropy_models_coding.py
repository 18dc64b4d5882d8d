"""Residuals come back from bytes, whatever they are; and the bytes are those of every release."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.applications.codec.entropy_models import (
    CHUNK,
    FRACTIONS,
    LARGEST_RESIDUAL,
    SCALES,
    ResidualDecoder,
    ResidualEncoder,
    integer_tables,
)
from ldm_vae.errors import UserError


def coded(*pairs: tuple[np.ndarray, np.ndarray]) -> bytes:
    encoder = ResidualEncoder()
    for residuals, rows in pairs:
        encoder.put(residuals, rows)
    return encoder.finish()


def test_residuals_come_back_escapes_among_them():
    rng = np.random.default_rng(0)
    residuals = np.rint(rng.laplace(0, 4, CHUNK + 100)).astype(np.int64)
    residuals[[0, 5, CHUNK, CHUNK + 99]] = [LARGEST_RESIDUAL, -LARGEST_RESIDUAL, 256, -256]
    rows = rng.integers(0, SCALES * FRACTIONS, len(residuals))
    few = (np.array([1, -2, 3]), np.array([100, 100, 100]))
    data = coded((residuals, rows), few)
    decoder = ResidualDecoder(data, "here")
    assert (decoder.take(rows) == residuals).all()
    assert (decoder.take(few[1]) == few[0]).all()
    decoder.finish()


def test_the_length_is_that_of_the_tables():
    row = 22 * FRACTIONS
    weights = integer_tables()[row] / 2.0**22
    residuals = np.random.default_rng(1).choice(512, 20_000, p=weights) - 255
    ideal = -np.log2(weights[residuals + 255]).sum() / 8
    assert len(coded((residuals, np.full(20_000, row)))) == pytest.approx(ideal, rel=1e-3)


def test_the_bytes_are_those_of_every_release():
    residuals, rows = np.array([0, 1, -1, 300, 7, 0, -20]), np.array([0, 64, 80, 120, 200, 327, 327])
    assert coded((residuals, rows)).hex() == "dec540e772b206c936fc0a0c"


def test_bytes_that_nobody_wrote_are_refused_or_decoded_never_a_crash():
    rng = np.random.default_rng(2)
    refused = 0
    for _ in range(200):
        decoder = ResidualDecoder(rng.bytes(4 * int(rng.integers(0, 40))), "here")
        try:
            decoder.take(rng.integers(0, SCALES * FRACTIONS, 300))
            decoder.finish()
        except UserError as error:
            refused += str(error).startswith("here: is damaged")
    assert refused > 100
