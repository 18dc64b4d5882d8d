"""Rounding keeps the mean of what is flat, in latents and in the colors of a decoded picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm_vae.applications.codec import compression
from ldm_vae.applications.codec.entropy_models import DIFFUSED, DIFFUSED_TO, diffused_levels, step_of

CHECKPOINT = Path(__file__).parents[3] / "checkpoints" / "vae-f8c4-nano"
COLOURS = [(55, 55, 55), (120, 180, 90), (110, 110, 130), (244, 244, 244), (200, 60, 60), (24, 24, 24)]
COLOURS += [(0, 130, 130), (192, 192, 192), (255, 140, 0)]
SIDE = 80
INSIDE = slice(SIDE // 4, -SIDE // 4)


def one_by_one(plane: np.ndarray) -> np.ndarray:
    """The definition, in reading order."""
    height, width = plane.shape
    wanted, levels = plane.copy(), np.zeros_like(plane)
    for y in range(height):
        for x in range(width):
            levels[y, x] = np.rint(wanted[y, x])
            for down, right, share in DIFFUSED_TO:
                if y + down < height and 0 <= x + right < width:
                    wanted[y + down, x + right] += share * (DIFFUSED * (wanted[y, x] - levels[y, x]))
    return levels


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (9, 4), (5, 16)])
def test_errors_go_where_they_would_go_one_by_one(size):
    values = np.random.default_rng(0).normal(0, 2, (2, 3, *size))
    found = diffused_levels(values)
    expected = [[one_by_one(plane) for plane in planes] for planes in values]
    assert (found == np.array(expected)).all()
    assert np.abs(found - values).max() < 1


@pytest.mark.parametrize("value", [0.0, 0.2, 0.35, 0.5, -7.45])
def test_the_mean_of_a_flat_plane_stays(value):
    levels = diffused_levels(np.full((24, 24), value))
    assert set(np.unique(levels)) <= {np.floor(value), np.ceil(value)}
    assert abs(levels.mean() - value) < (1 - DIFFUSED) / 2 + 0.02


def test_whole_numbers_stay():
    levels = np.random.default_rng(1).integers(-9, 9, (3, 8, 8)).astype(np.float64)
    assert (diffused_levels(levels) == levels).all()


def test_flat_areas_keep_their_color_at_the_default_quality():
    """Plain rounding is off by up to 3.7 of 255 in these areas."""
    codec = compression.open_codec(str(CHECKPOINT))
    image = np.array(COLOURS, np.uint8).reshape(3, 3, 3).repeat(SIDE, 0).repeat(SIDE, 1)
    picture = codec.analyze(image, "it")
    data = codec.compress(picture, step_of(50.0)).data
    unrounded = codec.picture_of(picture.latents.astype(np.float32), *image.shape[:2])
    decoded = codec.decompress(data, "it")
    error = (decoded.astype(np.float64) - unrounded).reshape(3, SIDE, 3, SIDE, 3)[:, INSIDE][:, :, :, INSIDE]
    shift = np.abs(error.mean(axis=(1, 3)))
    assert shift.max() < 1.5
