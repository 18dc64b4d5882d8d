from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.data import transforms
from ldm_vae.evaluation import baselines
from ldm_vae.metrics import psnr


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


@pytest.mark.parametrize("codec", ["JPEG", "WebP"])
def test_the_budget_lies_between_two_neighboring_files_and_is_filled(images: Tensor, codec: str) -> None:
    """Against every quality of the codec: none has a file closer to the budget."""
    picture = transforms.to_pil(images)[0]
    lowest, highest = baselines.QUALITIES[codec]
    sizes = [len(baselines.encode_picture(picture, codec, q)) for q in range(lowest, highest + 1)]
    for budget in (0.3 * max(sizes), 0.45 * max(sizes), 0.6 * max(sizes)):
        found = baselines.code_around(picture, codec, budget)
        assert found.below.size_bytes == max(size for size in sizes if size <= budget)
        assert found.above.size_bytes == min(size for size in sizes if size > budget)
        assert found.record()["bytes"] == found.size_bytes == budget
        below, above = np.log(found.below.size_bytes), np.log(found.above.size_bytes)
        expected = np.interp(np.log(budget), [below, above], [20.0, 30.0])
        assert found.at_budget(20.0, 30.0) == pytest.approx(expected)
    exact = baselines.code_around(picture, codec, sizes[40])
    assert exact.at_budget(1.0, 2.0) == pytest.approx(1.0)


@pytest.mark.parametrize("codec", ["JPEG", "WebP"])
def test_the_line_between_two_files_meets_a_file_between_them(images: Tensor, codec: str) -> None:
    """Known answer: the file that is left out, over a much wider gap than two neighboring qualities."""
    picture = transforms.to_pil(images)[0]

    def at(quality: int) -> tuple[int, float]:
        data = baselines.encode_picture(picture, codec, quality)
        decoded = transforms.to_batch(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
        return len(data), float(psnr(decoded, images[:1]))

    for quality in (30, 50, 70):
        (low, before), (size, true), (high, after) = (at(quality + step) for step in (-5, 0, 5))
        sides = (baselines.CodedImage(picture, bytes, quality, True) for bytes in (low, high))
        assert baselines.Bracket(*sides, size).at_budget(before, after) == pytest.approx(true, abs=0.12)


def test_where_one_side_is_missing_there_is_one_file(images: Tensor) -> None:
    picture = transforms.to_pil(images)[0]
    for budget, quality in ((50, 1), (1e9, 95)):
        found = baselines.code_around(picture, "JPEG", budget)
        assert found.below is found.above
        assert (found.size_bytes, found.at_budget(3.0, 3.0)) == (found.below.size_bytes, 3.0)
        assert (found.below.quality, found.below.fits) == (quality, budget > 50)


def test_jpeg_is_subsampled_and_the_decoded_pixels_are_those_of_the_file(images: Tensor) -> None:
    *decoded, coded = baselines.code_images(images, "JPEG", [3000, 5000])
    for i, picture in enumerate(transforms.to_pil(images)):
        for side, found in zip(decoded, (coded[i].below, coded[i].above), strict=True):
            data = baselines.encode_picture(picture, "JPEG", found.quality)
            with Image.open(io.BytesIO(data)) as file:
                assert [component[1:3] for component in file.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0
                np.testing.assert_array_equal(np.asarray(file.convert("RGB")), np.asarray(transforms.to_pil(side)[i]))
            assert len(data) == found.size_bytes
    assert [one.size_bytes for one in coded] == [3000, 5000]


@pytest.mark.parametrize("codec", baselines.available_codecs())
def test_the_strongest_settings_give_no_larger_file_than_usual_ones(images: Tensor, codec: str) -> None:
    usual = {
        "JPEG": {"format": "JPEG", "optimize": True, "subsampling": "4:2:0"},
        "WebP": {"format": "WEBP"},
        "AVIF": {"format": "AVIF", "speed": 8, "subsampling": "4:2:0", "max_threads": 1},
    }
    for picture in transforms.to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, quality=40, **usual[codec])
        assert len(baselines.encode_picture(picture, codec, 40)) <= len(buffer.getvalue())


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
