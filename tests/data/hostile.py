"""A corpus of hostile and odd image files, made by code, each with the pixels or the rejection that must come of it.

Run as a script it decodes, in a process of its own, and prints what that cost as JSON: `python hostile.py folder DIR`
every image of a folder, `python hostile.py mutants COUNT SEED` damaged copies of files of the corpus.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from tests.data.encoded import adam7_png, chunk, encode, picture, raw_png, swapped_srgb_profile

HIGH_QUALITY = {"quality": 95, "subsampling": 0}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
"""EXIF orientation -> how a picture is stored that stands upright with it."""


@dataclass(frozen=True)
class Hostile:
    """A file of the corpus.

    Attributes:
        name: with the suffix that it pretends to be.
        data: its bytes.
        pixels: uint8 (h, w, 3) that must come of it; None: it must be rejected.
        reason: of the rejection.
        tolerance: mean difference in levels; 0: exact.
    """

    name: str
    data: bytes
    pixels: np.ndarray | None = None
    reason: str | None = None
    tolerance: float = 0.0


@lru_cache(maxsize=1)
def corpus() -> tuple[Hostile, ...]:
    """All of them; names are different and sorted."""
    kinds = (formats, turned, colors, depths, frames, phones, scans, odd, broken, bombs)
    found = sorted((file for kind in kinds for file in kind()), key=lambda file: file.name)
    assert len({file.name for file in found}) == len(found)
    return tuple(found)


def formats() -> Iterator[Hostile]:
    """Every format, and suffixes that lie."""
    image = picture()
    for name, format in (("a.png", "PNG"), ("b.bmp", "BMP"), ("c.tif", "TIFF"), ("d.ppm", "PPM")):
        yield Hostile(f"format-{name}", encode(image, format), image)
    yield Hostile("format-lossless.webp", encode(image, "WEBP", lossless=True), image)
    yield Hostile("format-quality.jpg", encode(image, "JPEG", **HIGH_QUALITY), image, tolerance=2)
    yield Hostile("format-quality.webp", encode(image, "WEBP", quality=95), image, tolerance=2.5)
    yield Hostile("format-quality.avif", encode(image, "AVIF", quality=95), image, tolerance=2)
    yield Hostile("format-lzw.tiff", encode(image, "TIFF", compression="tiff_lzw"), image)
    yield Hostile("format-deflate.tiff", encode(image, "TIFF", compression="tiff_adobe_deflate"), image)
    progressive = encode(image, "JPEG", progressive=True, **HIGH_QUALITY)
    yield Hostile("format-progressive.jpg", progressive, image, tolerance=2)
    yield Hostile("format-restarts.jpeg", encode(image, "JPEG", restart_marker_blocks=2, **HIGH_QUALITY), image,
                  tolerance=2)  # fmt: skip
    plain = b"P3 16 8 255\n" + b" ".join(b"%d" % value for value in image[:8, :16].ravel())
    yield Hostile("format-plain.ppm", plain, np.ascontiguousarray(image[:8, :16]))
    yield Hostile("suffix-jpeg-inside.png", encode(image, "JPEG", **HIGH_QUALITY), image, tolerance=2)
    yield Hostile("suffix-png-inside.jpg", encode(image), image)
    yield Hostile("suffix-bmp-inside.webp", encode(image, "BMP"), image)
    yield Hostile("suffix-UPPER.PNG", encode(image), image)


def turned() -> Iterator[Hostile]:
    """EXIF orientations, and EXIF that is broken."""
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(picture()).transpose(turn)
        data = encode(stored, "JPEG", exif=exif, **HIGH_QUALITY)
        yield Hostile(f"exif-{orientation}.jpg", data, picture(), tolerance=2)
        if orientation == 6:
            yield Hostile("exif-6.png", encode(stored, exif=exif), picture())
            yield Hostile("exif-6.tif", encode(stored, "TIFF", exif=exif), picture())
    exif = Image.Exif()
    exif[0x0112] = 99
    yield Hostile("exif-99.png", encode(picture(), exif=exif), picture())
    garbage = b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage"
    yield Hostile("exif-garbage.jpg", encode(picture(), "JPEG", exif=garbage, **HIGH_QUALITY), picture(), tolerance=2)


def colors() -> Iterator[Hostile]:
    """Color spaces, profiles, palettes, transparency."""
    image = Image.fromarray(picture())
    cmyk = image.convert("CMYK")
    yield Hostile("colour-cmyk.jpg", encode(cmyk, "JPEG", **HIGH_QUALITY), picture(), tolerance=2)
    yield Hostile("colour-cmyk.tif", encode(cmyk, "TIFF"), picture(), tolerance=2)
    yield Hostile("colour-ycbcr.tif", encode(image.convert("YCbCr"), "TIFF"), picture(), tolerance=2)
    lab = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
                                    outputMode="LAB")  # fmt: skip
    yield Hostile("colour-lab.tif", encode(lab, "TIFF"), picture(), tolerance=2)
    swapped = picture()[..., [1, 0, 2]]
    for suffix, options in (("png", {}), ("jpg", HIGH_QUALITY), ("webp", {"lossless": True})):
        format = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[suffix]
        data = encode(image, format, icc_profile=swapped_srgb_profile(), **options)
        yield Hostile(f"icc-swapped.{suffix}", data, swapped, tolerance=2)
    yield Hostile("icc-garbage.png", encode(image, icc_profile=b"garbage" * 99), picture())
    half = swapped_srgb_profile()[:300]
    yield Hostile("icc-truncated.png", encode(image, icc_profile=half), picture())
    gray = image.convert("L")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield Hostile("icc-of-colour-on-grey.png", encode(gray, icc_profile=srgb), as_rgb(gray))
    quantized = image.quantize(64)
    yield Hostile("palette.png", encode(quantized), as_rgb(quantized))
    yield Hostile("palette.gif", encode(quantized, "GIF"), as_rgb(quantized))
    pairs = Image.fromarray(np.tile(np.array([0, 1], np.uint8), (8, 8)), "P")
    pairs.putpalette([10, 20, 30, 40, 50, 60])
    expected = np.tile(np.array([[255, 255, 255], [40, 50, 60]], np.uint8), (8, 8, 1))
    yield Hostile("palette-transparent-entry.png", encode(pairs, transparency=0), expected)
    half_seen = np.tile(np.array([[132, 137, 142], [40, 50, 60]], np.uint8), (8, 8, 1))
    yield Hostile("palette-alpha.png", encode(pairs, transparency=bytes([128, 255])), half_seen, tolerance=1)
    rgba = np.zeros((8, 16, 4), np.uint8)
    rgba[..., 0] = 255  # a red that nobody should see
    rgba[:, 8:, 3] = 128
    over_white = np.full((8, 16, 3), 255, np.uint8)
    over_white[:, 8:, 1:] = 127
    yield Hostile("alpha-hidden-red.png", encode(Image.fromarray(rgba)), over_white)
    yield Hostile("alpha-hidden-red.webp", encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), over_white)
    keyed = np.zeros((8, 8, 3), np.uint8)
    keyed[:, 4:] = (1, 2, 3)
    expected = np.where(keyed == 0, 255, keyed).astype(np.uint8)
    yield Hostile("alpha-one-colour.png", encode(keyed, transparency=(0, 0, 0)), expected)


def depths() -> Iterator[Hostile]:
    """1 to 32 bits."""
    ramp = np.linspace(0, 65535, 64 * 16).astype(np.uint16).reshape(16, 64)
    high = np.repeat((ramp >> 8)[..., None], 3, axis=-1).astype(np.uint8)
    yield Hostile("depth-16-grey.png", encode(Image.fromarray(ramp)), high)
    yield Hostile("depth-16-grey.tif", encode(Image.fromarray(ramp), "TIFF"), high)
    yield Hostile("depth-16.pgm", b"P5 64 16 65535\n" + ramp.astype(">u2").tobytes(), high)
    color = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in color)
    yield Hostile("depth-16-colour.png", raw_png(64, 16, 16, 2, rows), (color >> 8).astype(np.uint8))
    for mode in ("1", "L"):
        image = Image.fromarray(picture()).convert(mode)
        yield Hostile(f"depth-{mode}.png", encode(image), as_rgb(image))
    for kind in (np.float32, np.int32):
        image = Image.fromarray(np.full((16, 16), 7, kind))
        yield Hostile(f"depth-{kind.__name__}.tif", encode(image, "TIFF"), reason="unsupported_pixels")
    unlimited = Image.fromarray(np.full((16, 16), np.nan, np.float32))
    yield Hostile("depth-nan.tif", encode(unlimited, "TIFF"), reason="unsupported_pixels")


def frames() -> Iterator[Hostile]:
    """Several pictures in a file: the first counts."""
    first, second = Image.new("RGB", (32, 16), (200, 30, 40)), Image.new("RGB", (32, 16), (0, 255, 0))
    several = {"save_all": True, "append_images": [second]}
    for suffix, format, options in (
        ("gif", "GIF", {}), ("png", "PNG", {}), ("tif", "TIFF", {}), ("webp", "WEBP", {"lossless": True}),
    ):  # fmt: skip
        yield Hostile(f"frames.{suffix}", encode(first, format, **several, **options), np.asarray(first))
    yield Hostile("frames-mpo.jpg", encode(first, "MPO", **several, **HIGH_QUALITY), np.asarray(first), tolerance=2)


def phones() -> Iterator[Hostile]:
    """What cameras and their programs write."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying
    exif[0x010F] = "Maker"
    lying = Image.fromarray(picture()).transpose(TURNS[6])
    gain_map = Image.new("L", (24, 32), 200)
    told = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description hdrgm:Version="1.0"/></x:xmpmeta>'
    options: dict[str, Any] = {"save_all": True, "append_images": [gain_map], "exif": exif, "xmp": told}
    data = encode(lying, "MPO", **options, **HIGH_QUALITY)
    yield Hostile("phone-gain-map.jpg", data, picture(), tolerance=2)
    yield Hostile("phone-turned.avif", encode(lying, "AVIF", exif=exif, quality=95), picture(), tolerance=2)
    composed, apart = "\N{LATIN SMALL LETTER E WITH ACUTE}", "e\N{COMBINING ACUTE ACCENT}"
    yield Hostile(f"phone-name-{apart}.png", encode(picture()), picture())
    yield Hostile(f"phone-name-other-{composed}.png", encode(picture()), picture())
    clear, red = Image.new("RGBA", (32, 16)), Image.new("RGBA", (32, 16), (255, 0, 0, 255))
    data = encode(clear, "WEBP", save_all=True, append_images=[red], lossless=True)
    yield Hostile("phone-sticker.webp", data, np.full((16, 32, 3), 255, np.uint8))


