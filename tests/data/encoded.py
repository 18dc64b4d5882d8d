"""Image files in memory for the tests: a smooth picture in any format and mode, and hand-made PNGs."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth color picture without symmetry, uint8 (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / (width - 1), 255 * y / (height - 1), 127 + 100 * np.sin(x / 9 + y / 17)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def adam7_png(pixels: np.ndarray, depth: int, color_type: int, *extra: bytes) -> bytes:
    """An interlaced PNG of (height, width, c), in the order of bytes of the file: seven passes, each a picture."""
    rows = b""
    for x, y, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        part = pixels[y::dy, x::dx]
        rows += b"".join(b"\0" + row.tobytes() for row in part) if part.size else b""
    return raw_png(pixels.shape[1], pixels.shape[0], depth, color_type, rows, *extra, interlace=1)


def raw_png(
    width: int, height: int, depth: int, color_type: int, rows: bytes, *extra: bytes, interlace: int = 0
) -> bytes:
    """A PNG from already filtered rows; `extra` chunks go before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, interlace))
    pixels = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


def swapped_srgb_profile() -> bytes:
    """sRGB with the red and the green primary exchanged: (r, g, b) of it is (g, r, b) of sRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {}
    for i in range(struct.unpack_from(">I", profile, 128)[0]):
        entries[bytes(profile[132 + 12 * i : 136 + 12 * i])] = 136 + 12 * i
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    profile[red : red + 8], profile[green : green + 8] = profile[green : green + 8], profile[red : red + 8]
    for text in ("sRGB built-in", "sRGB"):
        profile = profile.replace(text.encode("utf-16-be"), ("x" * len(text)).encode("utf-16-be"))
    return bytes(profile)
