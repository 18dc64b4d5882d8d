from __future__ import annotations

import contextlib
import random
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm_vae.data.decoding import DecodeLimits, ImageRejected, decode_image
from tests.data.encoded import chunk, encode, picture, raw_png, swapped_srgb_profile

LOSSY = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}, "AVIF": {"quality": 95}}
LOSSLESS = ("PNG", "BMP", "TIFF", "PPM")


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def rejection(data: bytes, limits: DecodeLimits | None = None) -> str:
    with pytest.raises(ImageRejected) as caught:
        decode_image(data, limits or DecodeLimits())
    assert str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats_give_exact_pixels(format: str) -> None:
    pixels = decode_image(encode(picture(), format))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, picture())


@pytest.mark.parametrize("format", LOSSY)
def test_lossy_formats_come_close(format: str) -> None:
    assert difference(decode_image(encode(picture(), format, **LOSSY[format])), picture()) < 2.5


def test_palette_and_first_frame_of_an_animation() -> None:
    first, second = Image.new("RGB", (32, 16), (200, 30, 40)), Image.new("RGB", (32, 16), (0, 255, 0))
    animated = encode(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode_image(animated), np.asarray(first))
    quantized = Image.fromarray(picture()).quantize(64)
    np.testing.assert_array_equal(decode_image(encode(quantized)), np.asarray(quantized.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    image = Image.fromarray(picture()).convert(mode)
    np.testing.assert_array_equal(decode_image(encode(image)), np.asarray(image.convert("RGB")))


def test_transparency_lies_on_white_and_hides_its_color() -> None:
    rgba = np.zeros((8, 16, 4), np.uint8)
    rgba[..., 0] = 255  # a hidden red
    rgba[:, 8:, 3] = 128
    for format in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        pixels = decode_image(encode(Image.fromarray(rgba), format, **options))
        assert (pixels[:, :8] == 255).all()
        assert (pixels[:, 8:] == (255, 127, 127)).all()


def test_transparent_palette_entry_and_transparent_color_lie_on_white() -> None:
    palette = Image.fromarray(np.tile(np.array([0, 1], np.uint8), (8, 8)), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    pixels = decode_image(encode(palette, transparency=0))
    assert (pixels[:, 0] == 255).all()
    assert (pixels[:, 1] == (40, 50, 60)).all()
    keyed = np.zeros((8, 8, 3), np.uint8)
    keyed[:, 4:] = (1, 2, 3)
    pixels = decode_image(encode(keyed, transparency=(0, 0, 0)))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == (1, 2, 3)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation(format: str, orientation: int) -> None:
    upright = Image.fromarray(picture())
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = upright.transpose(stored[orientation]) if orientation in stored else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(encode(image, format, exif=exif, **LOSSY.get(format, {})))
    assert difference(pixels, picture()) < 2.5


def test_damaged_exif_changes_nothing() -> None:
    data = encode(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage")
    np.testing.assert_array_equal(decode_image(data), decode_image(encode(picture(), "JPEG")))


def test_sixteen_bits_keep_the_high_byte() -> None:
    ramp = np.linspace(0, 65535, 64 * 16).astype(np.uint16).reshape(16, 64)
    gray = encode(Image.fromarray(ramp))
    tiff = encode(Image.fromarray(ramp), "TIFF")
    pgm = b"P5 64 16 65535\n" + ramp.astype(">u2").tobytes()
    for data in (gray, tiff, pgm):
        np.testing.assert_array_equal(decode_image(data), np.repeat((ramp >> 8)[..., None], 3, axis=-1))
    color = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in color)
    np.testing.assert_array_equal(decode_image(raw_png(64, 16, 16, 2, rows)), color >> 8)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_range_are_rejected(kind: type) -> None:
    assert rejection(encode(Image.fromarray(np.ones((16, 16), kind)), "TIFF")) == "unsupported_pixels"


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr"])
def test_print_colors_come_back(mode: str) -> None:
    image = Image.fromarray(picture())
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    else:
        image = image.convert(mode)
    assert difference(decode_image(encode(image, "TIFF")), picture()) < 3
    if mode == "CMYK":
        assert difference(decode_image(encode(image, "JPEG", quality=95, subsampling=0)), picture()) < 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_color_profile_is_converted_to_srgb(mode: str) -> None:
    image = Image.fromarray(picture()).convert(mode)
    pixels = decode_image(encode(image, icc_profile=swapped_srgb_profile()))
    assert difference(pixels, np.asarray(image.convert("RGB"))[..., [1, 0, 2]]) < 1.5


def test_unusable_color_profiles_are_ignored() -> None:
    gray = Image.fromarray(picture()).convert("L")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for image, profile in ((picture(), b"garbage" * 99), (picture(), srgb), (np.asarray(gray), srgb)):
        expected = np.asarray(Image.fromarray(image).convert("RGB"))
        np.testing.assert_array_equal(decode_image(encode(image, icc_profile=profile)), expected)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM"])
def test_truncated_files_are_rejected(format: str) -> None:
    data = encode(picture(), format)
    for fraction in (0.02, 0.5, 0.9):
        assert rejection(data[: int(len(data) * fraction)]) in ("undecodable", "unknown_format")


def test_other_things_are_rejected() -> None:
    assert rejection(b"") == "empty"
    assert rejection(b"<html>404 not found</html>") == "unknown_format"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    assert rejection(postscript) == "unknown_format"  # would start Ghostscript
    with pytest.raises(ImageRejected, match="HEIC, which is not read; save the image as JPEG"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400))
    assert rejection(encode(picture(4, 64))) == "too_small"
    assert rejection(encode(picture()), DecodeLimits(file_bytes=100)) == "too_large"


def test_a_bomb_is_rejected_before_it_is_decoded() -> None:
    bomb = raw_png(13000, 13000, 8, 0, bytes(13001 * 1000))
    worse = raw_png(60000, 60000, 8, 0, b"\0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rejection(bomb) == "too_large"
        assert rejection(worse) == "too_large"
        assert rejection(encode(picture(1000, 1001)), DecodeLimits(megapixels=1)) == "too_large"
    assert decode_image(encode(picture(1000, 1000)), DecodeLimits(megapixels=1)).shape == (1000, 1000, 3)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_bomb_in_the_metadata_does_not_fill_the_memory(kind: bytes) -> None:
    """300 MB of zeros in a text or profile chunk: decoded without them, or rejected."""
    compressor = zlib.compressobj(9)
    zeros = b"".join([*(compressor.compress(bytes(10**6)) for _ in range(300)), compressor.flush()])
    rows = b"".join(b"\0" + row.tobytes() for row in picture())
    data = raw_png(64, 48, 8, 2, rows, chunk(kind, b"name\0\0" + zeros))
    tracemalloc.start()
    try:
        with contextlib.suppress(ImageRejected):
            np.testing.assert_array_equal(decode_image(data), picture())
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_damaged_files_raise_nothing_else() -> None:
    """Truncation, flipped bytes and spliced blocks: pixels or a rejection, never another exception."""
    rng = random.Random(0)
    image = Image.fromarray(picture())
    originals = [encode(image, name, **LOSSY.get(name, {})) for name in (*LOSSLESS, *LOSSY, "GIF")]
    originals.append(encode(image, "TIFF", compression="tiff_lzw"))
    originals.append(encode(image, icc_profile=swapped_srgb_profile()))
    rejected = 0
    for number in range(400):
        data = bytearray(originals[number % len(originals)])
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(len(data))
            damage = rng.choice(["byte", "cut", "splice"])
            if damage == "byte":
                data[place] = rng.randrange(256)
            elif damage == "cut" and rng.random() < 0.2:
                del data[place + 1 :]
            elif damage == "splice":
                data[place : place + 4] = rng.randbytes(4)
        try:
            pixels = decode_image(bytes(data))
        except ImageRejected as error:
            rejected += bool(error.reason)
            continue
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
    assert 50 < rejected < 400


def test_the_array_is_writable_and_owns_its_pixels() -> None:
    data = encode(picture())
    pixels = decode_image(data)
    pixels[:] = 0
    np.testing.assert_array_equal(decode_image(data), picture())