def scans() -> Iterator[Hostile]:
    """Scanners and image editors: 16 bits, gray with alpha, interlacing."""
    wide = picture().astype(np.uint16) * 256 + 77
    yield Hostile("scan-16-colour.tif", color_tiff(wide), picture())
    yield Hostile("scan-16-interlaced.png", adam7_png(wide.astype(">u2"), 16, 2), picture())
    yield Hostile("scan-interlaced.png", adam7_png(picture(), 8, 2), picture())
    gray, alpha = picture()[..., :1], picture()[..., 2:]
    seen = (gray * (alpha / 255) + 255 - alpha).repeat(3, axis=-1)
    both = np.concatenate([gray, alpha], axis=-1)
    yield Hostile("scan-grey-alpha.png", encode(Image.fromarray(both, "LA")), seen, tolerance=1)
    rows = b"".join(b"\0" + row.tobytes() for row in (both.astype(">u2") * 257).astype(">u2"))
    yield Hostile("scan-16-grey-alpha.png", raw_png(64, 48, 16, 4, rows), seen, tolerance=1)


def color_tiff(pixels: np.ndarray) -> bytes:
    """A baseline TIFF of one strip, 16 bits a channel, from uint16 (h, w, 3)."""
    height, width = pixels.shape[:2]
    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14),
        (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, pixels.size * 2),
    ]  # fmt: skip
    body = pixels.astype("<u2").tobytes()
    head = struct.pack("<2sHI", b"II", 42, 14 + len(body)) + struct.pack("<3H", 16, 16, 16)
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return head + body + struct.pack("<H", len(entries)) + table + bytes(4)


