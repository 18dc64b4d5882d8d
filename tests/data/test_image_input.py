"""Images and masks in every form that a caller has: read as files are, or refused in one sentence."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.data.decoding import decode_image
from ldm_vae.data.folder import find_pictures
from ldm_vae.data.image_input import image_batch, mask_batch, report_mask
from ldm_vae.errors import UserError
from tests.data.encoded import encode, swapped_srgb_profile

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).movedim(-1, 0)[None] / 255
GRAY = PIXELS[..., 0]
GRAY_EXPECTED = (torch.from_numpy(GRAY)[None, None] / 255).expand(1, 3, 16, 24)
FLOATS = PIXELS.astype(np.float32) / 255


def channels_first(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).movedim(-1, 0)


COLORS = {
    "PIL": Image.fromarray(PIXELS),
    "uint8": PIXELS,
    "batch": PIXELS[None],
    "int64": PIXELS.astype(np.int64),
    "int32 tensor": channels_first(PIXELS).int(),
    "16 bit": PIXELS.astype(np.uint16) << 8,
    "float": FLOATS,
    "float64": FLOATS.astype(np.float64),
    "not contiguous": np.asfortranarray(PIXELS)[::-1][::-1],
    "tensor": channels_first(PIXELS),
    "batch tensor": channels_first(PIXELS)[None] / 255,
    "alpha": np.dstack([PIXELS, np.full((16, 24), 255, np.uint8)]),
    "alpha tensor": torch.cat([channels_first(FLOATS), torch.ones(1, 16, 24)]),
    "list": [Image.fromarray(PIXELS)],
    "tuple": (FLOATS,),
}
GRAYS = {
    "PIL": Image.fromarray(GRAY),
    "(h, w)": GRAY,
    "(h, w, 1)": GRAY[..., None],
    "float (h, w)": FLOATS[..., 0],
    "tensor (h, w)": torch.from_numpy(GRAY),
    "tensor (1, h, w)": torch.from_numpy(GRAY)[None],
    "batch (n, 1, h, w)": torch.from_numpy(GRAY)[None, None] / 255,
}


@pytest.mark.parametrize("form", COLORS)
def test_every_form_of_a_color_image(form: str) -> None:
    assert torch.equal(image_batch(COLORS[form]), EXPECTED)


@pytest.mark.parametrize("form", GRAYS)
def test_every_form_of_a_gray_image(form: str) -> None:
    assert torch.equal(image_batch(GRAYS[form]), GRAY_EXPECTED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floats_with_negative_numbers_are_from_minus_one_to_one(dtype: torch.dtype, caplog: Any) -> None:
    images = image_batch((2 * EXPECTED - 1).to(dtype))
    assert torch.allclose(images, EXPECTED, atol=0.01)
    assert "are taken as -1 (black) to 1 (white)" in caplog.text
    bright = torch.full((1, 3, 16, 24), 0.5)
    both = image_batch([(2 * EXPECTED - 1)[0], bright[0]])  # one range for all
    assert torch.allclose(both[1], torch.tensor(0.75))
    assert torch.equal(image_batch(bright)[0], bright[0])


def rotated() -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = 6
    return Image.open(io.BytesIO(encode(PIXELS, exif=exif)))


def transparent() -> Image.Image:
    return Image.fromarray(np.dstack([PIXELS, np.where(GRAY > 128, 255, 60).astype(np.uint8)]))


FILES = {
    "EXIF": rotated(),
    "transparent": transparent(),
    "gray with alpha": transparent().convert("LA"),
    "palette": Image.fromarray(PIXELS).quantize(16),
    "CMYK": Image.fromarray(PIXELS).convert("CMYK"),
    "two colors": Image.fromarray(PIXELS).convert("1"),
    "16 bit": Image.fromarray(GRAY.astype(np.uint16) * 256),
    "profile": Image.open(io.BytesIO(encode(PIXELS, icc_profile=swapped_srgb_profile()))),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("path", [str, Path])
def test_pil_images_and_files_are_read_as_training_images_are(kind: str, path: Any, tmp_path: Path) -> None:
    image = FILES[kind]
    name = tmp_path / ("image.tif" if image.mode == "CMYK" else "image.png")
    image.save(name, exif=image.getexif(), icc_profile=image.info.get("icc_profile"))
    expected = torch.from_numpy(decode_image(name.read_bytes())).movedim(-1, 0)[None] / 255
    assert torch.equal(image_batch(path(name)), expected)
    assert torch.equal(image_batch(image), expected)


def test_an_array_with_alpha_lies_on_white_as_its_file_does() -> None:
    expected = image_batch(transparent())
    array = np.array(transparent())
    assert torch.equal(image_batch(array), expected)
    assert torch.equal(image_batch(channels_first(array)), expected)
    assert torch.allclose(image_batch(array / np.float32(255)), expected, atol=0.003)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (FLOATS * 255, r"image: floats from \S+ to 255; divide by 255, or give uint8"),
        (channels_first(FLOATS) * 3, r"image: floats from \S+ to 3; divide by 255"),
        (FLOATS * 4 - 2, r"image: floats from -2 to 2; scale them to 0 to 1"),
        (np.where(FLOATS > 0.9, np.nan, FLOATS), "image: holds numbers that are not finite"),
        (torch.full((3, 8, 8), float("inf")), "image: holds numbers that are not finite"),
        (PIXELS.astype(np.int64) - 1, "image: whole numbers from -1 to 254; give 0 to 255"),
        (PIXELS.astype(np.int32) * 2, "image: whole numbers from 0 to 510; give 0 to 255"),
        (PIXELS.astype(np.uint16), "image: 16-bit numbers up to 255 only; give uint8"),
        ((PIXELS > 99).astype(np.int64), "image: whole numbers 0 and 1 only"),
        ((PIXELS > 99).astype(np.uint8), "image: whole numbers 0 and 1 only"),
        (FLOATS.astype(np.complex64), "image: its numbers are complex64"),
        (PIXELS[..., :2], r"image: its shape is \(16, 24, 2\); give files, PIL images"),
        (PIXELS.transpose(2, 0, 1), r"image: its shape is \(3, 16, 24\); give"),
        (torch.from_numpy(PIXELS), r"image: its shape is \(16, 24, 3\); give"),
        (np.zeros((0, 8, 3)), r"image: its shape is \(0, 8, 3\)"),
        (np.zeros((1, 2, 8, 8, 3)), r"image: its shape is \(1, 2, 8, 8, 3\)"),
        ([PIXELS, PIXELS[:8]], "image: sizes of 16 x 24 and 8 x 24 pixels in one call; give all of one size"),
        ([], "image: an empty list"),
        ([1, 2], "image: int is not an image"),
        ({"a": PIXELS}, "image: dict is not an image"),
        ("nowhere.png", "image: nowhere.png: cannot be read"),
        (Path("nowhere.png"), "image: nowhere.png: cannot be read"),
        (Image.fromarray(FLOATS[..., 0]), "image: cannot be read .pixels of mode F have no defined range"),
    ],
)
def test_other_images_are_refused_in_one_sentence(image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        image_batch(image)
    assert len(str(caught.value).splitlines()) == 1


# Masks.

MARKED = np.zeros((16, 24), bool)
MARKED[4:8, 3:11] = True
MASK = torch.from_numpy(MARKED)[None, None].float()
EIGHT = MARKED.astype(np.uint8)


def on_transparent(color: int) -> np.ndarray:
    return np.dstack([np.full((16, 24, 3), color, np.uint8), 255 * EIGHT])


def palette(*colors: int) -> Image.Image:
    image = Image.fromarray(EIGHT, "L").convert("P")
    image.putdata(EIGHT.ravel().tolist())
    image.putpalette(list(colors))
    return image


MASKS = {
    "bool": MARKED,
    "bool tensor": torch.from_numpy(MARKED),
    "0 and 1": EIGHT,
    "0 and 1, int64": EIGHT.astype(np.int64),
    "0 and 1, float": EIGHT.astype(np.float32),
    "0 and 1, PIL": Image.fromarray(EIGHT),
    "0 and 255": EIGHT * 255,
    "0 and 255, float": EIGHT * np.float32(255),
    "0 and 255, int64 tensor": torch.from_numpy(EIGHT).long() * 255,
    "16 bit": EIGHT.astype(np.uint16) * 65535,
    "0 and 1 in 16 bit": Image.fromarray(EIGHT.astype(np.uint16)),
    "two colors": Image.fromarray(MARKED),
    "RGB": np.dstack([EIGHT * 255] * 3),
    "RGB of 0 and 1": Image.fromarray(np.dstack([EIGHT] * 3)),
    "opaque": np.dstack([EIGHT * 255] * 3 + [np.full((16, 24), 255, np.uint8)]),
    "white on transparent": Image.fromarray(on_transparent(255)),
    "white on transparent, gray": Image.fromarray(on_transparent(255)).convert("LA"),
    "white on transparent, array": on_transparent(255),
    "palette": palette(0, 0, 0, 255, 255, 255),
    "palette of 0 and 1": palette(0, 0, 0, 1, 1, 1),
    "(h, w, 1)": EIGHT[..., None],
    "(1, h, w)": torch.from_numpy(EIGHT)[None],
    "(1, 1, h, w)": torch.from_numpy(EIGHT)[None, None],
    "list": [MARKED],
}


@pytest.mark.parametrize("form", MASKS)
def test_every_form_of_a_mask(form: str, tmp_path: Path) -> None:
    mask = MASKS[form]
    assert torch.equal(mask_batch(mask), MASK)
    if isinstance(mask, Image.Image):
        mask.save(tmp_path / "mask.png")
        assert torch.equal(mask_batch(tmp_path / "mask.png"), MASK)


def test_soft_edges_and_turned_masks() -> None:
    soft = np.linspace(0, 1, 16 * 24, dtype=np.float32).reshape(16, 24)
    assert torch.equal(mask_batch(soft)[0, 0], torch.from_numpy(soft))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = Image.open(io.BytesIO(encode(EIGHT * 255, exif=exif)))
    assert torch.equal(mask_batch(turned), MASK.flip(-1, -2))
    assert torch.equal(mask_batch([MARKED, ~MARKED]), torch.cat([MASK, 1 - MASK]))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (PIXELS, "mask: is colored; give black and white"),
        (palette(0, 0, 0, 128, 0, 0), "mask: is colored"),
        (np.dstack([PIXELS, 255 * EIGHT]), "mask: is a picture with transparent parts"),
        (on_transparent(0), "mask: is black on transparent ground"),
        (EIGHT * 20, "mask: is dark everywhere, at most 0.078 of white"),
        (np.arange(16 * 24).reshape(16, 24) % 21, "mask: is dark everywhere"),
        (EIGHT * np.float32(2), "mask: numbers from 0 to 2"),
        (EIGHT * np.float32(2) - 1, "mask: numbers from -1 to 1"),
        (EIGHT.astype(np.int64) - 1, "mask: numbers from -1 to 0"),
        (np.full((16, 24), np.nan), "mask: holds numbers that are not finite"),
        ([MARKED, MARKED[:8]], "mask: sizes of 16 x 24 and 8 x 24 pixels"),
        ("nowhere.png", "mask: nowhere.png: cannot be read"),
        ("mask", "mask: mask: cannot be read"),
    ],
)
def test_other_masks_are_refused_in_one_sentence(mask: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        mask_batch(mask)
    assert len(str(caught.value).splitlines()) == 1


def test_a_mask_of_nothing_or_everything_is_reported(caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    report_mask(MASK > 0)
    assert not caplog.records
    report_mask(torch.zeros(1, 1, 8, 8, dtype=torch.bool))
    report_mask(torch.stack([MASK[0] > 0, MASK[0] > -1]))
    assert [record.getMessage() for record in caplog.records] == [
        "mask: marks nothing, so that nothing changes",
        "mask 1 of 2: marks everything",
    ]


def test_paths_are_found_one_by_one_and_nothing_else_is(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    for given in (str(tmp_path / "a.png"), tmp_path / "a.png", [tmp_path / "a.png"]):
        assert find_pictures(given) == [("a", tmp_path / "a.png")]
    with pytest.raises(UserError, match="images: ndarray is not a path; give image files or folders"):
        find_pictures([PIXELS])  # type: ignore[list-item]
