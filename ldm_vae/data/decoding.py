"""Decode image files to 8-bit sRGB pixels, safely and always by the same rules.

Files are not trusted: few formats are accepted, limits on bytes and pixels are checked before decoding, and any error
inside a decoder becomes an `ImageRejected` with a reason. The rules:

- the EXIF orientation is applied;
- an embedded color profile, of gray or color, is converted to sRGB; an invalid profile is ignored;
- transparent pixels are blended with white;
- 16-bit gray keeps its high byte, as PIL does for 16-bit RGB; palettes, CMYK, YCbCr and LAB become RGB;
- text beside the pixels that is too large to read is left out;
- float and 32-bit pixels have no defined range and are rejected;
- of an animation or a multi-page file, the first frame is used.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif"}
    | {".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"}
)

HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
"""Brands in the first bytes of HEIC photos."""

HIGHEST_MEGAPIXELS = 178  # PIL itself refuses more
LOWEST_SIDE = 8
LARGEST_PROFILE_BYTES = 4 << 20
STRIP_PIXELS = 1 << 21
"""Rows converted at a time, so that only the decoder's result and ours are fully in memory."""

SLOW_DECODERS = {"ppm": "PPM of that depth", "ppm_plain": "PPM as text", "bmp_rle": "BMP with run lengths"}
SLOW_BYTES = 2 << 20
"""PIL decodes these formats in Python, at up to a microsecond per byte."""

MOST_SCANNED_PIXELS = 1280 * 10**6
"""Scans times pixels of a JPEG: each scan visits every pixel, but may take only a few bytes (LJT-01-005)."""
CODE = re.compile(r"[<>'=]|[a-z][A-Z]|[A-Za-z]_|[A-Za-z]\.[A-Za-z]|object|Error\b")
"""What is in sentences about code and not in those about pictures."""
ZLIB_START = re.compile(rb"\0[\x08\x18\x28\x38\x48\x58\x68\x78]")
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

ORIENTATION = 0x0112