def odd() -> Iterator[Hostile]:
    """Right, but unusual."""
    image = picture()
    yield Hostile("tail.jpg", encode(image, "JPEG", **HIGH_QUALITY) + b"\xff\xda\0\0" * 5000, image, tolerance=2)
    yield Hostile("tail.png", encode(image) + bytes(range(256)) * 50, image)
    wide = np.repeat(picture(20, 3000), 10, axis=1)
    yield Hostile("shape-30000x20.png", encode(wide), wide)
    yield Hostile("shape-20x30000.png", encode(np.ascontiguousarray(wide.swapaxes(0, 1))), wide.swapaxes(0, 1))
    yield Hostile("shape-8x8.png", encode(picture(8, 8)), picture(8, 8))
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    text = chunk(b"tEXt", b"Comment\0" + b"<script>alert(1)</script>" * 99)
    yield Hostile("text.png", raw_png(64, 48, 8, 2, rows, text), image)
    yield Hostile("name with\nline and \N{GRINNING FACE}.png", encode(image), image)


def broken() -> Iterator[Hostile]:
    """Nothing to be had from these."""
    image = picture()
    whole = {
        "jpg": encode(image, "JPEG"), "progressive.jpg": encode(image, "JPEG", progressive=True), "png": encode(image),
        "webp": encode(image, "WEBP"), "bmp": encode(image, "BMP"), "gif": encode(image, "GIF"),
        "tif": encode(image, "TIFF"), "avif": encode(image, "AVIF"), "ppm": encode(image, "PPM"),
    }  # fmt: skip
    for suffix, data in whole.items():
        yield Hostile(f"truncated.{suffix}", data[: len(data) * 7 // 10], reason="undecodable")
    yield Hostile("zero-bytes.jpg", b"", reason="empty")
    yield Hostile("one-byte.png", b"\x89", reason="unknown_format")
    yield Hostile("header-only.png", whole["png"][:33], reason="unknown_format")
    yield Hostile("all-zeros.jpg", bytes(len(whole["jpg"])), reason="unknown_format")
    half = len(whole["png"]) // 2
    yield Hostile("zeroed-tail.png", whole["png"][:half] + bytes(half), reason="undecodable")
    flipped = bytearray(whole["png"])
    flipped[half] ^= 1
    yield Hostile("flipped-bit.png", bytes(flipped), reason="undecodable")
    yield Hostile("page.png", b"<html>404 not found</html>", reason="unknown_format")
    yield Hostile("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", reason="unknown_format")
    yield Hostile("document.jpg", b"%PDF-1.7\n1 0 obj", reason="unknown_format")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    yield Hostile("postscript.jpg", postscript, reason="unknown_format")  # would start Ghostscript
    yield Hostile("icon.png", encode(Image.fromarray(picture(32, 32)), "ICO"), reason="unknown_format")
    yield Hostile("archive.webp", b"PK\3\4" + bytes(400), reason="unknown_format")
    for height, width in ((1, 1), (7, 500), (500, 1)):
        data = encode(np.zeros((height, width, 3), np.uint8))
        yield Hostile(f"small-{width}x{height}.png", data, reason="too_small")
    yield Hostile("small-1x1.gif", encode(Image.new("P", (1, 1)), "GIF"), reason="too_small")


def bombs() -> Iterator[Hostile]:
    """Small files that would cost much."""
    yield Hostile("bomb-13000.png", raw_png(13000, 13000, 8, 0, bytes(13001 * 1000)), reason="too_large")
    yield Hostile("bomb-60000.png", raw_png(60000, 60000, 8, 0, b"\0"), reason="too_large")
    moving = bytearray(encode(Image.new("P", (8, 8)), "GIF"))
    moving[6:10] = struct.pack("<HH", 65535, 65535)
    yield Hostile("bomb.gif", bytes(moving), reason="too_large")
    jpeg = bytearray(encode(picture(), "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 65500, 65500)
    yield Hostile("bomb.jpg", bytes(jpeg), reason="too_large")
    bitmap = bytearray(encode(picture(), "BMP"))
    bitmap[18:26] = struct.pack("<ii", 40000, 40000)
    yield Hostile("bomb.bmp", bytes(bitmap), reason="too_large")
    yield Hostile("bomb.ppm", b"P6 30000 30000 255\n" + bytes(99), reason="too_large")
    yield Hostile("bomb-digits.ppm", b"P6 " + b"9" * 99999 + b" 1 255\n", reason="undecodable")
    rows = b"".join(b"\0" + row.tobytes() for row in picture())
    zeros = zeros_compressed(100)
    text, profile = (chunk(kind, b"name\0\0" + zeros) for kind in (b"zTXt", b"iCCP"))
    yield Hostile("bomb-text.png", raw_png(64, 48, 8, 2, rows, text), picture())
    yield Hostile("bomb-profile.png", raw_png(64, 48, 8, 2, rows, profile), picture())
    yield Hostile("bomb-scans.jpg", scan_bomb(4000, 2000), reason="too_slow")
    yield Hostile("slow.ppm", b"P6 1000 1000 100\n" + bytes(3 * 10**6), reason="too_slow")
    yield Hostile("slow-text.ppm", b"P2 1000 1000 255\n" + b"100 " * 10**6, reason="too_slow")
    yield Hostile("slow.bmp", run_length_bitmap(1200), reason="too_slow")


def scan_bomb(side: int, scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = encode(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def run_length_bitmap(side: int) -> bytes:
    """An RLE8 BMP in runs of one pixel."""
    runs = b"\1\5" * (side * side) + b"\0\1"
    offset = 14 + 40 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 1, 1, 256, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset) + header + bytes(1024) + runs


def zeros_compressed(megabytes: int) -> bytes:
    compressor = zlib.compressobj(1)
    return b"".join([*(compressor.compress(bytes(10**6)) for _ in range(megabytes)), compressor.flush()])


def as_rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def check(file: Hostile, read: Callable[[], np.ndarray]) -> str | None:
    """None when `read` does with the file what it must, else what it does."""
    from ldm_vae.data.decoding import ImageRejected

    try:
        pixels = read()
    except ImageRejected as error:
        return None if error.reason == file.reason else f"{file.name}: {error.reason} ({error})"
    if file.pixels is None:
        return f"{file.name}: was read, not {file.reason}"
    if pixels.shape != file.pixels.shape or pixels.dtype != np.uint8:
        return f"{file.name}: {pixels.dtype} {pixels.shape}"
    difference = float(np.abs(pixels.astype(int) - file.pixels.astype(int)).mean())
    return None if difference <= file.tolerance else f"{file.name}: off by {difference:.2f} levels"


def mutants(count: int, seed: int) -> Iterator[bytes]:
    """Files of the corpus that are truncated, flipped or spliced."""
    rng, whole = random.Random(seed), [file.data for file in corpus() if 99 < len(file.data) < 10**5]
    for _ in range(count):
        data = bytearray(rng.choice(whole))
        kind = rng.choice(("truncate", "flip", "splice"))
        if kind == "truncate":
            del data[rng.randrange(len(data)) :]
        elif kind == "flip":
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            other, place, length = rng.choice(whole), rng.randrange(len(data)), rng.randint(1, 200)
            start = rng.randrange(len(other))
            data[place : place + length] = other[start : start + length]
        yield bytes(data)


def costs(reads: Iterator[Callable[[], np.ndarray]]) -> dict[str, float]:
    """How many were read and rejected, CPU seconds of the slowest, most memory that the process had, in megabytes."""
    from ldm_vae.data.decoding import ImageRejected

    found = {"read": 0, "rejected": 0, "seconds": 0.0}
    for read in reads:
        started = time.process_time()
        try:
            pixels = read()
            assert pixels.dtype == np.uint8
            assert pixels.shape[2:] == (3,)
            found["read"] += 1
        except ImageRejected:
            found["rejected"] += 1
        found["seconds"] = max(found["seconds"], time.process_time() - started)
    return found | {"megabytes": peak_megabytes()}


def peak_megabytes() -> float:
    """Most memory that this process had; `getrusage` also counts that of the parent which started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak) / 1024


def main(kind: str, *words: str) -> None:
    from ldm_vae.data.decoding import decode_image
    from ldm_vae.data.folder import FolderSource

    if kind == "folder":
        source = FolderSource(words[0])
        found = costs(partial(source.read, index) for index in range(len(source)))
    else:
        found = costs(partial(decode_image, data) for data in mutants(int(words[0]), int(words[1])))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
