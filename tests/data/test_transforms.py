from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ldm_vae.data.transforms import CropConfig, cover_scale, preprocessing_record, random_crop, resize_center_crop
from ldm_vae.errors import UserError
from tests.data.encoded import picture

PLAIN = CropConfig(flip=False, flat=0.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def coordinates(height: int, width: int) -> np.ndarray:
    """Red is x, green is y, in 1/256 of the width and height: a crop tells where it comes from."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([256 * x // width, 256 * y // height, 0 * x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (16, 16), (500, 700), (8, 9)])
def test_random_crop_has_the_size_asked_for(shape: tuple[int, int], size: int) -> None:
    for seed in range(4):
        crop = random_crop(picture(*shape), rng(seed), size)
        assert crop.shape == (size, size, 3)
        assert crop.dtype == np.uint8
        assert crop.flags.c_contiguous


def test_random_crop_is_a_function_of_the_generator() -> None:
    image = picture(300, 400)
    np.testing.assert_array_equal(random_crop(image, rng(5), 64), random_crop(image, rng(5), 64))
    assert (random_crop(image, rng(5), 64) != random_crop(image, rng(6), 64)).any()


def test_scales_fill_the_range_and_never_enlarge() -> None:
    """On a ramp, the span of a crop tells the scale."""
    image = coordinates(1024, 1024)
    short_sides = []
    for seed in range(300):
        crop = random_crop(image, rng(seed), 128, PLAIN).astype(float)
        slope = (crop[:, 120, 0] - crop[:, 8, 0]).mean() / 112  # levels per pixel; 256 levels per picture
        short_sides.append(256 / slope)
    assert 245 < min(short_sides) < 270
    assert 720 < max(short_sides) < 800
    assert abs(np.median(short_sides) - np.sqrt(256 * 768)) < 40  # log-uniform


def test_a_picture_between_crop_and_minimum_is_copied_not_scaled() -> None:
    image = picture(100, 140)
    crop = random_crop(image, rng(3), 64, PLAIN)
    places = np.lib.stride_tricks.sliding_window_view(image, (64, 64, 3)).reshape(37, 77, -1)
    assert (places == crop.reshape(-1)).all(axis=-1).any()


def test_crops_reach_all_corners() -> None:
    image = coordinates(64, 96)
    crops = [random_crop(image, rng(seed), 32, PLAIN) for seed in range(500)]
    left, top = {int(crop[0, 0, 0]) for crop in crops}, {int(crop[0, 0, 1]) for crop in crops}
    assert min(left) == min(top) == 0
    assert max(left) >= 256 * 63 // 96
    assert max(top) >= 256 * 31 // 64


def test_flip_mirrors_half_of_the_crops() -> None:
    image = coordinates(64, 64)
    rising = [int(c[0, -1, 0]) > int(c[0, 0, 0]) for c in (random_crop(image, rng(s), 32) for s in range(200))]
    assert 60 < sum(rising) < 140
    assert all(random_crop(image, rng(s), 32, PLAIN)[0, -1, 0] > 0 for s in range(50))


def test_reduction_is_antialiased() -> None:
    """A one-pixel checkerboard reduced to a third is flat gray; without a filter it stays black and white."""
    y, x = np.mgrid[0:768, 0:768]
    board = np.repeat((255 * ((x + y) % 2)).astype(np.uint8)[..., None], 3, axis=-1)
    crop = random_crop(board, rng(), 64, CropConfig(short_side_min=200, short_side_max=256, flat=0.0))
    assert np.abs(crop.astype(int) - 127).max() < 12
    assert np.abs(resize_center_crop(board, 200).astype(int) - 127).max() < 12


def test_scaling_the_region_equals_scaling_the_whole_picture() -> None:
    """No seam: the filter sees beyond the crop's edge."""
    noise = rng().integers(0, 256, (300, 420, 3), dtype=np.uint8)
    crop = resize_center_crop(noise, (50, 40))
    left = (420 - 240) / 2
    whole = Image.fromarray(noise).resize((40, 50), Image.Resampling.LANCZOS, box=(left, 0, left + 240, 300))
    assert np.abs(crop.astype(int) - np.asarray(whole).astype(int)).max() <= 1


def test_flat_crops_have_no_edges_and_the_colors_of_the_picture() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = (200, 100, 50)
    for seed in range(20):
        crop = random_crop(image, rng(seed), 64, CropConfig(flat=1.0)).astype(int)
        assert max(np.abs(np.diff(crop, axis=0)).max(), np.abs(np.diff(crop, axis=1)).max()) <= 8
        assert (crop.max(axis=(0, 1)) <= (200, 100, 50)).all()


@pytest.mark.parametrize(
    ("shape", "size", "enlarged"),
    [((96, 80), 80, False), ((96, 80), 96, True), ((96, 80), (96, 64), False), ((96, 80), (64, 96), True)],
)
def test_a_crop_knows_whether_its_picture_was_smaller(
    shape: tuple[int, int], size: int | tuple[int, int], enlarged: bool
) -> None:
    assert (cover_scale(*shape, size) > 1) == enlarged


def test_cover_crop_keeps_the_center() -> None:
    image = coordinates(100, 300)
    crop = resize_center_crop(image, 50).astype(float)
    assert crop.shape == (50, 50, 3)
    np.testing.assert_allclose(crop.mean(axis=(0, 1))[:2], [127.5, 127.5], atol=1.5)
    assert crop[0, 0, 0] == pytest.approx(256 / 3, abs=3)  # a third of the width is left out on each side


def test_cover_crop_at_scale_one_copies_pixels() -> None:
    image = picture(64, 91)
    np.testing.assert_array_equal(resize_center_crop(image, 64), image[:, 13:77])
    np.testing.assert_array_equal(resize_center_crop(image, (64, 91)), image)
    assert resize_center_crop(image, (64, 91)).base is None


@pytest.mark.parametrize("size", [8, 200, (24, 100), (333, 17)])
def test_cover_crop_has_the_size_asked_for(size: int | tuple[int, int]) -> None:
    assert resize_center_crop(picture(37, 53), size).shape == (*((size, size) if isinstance(size, int) else size), 3)


def test_preprocessing_record_is_json_and_names_the_size() -> None:
    record = preprocessing_record(256)
    assert json.loads(json.dumps(record)) == record
    assert record == preprocessing_record((256, 256)) != preprocessing_record((256, 264))


@pytest.mark.parametrize("wrong", [{"short_side_min": 0}, {"short_side_min": 900}, {"flat": 1.5}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="crop"):
        CropConfig(**wrong)  # type: ignore[arg-type]