class ImageRejected(ValueError):
    """An image that cannot be used. `reason` is a short code, the message does not name the file.

    Both are stored in latent sets, in the rows of a shard's index: another message would give other bytes.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class DecodeLimits:
    """Limits that are checked before decoding: megapixels of the picture, bytes of the file."""

    megapixels: int = 64
    file_bytes: int = 512 << 20


def decode_image(data: bytes, limits: DecodeLimits = DecodeLimits()) -> np.ndarray:
    """Decode to sRGB pixels, uint8 (h, w, 3), by the rules above.

    Raises:
        ImageRejected: with reason `empty`, `too_large`, `too_slow`, `unknown_format`, `too_small`, `undecodable`,
            `unsupported_pixels` or `out_of_memory`.
    """
    return _decode(data, limits, _upright_rgb)


def image_pixels(image: Image.Image) -> np.ndarray:
    """The pixels of a PIL image, by the rules of files: uint8 (h, w, 3). Raises: ImageRejected."""
    with _rejecting():
        image.load()
        return _upright_rgb(image)


def mask_pixels(image: Image.Image) -> np.ndarray:
    """The numbers that a PIL image of a mask holds, with its orientation applied. Raises: ImageRejected.

    Returns:
        (h, w, c): c is 1 (bool, 8 or 16 bits, or float), 3 (RGB) or 4 (RGB and alpha). Color profiles are not used.
    """
    with _rejecting():
        image.load()
        return _upright_numbers(image)


def _decode(data: bytes, limits: DecodeLimits, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    if not data:
        raise ImageRejected("empty", "the file is empty")
    if len(data) > limits.file_bytes:
        raise ImageRejected("too_large", f"more than {limits.file_bytes >> 20} MiB")
    with _rejecting():
        try:
            return convert(_loaded(data, limits))
        except ImageRejected:
            raise
        except Exception:
            smaller, profile = _without_large_text(data)
            if len(smaller) == len(data):
                raise
        image = _loaded(smaller, limits)
        if profile:
            image.info["icc_profile"] = profile
        return convert(image)


def _loaded(data: bytes, limits: DecodeLimits) -> Image.Image:
    image: Image.Image = _opened(data)
    _check_size(image, limits)
    _check_time(image, data)
    wide = _is_wide_color(image)
    image.load()  # not verify(), which accepts truncated files
    _check_size(image, limits)
    return _with_wide_key(image, data) if wide else image


XMP = b"XML:com.adobe.xmp"
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
LARGEST_TEXT_BYTES = 1 << 20
MOST_TEXT_BYTES = 16 << 20
"""Largest size of one text in a PNG, and of all texts, besides the pixels."""


def _without_large_text(data: bytes) -> tuple[bytes, bytes]:
    """A PNG without the texts and the profile that PIL takes for a bomb; and that profile, if it is not too large."""
    if not data.startswith(b"\x89PNG"):
        return data, b""
    kept, place, total, profile = [data[:8]], 8, 0, b""
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + length
        whole = data[place:end]
        place = end
        if kind == b"iCCP":
            size, text = _inflated(whole, LARGEST_PROFILE_BYTES)
            if size > LARGEST_TEXT_BYTES:
                profile = text if size <= LARGEST_PROFILE_BYTES else b""
                continue
        elif kind in TEXT_CHUNKS:
            size, text = _inflated(whole, LARGEST_TEXT_BYTES)
            if total + min(size, LARGEST_TEXT_BYTES) > MOST_TEXT_BYTES:
                continue
            total += min(size, LARGEST_TEXT_BYTES)
            if size > LARGEST_TEXT_BYTES:
                if not whole[8:].startswith(XMP):
                    continue
                body = b"iTXt" + XMP + bytes(5) + text[:LARGEST_TEXT_BYTES]  # its beginning may have the orientation
                whole = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        kept.append(whole)
    return b"".join(kept), profile


def _inflated(chunk: bytes, limit: int) -> tuple[int, bytes]:
    """(bytes of the text of a PNG chunk, limit + 1 if there are more; the text), read where a zlib stream begins."""
    for start in (match.end() - 1 for match in ZLIB_START.finditer(chunk, 8, 8 + 512)):
        with contextlib.suppress(zlib.error):
            text = zlib.decompressobj().decompress(chunk[start:-4], limit + 1)
            return len(text), text
    return len(chunk), b""


def _is_wide_color(image: Image.Image) -> bool:
    """Whether a color of 16 bits a channel is transparent, of which PIL would compare the high bytes only."""
    tiles = getattr(image, "tile", [])
    return "transparency" in image.info and len(tiles) == 1 and tiles[0][3] == "RGB;16B"


def _with_wide_key(image: Image.Image, data: bytes) -> Image.Image:
    """The picture, with an alpha channel in place of its transparent color."""
    key = np.array(image.info.pop("transparency"), np.uint16)
    low = _opened(data)
    low.tile = [low.tile[0]._replace(args="RGB;16L")]  # the other byte of each number
    low.load()
    same = (np.asarray(image) == key >> 8).all(-1)
    same &= (np.asarray(low) == key & 255).all(-1)
    image.putalpha(Image.fromarray(np.where(same, 0, 255).astype(np.uint8)))
    return image


@contextlib.contextmanager
def _rejecting() -> Iterator[None]:
    """Turn every error of a decoder into an `ImageRejected`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # silence PIL's warnings about odd metadata; sizes are checked
            yield
    except ImageRejected:
        raise
    except MemoryError as error:
        raise ImageRejected("out_of_memory", "the decoder ran out of memory") from error
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, EOFError ...
        raise ImageRejected("undecodable", _damage(error)) from error


def _damage(error: Exception) -> str:
    """What a decoder says, unless it speaks of code."""
    lines = str(error).splitlines()
    return (
        f"damaged: {lines[0][:200]}" if lines and not CODE.search(lines[0]) else "damaged, or not written by its rules"
    )


