from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.data import transforms
from ldm_vae.evaluation import baselines
from ldm_vae.evaluation.metrics import psnr


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Two detailed images of 128 x 96 pixels, exact in 8 bits."""
    rng = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.randn(2, 3, 16, 12, generator=rng), size=(128, 96), mode="bicubic")
    noisy = (0.4 * smooth + 0.08 * torch.randn(2, 3, 128, 96, generator=rng)).clamp(-1, 1)
    return transforms.from_uint8(transforms.to_uint8(noisy))


@pytest.mark.parametrize("codec", baselines.available_codecs())
def test_the_file_is_the_largest_of_all_qualities_within_the_budget(images: Tensor, codec: str) -> None:
    picture = transforms.to_pil(images)[0]
    lowest, highest = baselines.QUALITIES[codec]
    step = 1 if codec != "AVIF" else 10  # AVIF is slow: a sample of the qualities must not beat the answer
    sizes = {q: len(baselines.encode_picture(picture, codec, q)) for q in range(lowest, highest + 1, step)}
    for budget in (0.3 * max(sizes.values()), 0.6 * max(sizes.values())):
        found = baselines.code_within(picture, codec, budget)
        best = max(size for size in sizes.values() if size <= budget)
        assert found.fits
        assert found.size_bytes <= budget
        assert found.size_bytes == best if step == 1 else found.size_bytes >= best
        assert found.size_bytes == len(baselines.encode_picture(picture, codec, found.quality))


@pytest.mark.parametrize("codec", ["JPEG", "WebP"])
def test_an_impossible_budget_takes_the_lowest_quality_and_says_so(images: Tensor, codec: str) -> None:
    found = baselines.code_within(transforms.to_pil(images)[0], codec, 50)
    assert not found.fits
    assert found.quality == baselines.QUALITIES[codec][0]
    assert found.size_bytes > 50


def test_a_generous_budget_takes_the_highest_quality(images: Tensor) -> None:
    found = baselines.code_within(transforms.to_pil(images)[0], "JPEG", 1e9)
    assert (found.quality, found.fits) == (95, True)


def test_a_size_that_is_not_monotone_is_still_found() -> None:
    sizes = {1: 10, 2: 20, 3: 30, 4: 41, 5: 39, 6: 60}
    assert baselines.largest_within(sizes.__getitem__, 1, 6, 40) == 5
    assert baselines.largest_within(sizes.__getitem__, 1, 6, 9) is None
    assert baselines.largest_within(sizes.__getitem__, 1, 6, 60) == 6


def test_jpeg_is_subsampled_and_the_decoded_pixels_are_those_of_the_file(images: Tensor) -> None:
    decoded, coded = baselines.code_images(images, "JPEG", [3000, 5000])
    for i, picture in enumerate(transforms.to_pil(images)):
        data = baselines.encode_picture(picture, "JPEG", coded[i].quality)
        with Image.open(io.BytesIO(data)) as file:
            assert [component[1:3] for component in file.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0
            np.testing.assert_array_equal(np.asarray(file.convert("RGB")), np.asarray(transforms.to_pil(decoded)[i]))
        assert len(data) == coded[i].size_bytes
    assert coded[0].size_bytes < coded[1].size_bytes


def test_more_bytes_give_a_better_image(images: Tensor) -> None:
    for codec in ("JPEG", "WebP"):
        qualities = [psnr(baselines.code_images(images, codec, [b, b])[0], images).mean() for b in (2500, 5000, 9000)]
        assert qualities == sorted(qualities)


def test_bicubic_keeps_flat_color_and_loses_detail(images: Tensor) -> None:
    flat = transforms.from_uint8(torch.full((1, 3, 64, 48), 77, dtype=torch.uint8))
    assert torch.equal(baselines.bicubic_round_trip(flat, 8), flat)
    picture = transforms.to_pil(images)[0]
    expected = picture.resize((12, 16), Image.Resampling.BICUBIC).resize((96, 128), Image.Resampling.BICUBIC)
    found = transforms.to_pil(baselines.bicubic_round_trip(images, 8))[0]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
