from __future__ import annotations

import numpy as np
import torch

from ldm_vae.data import transforms


def test_round_trip_is_exact_for_all_levels() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    images = transforms.from_uint8(levels)
    assert images.dtype == torch.float32
    assert (images[0], images[255]) == (-1.0, 1.0)
    torch.testing.assert_close(transforms.to_uint8(images), levels, rtol=0, atol=0)


def test_to_uint8_rounds_and_clamps() -> None:
    step = 2 / 255
    values = torch.tensor([-9.0, -1 + 0.4 * step, -1 + 0.6 * step, 9.0])
    assert transforms.to_uint8(values).tolist() == [0, 0, 1, 255]
    assert transforms.to_uint8(torch.tensor([1.0], dtype=torch.bfloat16)).tolist() == [255]


def test_to_uint8_leaves_its_input_alone() -> None:
    values = torch.tensor([0.25], requires_grad=True)
    transforms.to_uint8(values)
    assert values.item() == 0.25


def test_to_pil_keeps_channels_and_orientation() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    tensor = transforms.from_uint8(torch.from_numpy(image.transpose(2, 0, 1).copy()))
    pictures = transforms.to_pil(torch.stack([tensor, -tensor]))
    assert [picture.size for picture in pictures] == [(16, 8), (16, 8)]
    np.testing.assert_array_equal(np.asarray(pictures[0]), image)
