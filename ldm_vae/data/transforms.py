"""Crops: random scale and position for training, resize and center crop for encoding and evaluation.

Resizing is antialiased (Lanczos) and reads only the source region that a crop needs. `decoding` handles color,
orientation and bit depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_vae.errors import NotFinite, UserError

LANCZOS_SUPPORT = 3  # source pixels on each side, times the reduction


@dataclass(frozen=True)
class CropConfig:
    """Random training crops.

    The picture is scaled so that its short side is log-uniform between `short_side_min` and `short_side_max`,
    but it is enlarged only if it is smaller than the crop. Downscaling also removes the 8x8 block grid of JPEG,
    which an 8x autoencoder would otherwise learn.

    Args:
        short_side_min: smallest short side of the scaled picture in pixels; a smaller picture or a larger crop takes
            precedence.
        short_side_max: largest short side of the scaled picture in pixels; a larger crop takes precedence.
        flip: flip half of the crops horizontally.
        flat: fraction of crops replaced by a smooth gradient between two colors of the picture; they keep flat
            areas free of artifacts.
    """

    short_side_min: int = 256
    short_side_max: int = 768
    flip: bool = True
    flat: float = 0.04

    def __post_init__(self) -> None:
        if not 1 <= self.short_side_min <= self.short_side_max:
            raise UserError(
                f"crop: short_side_min {self.short_side_min} and short_side_max {self.short_side_max} "
                "are not a valid range; give 1 <= short_side_min <= short_side_max"
            )
        if not 0.0 <= self.flat <= 1.0:
            raise UserError(f"crop.flat: {self.flat} is not a fraction; give 0 to 1")


def random_crop(
    image: np.ndarray, rng: np.random.Generator, size: int, config: CropConfig = CropConfig()
) -> np.ndarray:
    """A random square crop, antialiased. uint8 (h, w, 3) -> uint8 (size, size, 3).

    The number of draws from `rng` is fixed, so equal generators give equal crops.
    """
    height, width = image.shape[:2]
    where_x, where_y, scale, mirror, plain = rng.random(5)
    short = min(height, width)
    smallest = max(size, min(short, config.short_side_min))
    largest = max(smallest, min(short, config.short_side_max))
    target = smallest * (largest / smallest) ** scale
    extent = min(size * short / target, float(short))  # side of the crop in source pixels
    left, top = where_x * (width - extent), where_y * (height - extent)
    if plain < config.flat:
        crop = _gradient(image, rng, size)
    elif extent == size:  # no change of scale: copy whole pixels
        left, top = int(left), int(top)
        crop = image[top : top + size, left : left + size].copy()
    else:
        crop = _resize(image, (left, top, left + extent, top + extent), (size, size))
    return np.ascontiguousarray(crop[:, ::-1]) if config.flip and mirror < 0.5 else crop


def cover_scale(height: int, width: int, size: int | tuple[int, int]) -> float:
    """The smallest scale at which a picture covers `size` (a side, or (height, width)). Above 1, it is enlarged."""
    target_height, target_width = (size, size) if isinstance(size, int) else size
    return max(target_height / height, target_width / width)


def resize_center_crop(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Scale until the picture just covers `size` (a side, or (height, width)), then keep the center.

    uint8 (h, w, 3) -> uint8 (height, width, 3). Smaller pictures are enlarged.
    """
    target_height, target_width = (size, size) if isinstance(size, int) else size
    height, width = image.shape[:2]
    scale = cover_scale(height, width, size)
    if scale == 1.0:
        top, left = (height - target_height) // 2, (width - target_width) // 2
        return image[top : top + target_height, left : left + target_width].copy()
    span_y, span_x = min(target_height / scale, float(height)), min(target_width / scale, float(width))
    left, top = (width - span_x) / 2, (height - span_y) / 2
    return _resize(image, (left, top, left + span_x, top + span_y), (target_height, target_width))


