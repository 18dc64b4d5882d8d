"""Nearest neighbours and the copy rate on sets where both are known; the neighbor_sheet of pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.diffusion.validation import Copies, find_neighbors, known_latents, neighbor_sheet
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.random import generator
from ldm_vae.utils.image_grid import GAP, MARGIN
from tests.latents.conftest import autoencoder_directory as autoencoder_directory  # a fixture
from tests.latents.conftest import encode as encode  # a fixture
from tests.latents.conftest import settings as settings  # a fixture


def test_copies_among_fresh_samples() -> None:
    """Fresh Gaussian latents are as far from one training latent as from another; slightly changed ones are copies."""
    rng = generator(0, "latents")
    training = torch.randn(700, 1, 4, 8, 8, generator=rng)
    fresh = torch.randn(20, 4, 8, 8, generator=rng)
    numbers = torch.tensor([699, 3, 300])
    copied = training[numbers, 0] + 0.1 * torch.randn(3, 4, 8, 8, generator=rng)
    found = find_neighbors(torch.cat([fresh, copied, training[5]]), training)
    assert found.copies == 4
    assert found.nearest[20:].tolist() == [699, 3, 300, 5]
    assert found.ratios[:20].min() > 0.9
    assert found.ratios[23] == 0
    assert find_neighbors(fresh, training.half()).copies == 0


def test_the_ratio_is_that_of_the_distances() -> None:
    training = torch.tensor([0.0, 10.0, 20.0]).view(3, 1, 1, 1, 1)
    found = find_neighbors(torch.tensor([2.0, 2.6, 14.0]).view(3, 1, 1, 1), training)
    assert found.nearest.tolist() == [0, 0, 1]
    torch.testing.assert_close(found.ratios, torch.tensor([2 / 8, 2.6 / 7.4, 4 / 6]))
    assert found.copies == 1


def test_copies_of_mirror_images_are_found_and_fresh_samples_are_not() -> None:
    """The latents of mirror images are drawn apart: encoding does not commute with mirroring."""
    rng = generator(0, "mirrored")
    training = torch.randn(600, 2, 4, 8, 8, generator=rng)
    training[7, 1] = training[7, 0]  # an image that is its own mirror image
    numbers, versions = torch.arange(0, 480, 2), torch.arange(240) % 2
    copied = training[numbers, versions] + 0.1 * torch.randn(240, 4, 8, 8, generator=rng)
    found = find_neighbors(torch.cat([copied, training[7, :1]]), training)
    assert found.copies == 241
    assert found.nearest.tolist() == [*numbers.tolist(), 7]
    assert found.versions[:240].tolist() == versions.tolist()
    fresh = find_neighbors(torch.randn(240, 4, 8, 8, generator=rng), training)
    assert (fresh.copies, float(fresh.ratios.min()) > 0.9) == (0, True)


@pytest.mark.parametrize("store", ["moments", "mean"])
def test_a_set_with_mirror_images_gives_both_latents_of_each(encode, tmp_path: Path, store: str) -> None:
    """Every stored latent, of an image or of its mirror image, is found as a copy, whatever the seed of the set."""
    encode(tmp_path / "set", "flip=true", f"store={store}")
    dataset = LatentDataset(tmp_path / "set")
    known = known_latents(dataset, dataset.normalizer, 100)
    assert known.shape == (24, 2, 3, 4, 4)
    planted = torch.stack([dataset.normalizer.normalize(dataset.versions(i)) for i in range(24)]).flatten(0, 1)
    found = find_neighbors(planted, known)
    assert found.copies == 48
    assert found.nearest.tolist() == [i for i in range(24) for _ in range(2)]
    assert found.versions.tolist() == [0, 1] * 24
    assert known_latents(dataset, dataset.normalizer, 5).shape[:2] == (5, 2)


def test_the_alarm_says_how_many_of_how_many() -> None:
    assert "copies: 3 of 10 preview samples" in Copies(3, 10, 2048).sentence()
    assert "one of 2048 training latents" in Copies(3, 10, 2048).sentence()


def test_each_pair_stands_one_above_the_other() -> None:
    above = [Image.new("RGB", (64, 64), (255, 0, 0))] * 3
    below = [Image.new("RGB", (64, 64), (0, 0, 255))] * 3
    for names in (["cat", "dog", "cow"], []):
        sheet = np.asarray(neighbor_sheet(above, below, torch.tensor([0.1, 0.6, 0.9]), names))
        for column in range(2):
            x = MARGIN + 32 + column * (64 + GAP)
            red, blue = sheet[MARGIN + 32, x].tolist(), sheet[MARGIN + 64 + GAP + 32, x].tolist()
            assert (red, blue) == ([255, 0, 0], [0, 0, 255])
