"""From the bytes of an image file to 8-bit sRGB pixels, safely and always by the same rules.

Never trusts the file: a short list of formats, caps on bytes and pixels checked before decoding, and whatever
goes wrong inside a decoder becomes an `ImageRejected` with a reason. The rules:

- the picture stands as its EXIF orientation says;
- an embedded colour profile is converted to sRGB; one that does not parse is ignored;
- transparency lies on white;
- 16-bit grey keeps its high byte, as PIL does for 16-bit RGB; palettes, CMYK, YCbCr and LAB become RGB;
- float and 32-bit pixels have no defined range and are rejected;
- of an animation or a multi-page file, the first frame counts.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif"}
    | {".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"}
)

HIGHEST_MEGAPIXELS = 178  # beyond it PIL itself refuses
LOWEST_SIDE = 8
LARGEST_PROFILE_BYTES = 4 << 20

ORIENTATION = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageRejected(ValueError):
    """An image that cannot be used. `reason` is a short code, the message does not name the file."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class DecodeLimits:
    """What is refused before decoding: megapixels of the picture, bytes of the file."""

    megapixels: int = 64
    file_bytes: int = 512 << 20


def decode_image(data: bytes, limits: DecodeLimits = DecodeLimits()) -> np.ndarray:
    """Decode to sRGB pixels, uint8 (h, w, 3), by the rules above.

    Raises:
        ImageRejected: with reason `empty`, `too_large`, `unknown_format`, `too_small`, `undecodable`,
            `unsupported_pixels` or `out_of_memory`.
    """
    if not data:
        raise ImageRejected("empty", "the file is empty")
    if len(data) > limits.file_bytes:
        raise ImageRejected("too_large", f"more than {limits.file_bytes >> 20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd metadata; sizes are checked below
            return _decode(data, limits)
    except ImageRejected:
        raise
    except MemoryError as error:
        raise ImageRejected("out_of_memory", "the decoder ran out of memory") from error
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, EOFError ...
        message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ImageRejected("undecodable", message) from error


def _decode(data: bytes, limits: DecodeLimits) -> np.ndarray:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ImageRejected("unknown_format", f"none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageRejected("too_large", f"more than {HIGHEST_MEGAPIXELS} megapixels") from error
    with image:
        _check_size(image, limits)
        image.load()  # not verify(), which accepts truncated files
        _check_size(image, limits)
        orientation = _orientation(image)
        pixels = _to_rgb(image)
    if orientation in TRANSPOSE:
        pixels = pixels.transpose(TRANSPOSE[orientation])
    return np.array(pixels)


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


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8. (PIL's TIFF reader has already applied it and says 1.)"""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB on white, in sRGB."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        advice = "have no defined range; save the image with 8 or 16 bits"
        raise ImageRejected("unsupported_pixels", f"pixels of mode {image.mode} {advice}")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        colour = _to_srgb(image.convert("RGB"), profile)
        white = Image.new("RGB", image.size, "white")
        return Image.composite(colour, white, image.getchannel("A"))
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    return _to_srgb(image, profile)


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
    """The conversion of a profile's colours to sRGB; None where they are sRGB already."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if (source.profile.profile_description or "").startswith("sRGB"):
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
