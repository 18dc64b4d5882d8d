"""Latents move along a vector, and only where the mask says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_vae.applications.directions.apply import ApplyDirectionConfig, box_mask, edited, latent_mask, place_mask
from ldm_vae.errors import UserError


def test_no_strength_changes_nothing_and_others_add_the_vector() -> None:
    latent = torch.randn(1, 3, 4, 5)
    moved = edited(latent, np.array([1.0, 0.0, -2.0]), [0.0, 2.0])
    assert torch.equal(moved[:1], latent)
    torch.testing.assert_close(moved[1, 2], latent[0, 2] - 4)


def test_a_mask_limits_the_edit() -> None:
    mask = latent_mask(box_mask((0, 0, 16, 8), 32, 32), 8, 0.0)
    assert torch.equal(mask[0, 0], torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    latent = torch.zeros(1, 2, 4, 4)
    moved = edited(latent, np.ones(2), [3.0], mask)
    assert moved[0, 0].sum() == 6


def test_a_position_is_masked_as_far_as_it_is_covered_and_softly_with_a_feather() -> None:
    hard = latent_mask(box_mask((0, 0, 12, 32), 32, 32), 8, 0.0)
    torch.testing.assert_close(hard[0, 0, 0], torch.tensor([1.0, 0.5, 0, 0]))
    soft = latent_mask(box_mask((0, 0, 32, 64), 64, 64), 8, 1.0)[0, 0, 0]
    assert (soft.diff() <= 1e-6).all()
    assert 0.5 < soft[3] < 0.9
    assert 0.1 < soft[4] < 0.5
    padded = latent_mask(torch.ones(1, 1, 20, 20), 8, 0.0)
    assert padded.shape == (1, 1, 3, 3)
    assert padded.min() == 1


@pytest.mark.parametrize("box", [(0, 0, 0, 8), (8, 0, 4, 8), (0, 0, 33, 8), (-1, 0, 4, 8)])
def test_a_box_outside_is_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match="is not a box inside an image of 32 x 16 pixels"):
        box_mask(box, 16, 32)


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(UserError, match="mask: is empty"):
        latent_mask(torch.zeros(1, 1, 16, 16), 8, 1.0)


def test_a_mask_of_another_size_is_refused() -> None:
    config = ApplyDirectionConfig(feather=0.0, mask="mask.png")
    assert torch.equal(place_mask(config, torch.ones(1, 1, 16, 16), 16, 16, 8), torch.ones(1, 1, 2, 2))
    with pytest.raises(UserError, match=r"mask: 16 x 16 pixels \(height x width\) for an image of 16 x 24"):
        place_mask(config, torch.ones(1, 1, 16, 16), 16, 24, 8)
