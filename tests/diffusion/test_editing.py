"""Where a mask lets latents and pixels change; sizes and numbers that do not fit are refused with what would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ldm_vae.diffusion.editing import read_init_image
from ldm_vae.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def test_a_latent_changes_where_any_of_its_pixels_may() -> None:
    mask = np.zeros((16, 24), dtype=np.float32)
    mask[3, 8] = mask[9:11, 7:9] = 1
    source = read_init_image(PIXELS, mask, 8).expand(2)
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
        (PIXELS[..., :2], None, 1, r"image: its shape is \(16, 24, 2\); give files, PIL images"),
        (PIXELS, PIXELS, 1, "mask: is colored"),
    ],
)
def test_what_does_not_fit_is_refused(image: Any, mask: Any, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_init_image(image, mask, 8).expand(count)


@pytest.mark.parametrize(("value", "words"), [(0, "marks nothing"), (1, "marks everything")])
def test_a_mask_without_effect_is_reported(value: int, words: str, caplog: Any) -> None:
    source = read_init_image(PIXELS, np.full((16, 24), value, np.uint8), 8)
    assert [record.getMessage() for record in caplog.records if words in record.getMessage()]
    assert read_init_image(source, None, 8) is source