def center_crop(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """`resize_center_crop` with the signature of a training transform; `rng` is not used."""
    return resize_center_crop(image, size)


def preprocessing_record(size: int | tuple[int, int]) -> dict[str, Any]:
    """The preprocessing of `resize_center_crop` and the decoder, for manifests and results (JSON-able)."""
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "version": 1,
        "height": height,
        "width": width,
        "fit": "cover, centre crop",
        "filter": "lanczos, antialiased, 8-bit",
        "colour": "sRGB",
        "alpha": "on white",
        "orientation": "exif",
    }


def _resize(image: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """Lanczos-scale the float `box` (left, top, right, bottom) of an image to `size` (height, width).

    Only the box and the filter's margin are passed to PIL; the result equals resizing the whole picture.
    """
    left, top, right, bottom = box
    margin_x = math.ceil(LANCZOS_SUPPORT * max(1.0, (right - left) / size[1])) + 1
    margin_y = math.ceil(LANCZOS_SUPPORT * max(1.0, (bottom - top) / size[0])) + 1
    x0, y0 = max(0, math.floor(left) - margin_x), max(0, math.floor(top) - margin_y)
    x1 = min(image.shape[1], math.ceil(right) + margin_x)
    y1 = min(image.shape[0], math.ceil(bottom) + margin_y)
    region = Image.fromarray(np.ascontiguousarray(image[y0:y1, x0:x1]))
    shifted = (left - x0, top - y0, min(right - x0, float(x1 - x0)), min(bottom - y0, float(y1 - y0)))
    return np.array(region.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=shifted))


def _gradient(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """A linear gradient in a random direction between the colors of two pixels; one in four is a flat color."""
    rows, columns = rng.integers(image.shape[0], size=2), rng.integers(image.shape[1], size=2)
    start, end = image[rows, columns].astype(np.float32)
    if rng.random() < 0.25:
        end = start
    angle = rng.uniform(0, 2 * math.pi)
    place = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    along = place[:, None] * math.sin(angle) + place[None, :] * math.cos(angle)
    weight = along / (abs(math.sin(angle)) + abs(math.cos(angle))) + 0.5
    return np.clip(start + weight[..., None] * (end - start) + 0.5, 0, 255).astype(np.uint8)


# Pixels as tensors: the only conversion between 8 bits and the [-1, 1] of models, and padding.


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 0..255 of any shape -> float32 in [-1, 1]. `to_uint8` gives back exactly the same values."""
    assert pixels.dtype == torch.uint8, f"from_uint8 takes uint8, got {pixels.dtype}"
    return pixels.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Floats of any shape and precision, clamped to [-1, 1], -> uint8, rounded to the nearest level.

    Raises:
        NotFinite: NaN or infinite numbers.
    """
    return finite_pixels(images.detach().float()).add(1.0).mul_(127.5).clamp_(0.0, 255.0).round_().to(torch.uint8)


def finite_pixels(values: Tensor, where: str = "image") -> Tensor:
    """The same floats. Raises: NotFinite for NaN or infinite numbers, which would be shown as black or white."""
    if not bool(torch.isfinite(values.sum(dtype=torch.float32))):  # a sum needs no second tensor
        raise NotFinite(
            where,
            "holds numbers that are not finite, often an overflow of float16",
            "take precision=bf16 or fp32 (torch_dtype=torch.bfloat16), or upcast the autoencoder with "
            "`autoencoder.to(torch.float32)`",
        )
    return values


def to_batch(image: np.ndarray) -> Tensor:
    """One picture, uint8 (h, w, 3) -> float32 (1, 3, h, w) in [-1, 1]."""
    return from_uint8(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (n, 3, h, w) in [-1, 1] -> n RGB pictures."""
    assert images.shape[1:2] == (3,), f"to_pil takes (n, 3, h, w), got {tuple(images.shape)}"
    rows = to_uint8(images).permute(0, 2, 3, 1).cpu().contiguous().numpy()
    return [Image.fromarray(row) for row in rows]


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Replicate the right and lower border of (n, c, h, w) until both sides are multiples."""
    height, width = images.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images
