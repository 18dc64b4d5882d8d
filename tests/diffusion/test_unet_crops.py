"""Crops of latents: where they lie, what they hold, and which settings are refused."""

from __future__ import annotations

import pytest
import torch

from ldm_vae.diffusion.unet import CropsConfig, draw_crops, whole_coordinates
from ldm_vae.errors import UserError


def test_coordinates_are_centres_from_minus_one_to_one() -> None:
    rows, columns = whole_coordinates(4, 2)[0]
    assert rows[:, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert columns[0].tolist() == [-0.5, 0.5]
    assert rows.shape == columns.shape == (4, 2)


def test_a_crop_holds_what_lies_at_its_coordinates() -> None:
    """A latent that *is* its coordinates, cut anywhere, equals the coordinates of the crop."""
    latents = whole_coordinates(12, 16).expand(6, -1, -1, -1)
    crops = draw_crops(CropsConfig(4, share=1.0), seed=0, step=3, count=10, height=12, width=16)
    cut, coordinates = crops.cut(latents, slice(2, 8))
    assert coordinates is not None
    assert cut.shape == (6, 2, 4, 4)
    assert torch.equal(cut, coordinates)
    assert len({tuple(place) for place in zip(crops.tops.tolist(), crops.lefts.tolist())}) > 5


def test_positions_depend_on_seed_step_and_row_alone_and_reach_every_border() -> None:
    config = CropsConfig(4, share=1.0)
    first, again = (draw_crops(config, 0, 1, 200, 8, 8) for _ in range(2))
    assert torch.equal(first.tops, again.tops)
    assert torch.equal(first.lefts, again.lefts)
    assert not torch.equal(first.tops, draw_crops(config, 0, 2, 200, 8, 8).tops)
    assert not torch.equal(first.tops, draw_crops(config, 1, 1, 200, 8, 8).tops)
    assert set(first.tops.tolist()) == set(first.lefts.tolist()) == set(range(5))
    split = [first.cut(torch.rand(100, 1, 8, 8), rows)[1] for rows in (slice(0, 100), slice(100, 200))]
    whole = first.cut(torch.rand(200, 1, 8, 8), slice(0, 200))[1]
    assert whole is not None
    assert torch.equal(torch.cat([part for part in split if part is not None]), whole)


def test_the_share_of_steps() -> None:
    sizes = [draw_crops(CropsConfig(4, share=0.6), 0, step, 1, 8, 8).size for step in range(500)]
    assert set(sizes) == {4, None}
    assert sizes.count(4) / 500 == pytest.approx(0.6, abs=0.06)
    latents = torch.rand(2, 3, 8, 8)
    cut, coordinates = draw_crops(CropsConfig(), 0, 0, 2, 8, 8).cut(latents, slice(0, 2))
    assert cut is latents
    assert coordinates is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropsConfig(0), "crops.size: 0 is below 1"),
        (lambda: CropsConfig(8, share=1.5), "crops.share: 1.5"),
        (lambda: CropsConfig(32).check((4, 16, 64), 4), "larger than the latents.*at most 16"),
        (lambda: CropsConfig(30).check((4, 64, 64), 8), "not a multiple of 8.*give 24"),
    ],
)
def test_settings_without_sense_are_refused(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make()