def _opened(data: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
            raise ImageRejected("unknown_format", "HEIC, which is not read; save the image as JPEG") from error
        raise ImageRejected("unknown_format", f"none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageRejected("too_large", f"more than {HIGHEST_MEGAPIXELS} megapixels") from error


def _check_size(image: Image.Image, limits: DecodeLimits) -> None:
    width, height = image.size
    if width * height > limits.megapixels * 10**6:
        raise ImageRejected(
            "too_large",
            f"{width}x{height} is more than {limits.megapixels} megapixels; "
            "raise data.maximum_megapixels or reduce the image",
        )
    if min(width, height) < LOWEST_SIDE:
        raise ImageRejected("too_small", f"{width}x{height} is less than {LOWEST_SIDE} pixels wide or high")


def _check_time(image: Image.Image, data: bytes) -> None:
    tiles = getattr(image, "tile", [])
    if len(data) > SLOW_BYTES and any(tile[0] in SLOW_DECODERS for tile in tiles):
        raise ImageRejected(
            "too_slow", f"more than {SLOW_BYTES >> 20} MiB of {SLOW_DECODERS[tiles[0][0]]}; save the image as PNG"
        )
    if image.format in ("JPEG", "MPO"):
        scans = count_scans(data)
        if scans * image.width * image.height > MOST_SCANNED_PIXELS:
            raise ImageRejected("too_slow", f"{scans} scans of {image.width}x{image.height}; save the image anew")


def count_scans(data: bytes) -> int:
    """The number of scans in a JPEG, up to its end marker; anything after that is ignored."""
    scans, place = 0, 2
    while (marker := JPEG_MARKER.search(data, place)) and marker.group() != b"\xff\xd9":
        scans += marker.group() == b"\xff\xda"
        place = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    return scans


def _upright_rgb(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(_upright(_rgb_pixels(image), _orientation(image)))


def _upright_numbers(image: Image.Image) -> np.ndarray:
    """See `mask_pixels`."""
    alpha = _wide_gray_alpha(image)
    if alpha is not None:
        image = Image.merge("RGBA", [*[_high_bytes(image)] * 3, alpha])
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("1", "L", "I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("RGB")
    values = np.asarray(image).reshape(image.height, image.width, -1)
    return np.array(_upright(values, _orientation(image)))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation to (h, w, c): rows and columns reversed, then transposed."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8. (PIL's TIFF reader has already applied it and reports 1.)"""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF is ignored
        return 1


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    """Any mode -> uint8 (h, w, 3) on white, in sRGB."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows, gray = max(1, STRIP_PIXELS // width), _has_gray_profile(image)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(_to_rgb(image.crop((0, top, width, bottom)), image.format, gray))
    return pixels


def _has_gray_profile(image: Image.Image) -> bool:
    """Whether the profile is one of gray, and so is the picture. (PIL makes gray with alpha of 16 bits RGBA.)"""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or profile[16:20] != b"GRAY":
        return False
    if image.mode not in ("RGB", "RGBA"):
        return image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    red, green, blue = image.split()[:3]
    return not any(ImageChops.difference(red, other).getbbox() for other in (green, blue))


def _is_wide_gray(image: Image.Image, format: str | None) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM"))


def _high_bytes(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def _wide_gray_alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel of 16-bit gray with a transparent value; None for other pictures."""
    key = image.info.get("transparency")
    if not image.mode.startswith("I") or not isinstance(key, int):
        return None
    return Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))


def _to_rgb(image: Image.Image, format: str | None, gray: bool) -> Image.Image:
    """`gray`: the profile is one of gray."""
    profile, alpha = image.info.get("icc_profile"), None
    if _is_wide_gray(image, format):
        alpha = _wide_gray_alpha(image)
        image = _high_bytes(image)
    elif image.mode in ("I", "F"):
        advice = "have no defined range; save the image with 8 or 16 bits"
        raise ImageRejected("unsupported_pixels", f"pixels of mode {image.mode} {advice}")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    if gray:
        image = image.convert("L")
    elif image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    color = _to_srgb(image, profile)
    if alpha is None:
        return color
    return Image.composite(color, Image.new("RGB", image.size, "white"), alpha)


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    if isinstance(profile, bytes) and 128 < len(profile) <= LARGEST_PROFILE_BYTES:
        try:
            transform = _profile_transform(profile, image.mode)
            if transform is not None:
                return transform.apply(image)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a profile that does not parse, or one for another kind of pixels
    return image.convert("RGB")


@lru_cache(maxsize=16)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of a profile's colors to sRGB; None if they are sRGB already."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if (source.profile.profile_description or "").startswith("sRGB"):
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


# Reading files with untrusted names: regular files only, so that pipes and devices cannot block.


def read_image(path: str | Path) -> np.ndarray:
    """The picture in a file, uint8 (h, w, 3). Raises: ImageRejected."""
    return decode_image(read_regular_file(path))


def read_mask(path: str | Path) -> np.ndarray:
    """The numbers of the mask in a file, (h, w, c), see `mask_pixels`. Raises: ImageRejected."""
    return _decode(read_regular_file(path), DecodeLimits(), _upright_numbers)


def read_regular_file(path: str | Path, length: int | None = None) -> bytes:
    """The first `length` bytes, or all. Raises: ImageRejected `unreadable`."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageRejected("unreadable", "is no regular file")
            there = status.st_size + 1  # read() takes memory for all that it is asked for
            return file.read(there if length is None else min(length, there))
    except OSError as error:
        raise ImageRejected("unreadable", f"cannot be opened: {error.strerror}") from error
