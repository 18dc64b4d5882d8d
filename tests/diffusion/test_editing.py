"""Images and masks of every kind are read alike; what does not fit is refused with what would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.diffusion.editing import image_tensor, read_init_image
from ldm_vae.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS[None],
        PIXELS.astype(np.float32) / 255,
        torch.from_numpy(PIXELS).movedim(-1, 0),
        torch.from_numpy(PIXELS).movedim(-1, 0)[None] / 255,
        [Image.fromarray(PIXELS)],
    ],
)
def test_every_kind_of_image(picture: Any) -> None:
    expected = torch.from_numpy(PIXELS).movedim(-1, 0)[None] / 255
    assert torch.equal(image_tensor(picture, 3, "image"), expected)


def test_grey_images_and_masks() -> None:
    grey = PIXELS[..., 0]
    assert image_tensor(Image.fromarray(grey), 3, "image").shape == (1, 3, 16, 24)
    expected = torch.from_numpy(grey)[None, None] / 255
    for mask in (Image.fromarray(grey), grey, torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert torch.equal(image_tensor(mask, 1, "mask"), expected)
    boolean = grey > 128
    assert torch.equal(image_tensor(boolean, 1, "mask"), torch.from_numpy(boolean)[None, None].float())


def test_a_latent_changes_where_any_of_its_pixels_may() -> None:
    mask = np.zeros((16, 24), dtype=np.float32)
    mask[3, 8] = mask[9:11, 7:9] = 1
    source = read_init_image(PIXELS, mask, 2, 8)
    assert source.latent_mask(8)[1, 0].tolist() == [[False, True, False], [True, True, False]]
    painted = source.paste(torch.full((2, 3, 16, 24), 0.25))
    assert torch.equal(painted[:, :, mask > 0], torch.full((2, 3, 5), 0.25))
    assert torch.equal(painted[0][:, mask == 0], source.images[0][:, mask == 0])


@pytest.mark.parametrize(
    ("image", "mask", "count", "message"),
    [
        (PIXELS[:, :20], None, 1, r"16 x 20 pixels .* crop or scale it to 16 x 16"),
        (PIXELS, PIXELS[:8, :, 0], 1, "mask: 8 x 24 pixels for an image of 16 x 24"),
        ([PIXELS, PIXELS], None, 3, "image: 2 of them for 3 images"),
        (PIXELS, [PIXELS[..., 0]] * 2, 3, "mask: 2 of them for 3 images"),
        (PIXELS[..., :2], None, 1, r"image: its shape is \(16, 24, 2\); give PIL images"),
        (PIXELS, PIXELS, 1, r"mask: its shape is \(16, 24, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(image: Any, mask: Any, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_init_image(image, mask, count, 8)
