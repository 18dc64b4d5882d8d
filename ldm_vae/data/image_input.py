"""Images and masks as arguments of functions: files, PIL images, arrays and tensors, all by the rules of `decoding`.

What the numbers of an array or tensor mean:

- whole numbers are 0 to 255; numbers of 16 bits are 0 to 65535 where one is above 255;
- floats are 0 to 1, and -1 to 1 where one is negative, over all images of the call together;
- everything else is refused, as are images whose only numbers are 0 and 1.

A mask marks with white: 1, 255, or the only value beside 0. On transparent ground, what is painted white is marked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.data import decoding
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.errors import UserError

logger = logging.getLogger(__name__)

ImageInput = Any
"""A file (str or Path), a PIL image, an array (h, w), (h, w, c) or (n, h, w, c), a tensor (h, w), (c, h, w) or
(n, c, h, w) of c = 1, 3 or 4 channels (the fourth is alpha), or a list of these."""

CHANNELS = (1, 3, 4)
ROUNDING = 1e-3
"""How far floats may lie outside of their range."""
COLORED = 0.25
"""A mask whose channels differ by more than this, on a scale of 0 to 1, counts as colored."""
SHAPES = "give files, PIL images, (h, w, 3) arrays, (3, h, w) tensors, or lists of these"


def image_batch(image: ImageInput, where: str = "image") -> Tensor:
    """Images of one size as float32 (n, 3, h, w) in [0, 1]; transparent pixels on white.

    Raises:
        UserError: naming `where`, for what is not an image, numbers outside of their range, or several sizes.
    """
    arrays = [array for one in _items(image, where) for array in _arrays(one, where, decoding.image_pixels)]
    signed = _is_signed([array for array in arrays if array.dtype.kind == "f"], where)
    return _stacked([_color(array, signed, where) for array in arrays], where)


def mask_batch(mask: ImageInput, where: str = "mask") -> Tensor:
    """Masks of one size as float32 (n, 1, h, w): 0 is unmarked, 1 is marked, soft edges lie between.

    Raises:
        UserError: naming `where`, for what is not a mask, or not black and white.
    """
    arrays = [array for one in _items(mask, where) for array in _arrays(one, where, decoding.mask_pixels)]
    return _stacked([torch.from_numpy(mask_values(array, where))[None] for array in arrays], where)


def report_mask(marked: Tensor, where: str = "mask") -> None:
    """Log one line where a mask, bool (n, 1, h, w), marks nothing, or everything."""
    shares = marked.flatten(1).float().mean(1)
    for what, found in (("nothing, so that nothing changes", shares == 0), ("everything", shares == 1)):
        if bool(found.any()):
            which = "" if len(shares) == 1 else f" {int(found.nonzero()[0])} of {len(shares)}"
            logger.warning("%s%s: marks %s", where, which, what)


# Every accepted input, as arrays (h, w, c).


def _items(image: ImageInput, where: str) -> list[Any]:
    items = list(image) if isinstance(image, list | tuple) else [image]
    if not items:
        raise UserError(where, "an empty list", SHAPES)
    return items


def _arrays(one: Any, where: str, convert: Any) -> Iterator[np.ndarray]:
    """One file, PIL image, array or tensor as arrays (h, w, c); `convert` is for PIL images."""
    if isinstance(one, str | Path):
        read = decoding.read_image if convert is decoding.image_pixels else decoding.read_mask
        yield from _readable(read, Path(one).expanduser(), f"{where}: {one}")
    elif isinstance(one, Image.Image):
        yield from _readable(convert, one, where)
    elif isinstance(one, Tensor):
        values = one.detach().cpu()
        yield from _by_shape((values.float() if values.is_floating_point() else values).numpy(), where, tensor=True)
    elif isinstance(one, np.ndarray):
        yield from _by_shape(one, where, tensor=False)
    else:
        raise UserError(where, f"{type(one).__name__} is not an image", SHAPES)


def _readable(read: Any, source: Any, where: str) -> Iterator[np.ndarray]:
    try:
        yield read(source)
    except ImageRejected as error:
        raise UserError(where, f"cannot be read ({error})", "give another image") from error


def _by_shape(values: np.ndarray, where: str, tensor: bool) -> Iterator[np.ndarray]:
    """(h, w, c) arrays of one array or tensor; a tensor has its channels before the sides."""
    shape = values.shape
    if values.ndim == 2:
        values = values[None, ..., None]
    elif values.ndim in (3, 4):
        values = values if values.ndim == 4 else values[None]
        values = np.moveaxis(values, 1, -1) if tensor else values
    if values.ndim != 4 or values.shape[-1] not in CHANNELS or not values.size:
        raise UserError(where, f"its shape is {shape}", SHAPES)
    if values.dtype.kind not in "buif":
        raise UserError(where, f"its numbers are {values.dtype}", "give uint8, or floats from 0 to 1")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(where, "holds numbers that are not finite", "give floats from 0 to 1")
    yield from values


def _stacked(images: list[Tensor], where: str) -> Tensor:
    sizes = list(dict.fromkeys(f"{image.shape[-2]} x {image.shape[-1]}" for image in images))
    if len(sizes) > 1:
        raise UserError(where, f"sizes of {sizes[0]} and {sizes[1]} pixels in one call", "give all of one size")
    return torch.stack(images)


# Images: what their numbers mean.


def _color(array: np.ndarray, signed: bool, where: str) -> Tensor:
    """(h, w, c) of any numbers -> float32 (3, h, w) in [0, 1]."""
    if array.dtype.kind != "f":
        pixels = _eight_bits(array, where)
        if array.shape[-1] != 3:  # gray, or with alpha: as in a file
            pixels = decoding.image_pixels(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels))
        return torch.from_numpy(np.ascontiguousarray(pixels)).float().movedim(-1, 0) / 255
    values = torch.from_numpy(np.ascontiguousarray(array)).float().movedim(-1, 0)
    if signed:
        values = (values + 1) / 2
    values = values.clamp(0, 1)
    if len(values) == 4:
        if signed:
            raise UserError(where, "negative numbers beside an alpha channel", "give floats from 0 to 1")
        values = values[:3] * values[3:] + (1 - values[3:])
    return values.expand(3, -1, -1)


def _eight_bits(array: np.ndarray, where: str) -> np.ndarray:
    """Bool or whole numbers -> uint8."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    low, high = int(array.min()), int(array.max())
    if array.dtype == np.uint16 and high != 0:
        if high <= 255:
            raise UserError(where, f"16-bit numbers up to {high} only", "give uint8 for 0 to 255")
        return (array >> 8).astype(np.uint8)
    if low < 0 or high > 255:
        raise UserError(where, f"whole numbers from {low} to {high}", "give 0 to 255")
    if high == 1:
        raise UserError(where, "whole numbers 0 and 1 only", "give 0 to 255, floats from 0 to 1, or bool")
    return array.astype(np.uint8)


