"""The reader learns what pictures show, the same each time, and leaves out what is not known."""

from __future__ import annotations

import numpy as np
import torch

from ldm_vae.applications.directions.attributes import Attribute, reduced, train_reader


def pictures(count: int, seed: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Gray levels with a bright half: level (n,) and whether it is the left half (n,)."""
    rng = np.random.default_rng(seed)
    level, left = rng.uniform(-0.8, 0.4, count), rng.integers(0, 2, count).astype(float)
    images = torch.from_numpy(level).float().view(-1, 1, 1, 1).repeat(1, 3, 64, 64)
    for image, side in zip(images, left):
        image[:, :, :32] += 0.4 * side
        image[:, :, 32:] += 0.4 * (1 - side)
    return images, level, left


def test_it_reads_a_number_and_a_yes_or_no_off_new_pictures() -> None:
    images, level, left = pictures(96, 0)
    known = level.copy()
    known[::3] = np.nan
    attributes = [Attribute("level", known, False), Attribute("left", left, True)]
    reader = train_reader(images, attributes, epochs=10)
    new, level, left = pictures(32, 1)
    read = reader(reduced(new)).numpy()
    assert np.corrcoef(read[:, 0], level)[0, 1] > 0.9
    assert ((read[:, 1] > 0.5) == (left == 1)).mean() > 0.9
    again = train_reader(images[:32], [a.at(np.arange(32)) for a in attributes], epochs=1)
    twice = train_reader(images[:32], [a.at(np.arange(32)) for a in attributes], epochs=1)
    torch.testing.assert_close(again(new), twice(new))
