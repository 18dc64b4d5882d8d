from __future__ import annotations

import contextlib
import random
import re
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm_vae.data.decoding import DecodeLimits, ImageRejected, decode_image, read_regular_file
from tests.data.encoded import adam7_png, chunk, encode, picture, raw_png, swapped_srgb_profile

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
    colored = encode(picture(), icc_profile=gray_profile(1.0))  # one of gray beside colors
    np.testing.assert_array_equal(decode_image(colored), picture())
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


def text_chunk(kind: str, content: bytes, large: bool = True) -> bytes:
    noise = np.random.default_rng(0).integers(65, 90, 2 << 20 if large else 9, dtype=np.uint8).tobytes()
    packed = zlib.compress(content + noise)
    bodies = {
        "zTXt": b"Comment\0\0" + packed,
        "iTXt": b"XML:com.adobe.xmp\0\1\0\0\0" + packed,
        "iCCP": b"profile\0\0" + packed,
    }
    return chunk(kind.encode(), bodies[kind])


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_a_png_with_megabytes_of_text_is_read(kind: str) -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in picture())
    many = [text_chunk("zTXt", b"", large=False), text_chunk(kind, b"")]
    np.testing.assert_array_equal(decode_image(raw_png(64, 48, 8, 2, rows, *many)), picture())


def test_megabytes_of_text_keep_the_orientation_and_the_profile() -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in picture()[::-1, ::-1])
    xmp = b'<rdf:Description tiff:Orientation="3"/>'
    np.testing.assert_array_equal(decode_image(raw_png(64, 48, 8, 2, rows, text_chunk("iTXt", xmp))), picture())
    profile = text_chunk("iCCP", swapped_srgb_profile())
    pixels = decode_image(raw_png(64, 48, 8, 2, rows, profile))
    assert difference(pixels, picture()[::-1, ::-1, [1, 0, 2]]) < 1.5


def gray_profile(gamma: float) -> bytes:
    """A version 2 profile of gray with a curve of one gamma, white D50."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * v) for v in (0.9642, 1.0, 0.8249)))
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"gray\0" + bytes(78)
    texts = [(b"desc", name), (b"wtpt", white), (b"kTRC", curve)]
    table, body, place = struct.pack(">I", len(texts)), b"", 128 + 4 + 12 * len(texts)
    for tag, text in texts:
        text += bytes(-len(text) % 4)
        table += struct.pack(">4sII", tag, place + len(body), len(text))
        body += text
    head = bytes(8) + struct.pack(">I4s4s4s", 0x02400000, b"mntr", b"GRAY", b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">3i", *(round(65536 * v) for v in (0.9642, 1.0, 0.8249)))
    head += bytes(128 - len(head))
    return struct.pack(">I", len(head) + len(table) + len(body)) + head[4:] + table + body


def srgb_of_linear(light: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, of light in [0, 1], in 0 to 255."""
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
def test_a_gray_profile_is_converted_to_srgb(depth: int, alpha: bool, keyed: bool) -> None:
    """Linear light: 128 of 255 is 188 in sRGB."""
    top = 255 if depth == 8 else 65535
    levels = np.linspace(0, top, 64).round().astype(">u2" if depth == 16 else "u1")[None].repeat(16, axis=0)
    opaque = np.ones_like(levels, bool)
    channels = [levels]
    if alpha:
        opaque[:8] = False
        channels.append(np.where(opaque, top, 0).astype(levels.dtype))
    key = []
    if keyed and not alpha:
        key = [chunk(b"tRNS", struct.pack(">H", int(levels[0, 9])))]
        opaque[:, 9] = False
    rows = b"".join(b"\0" + row.tobytes() for row in np.stack(channels, axis=-1).astype(levels.dtype))
    profile = chunk(b"iCCP", b"gray\0\0" + zlib.compress(gray_profile(1.0)))
    pixels = decode_image(raw_png(64, 16, depth, 4 if alpha else 0, rows, profile, *key))
    eight = levels >> 8 if depth == 16 else levels
    expected = np.where(opaque, srgb_of_linear(eight / 255), 255)
    compared = (eight >= 16) | ~opaque  # below, the curve is too steep for the 8 bits of the conversion
    assert np.abs(pixels - expected[..., None])[compared].max() < 1.5


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_transparent_color_of_sixteen_bits_is_compared_in_all_of_them(interlaced: bool) -> None:
    key = np.array([0x1234, 0x5678, 0x9ABC], ">u2")
    color = np.tile(key, (8, 16, 1))
    color[:, 4:8, 2] += 1  # the low byte of one channel differs
    color[:, 8:12] = 0x1200
    color[:, 12:] = 0
    expected = np.where((color == key).all(-1, keepdims=True), 255, color >> 8)
    rows = b"".join(b"\0" + row.tobytes() for row in color)
    transparent = chunk(b"tRNS", key.tobytes())
    if interlaced:
        data = adam7_png(color, 16, 2, transparent)
    else:
        data = raw_png(16, 8, 16, 2, rows, transparent)
    np.testing.assert_array_equal(decode_image(data), expected)
    gray = color[..., 2]
    rows = b"".join(b"\0" + row.tobytes() for row in gray)
    data = raw_png(16, 8, 16, 0, rows, chunk(b"tRNS", key[2:].tobytes()))
    np.testing.assert_array_equal(decode_image(data)[..., 0], np.where(gray == key[2], 255, gray >> 8))


def test_reasons_speak_of_pictures_and_not_of_code() -> None:
    """Of many damaged files: nothing that only a programmer understands."""
    rng, said = random.Random(1), set()
    originals = [encode(picture(), name, **LOSSY.get(name, {})) for name in (*LOSSLESS, *LOSSY, "GIF")]
    for number in range(600):
        data = bytearray(originals[number % len(originals)])
        for _ in range(4):
            data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
        try:
            decode_image(bytes(data))
        except ImageRejected as error:
            said.add(str(error))
    assert len(said) > 5
    code = re.compile(r"Error|Exception|None|object|\w_\w|[a-z][A-Z]|<|b'|\w\.\w")
    assert [text for text in said if code.search(text)] == []


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


def test_reading_takes_the_memory_of_the_file_and_not_of_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(picture()))
    tracemalloc.start()
    try:
        assert read_regular_file(path, 256 << 20) == read_regular_file(path) == path.read_bytes()
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert read_regular_file(path, 5) == path.read_bytes()[:5]


def test_the_array_is_writable_and_owns_its_pixels() -> None:
    data = encode(picture())
    pixels = decode_image(data)
    pixels[:] = 0
    np.testing.assert_array_equal(decode_image(data), picture())