def _is_signed(floats: list[np.ndarray], where: str) -> bool:
    """Whether floats are in [-1, 1] instead of [0, 1]. Raises: UserError for another range."""
    low = min((float(array.min()) for array in floats), default=0.0)
    high = max((float(array.max()) for array in floats), default=0.0)
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        cure = "divide by 255, or give uint8" if low >= 0 and 2 <= high <= 255.5 else "scale them to 0 to 1"
        raise UserError(where, f"floats from {low:.4g} to {high:.4g}", cure)
    if low < -ROUNDING:
        logger.warning("%s: floats from %.4g to %.4g are taken as -1 (black) to 1 (white)", where, low, high)
    return low < -ROUNDING


# Masks: what is marked.

ADVICE = "give black and white (0 and 255, 0 and 1, or bool), white for what is marked"


def mask_values(array: np.ndarray, where: str) -> np.ndarray:
    """A mask (h, w, c) of any numbers -> float32 (h, w), 0 is unmarked and 1 is marked.

    Raises:
        UserError: naming `where`, for a mask that is colored or too dark, or numbers outside of their range.
    """
    values = array.astype(np.float32) / _white(array, where)
    colors = values[..., :3] if array.shape[-1] < 4 else _on_black(values, where)
    if colors.shape[-1] == 3 and (np.ptp(colors, axis=-1) > COLORED).any():
        raise UserError(where, "is colored", ADVICE)
    gray = colors.mean(axis=-1).clip(0, 1)
    if 0 < gray.max() <= 0.5:
        raise UserError(where, f"is dark everywhere, at most {gray.max():.2g} of white", ADVICE)
    return gray


def _white(array: np.ndarray, where: str) -> int:
    """The number that stands for white: 1, 255 or 65535."""
    low, high = float(array.min()), float(array.max())
    floats = array.dtype.kind == "f"
    rounding = ROUNDING if floats else 0
    if low >= -rounding and high <= 1 + rounding:
        return 1
    if low < 0 or high > 65535 or (floats and high != 255):
        raise UserError(where, f"numbers from {low:.4g} to {high:.4g}", ADVICE)
    return 255 if high <= 255 else 65535


def _on_black(values: np.ndarray, where: str) -> np.ndarray:
    """(h, w, 4) in [0, 1] -> colors (h, w, 3): what is transparent is unmarked."""
    colors, alpha = values[..., :3], values[..., 3:]
    if (alpha == 1).all():
        return colors
    if ((colors > COLORED / 2) & (colors < 1 - COLORED / 2) & (alpha > 0.5)).any():
        raise UserError(where, "is a picture with transparent parts", ADVICE)
    if (alpha > 0.5).any() and not (colors * alpha > 0.5).any():
        raise UserError(where, "is black on transparent ground", ADVICE)
    return colors * alpha
