"""Images and latents around sampling: input images, decoding in tiles, and interpolation.

Contains the two rules of inpainting, the blending of tiles, and the two interpolations; `data.image_input` reads
images. Pixels are floats in [0, 1] here, as in the outputs `np` and `pt` of the pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_vae.data.image_input import ImageInput, image_batch, mask_batch, report_mask
from ldm_vae.errors import UserError
from ldm_vae.utils.text import pluralize

# Input images: the start of image-to-image and inpainting, and the pixels to keep.


@dataclass(frozen=True)
class InitImage:
    """Images to start from, and the pixels that may change.

    Attributes:
        images: (n, 3, h, w) in [0, 1].
        mask: (n, 1, h, w), true where a pixel is repainted; None: everywhere.
    """

    images: Tensor
    mask: Tensor | None

    def __len__(self) -> int:
        return max(len(self.images), 0 if self.mask is None else len(self.mask))

    def expand(self, count: int) -> InitImage:
        """The same for `count` results; a single image or mask serves all. Raises: UserError for another number."""
        mask = None if self.mask is None else expand_batch(self.mask, count, "mask")
        return InitImage(expand_batch(self.images, count, "image"), mask)

    def latent_mask(self, factor: int) -> Tensor:
        """(n, 1, h/f, w/f): true where the latent may change, because any of its pixels may."""
        assert self.mask is not None
        return F.max_pool2d(self.mask.float(), factor) > 0

    def paste(self, images: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [0, 1], with the original pixels outside the mask."""
        return images if self.mask is None else torch.where(self.mask, images, self.images)


def default_strength(masked: bool) -> float:
    """The default of `strength`: 1 with a mask, so that repainted parts start from noise, else 0.6."""
    return 1.0 if masked else 0.6


def read_init_image(image: ImageInput, mask: ImageInput | None, factor: int) -> InitImage:
    """Images and masks, one or several of each, as `image_batch` and `mask_batch` read them.

    Args:
        image: Its sides are multiples of `factor`. An earlier result of this function is returned unchanged.
        mask: Of the size of the image; pixels above one half are repainted. One line is logged if these are none or
            all.
        factor: Pixels per latent position along a side.

    Raises:
        UserError: images, numbers or sizes that do not fit.
    """
    if isinstance(image, InitImage):
        return image
    images = image_batch(image)
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        near = [max(1, side // factor) * factor for side in (height, width)]
        raise UserError(
            f"image: {height} x {width} pixels cannot be encoded in steps of {factor}; crop or scale it to "
            f"{near[0]} x {near[1]}"
        )
    if mask is None:
        return InitImage(images, None)
    painted = mask_batch(mask) > 0.5
    if painted.shape[-2:] != images.shape[-2:]:
        found = " x ".join(map(str, painted.shape[-2:]))
        raise UserError(f"mask: {found} pixels for an image of {height} x {width}; give one of the same size")
    report_mask(painted)
    return InitImage(images, painted)


def expand_batch(values: Tensor, count: int, name: str) -> Tensor:
    """(1 or n, ...) -> (n, ...)."""
    if len(values) not in (1, count):
        raise UserError(
            f"{name}: {len(values)} of them for {pluralize(count, 'image')}; give one for all, or one per image"
        )
    return values.expand(count, *values.shape[1:])


# Decoding large latents in overlapping, blended tiles.

TILE = 128
"""Latent positions along a side of a tile; larger latents are decoded in tiles."""

BLEND = 8


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor], latents: Tensor, factor: int, context: int, tile: int
) -> Tensor:
    """Latents (n, c, h, w) -> images (n, 3, factor h, factor w), float32, on the CPU.

    Args:
        decode: Latents (n, c, h', w') -> images (n, 3, factor h', factor w').
        latents: In the autoencoder's own units.
        factor: Pixels per latent position along a side.
        context: Positions beside a cut at which a tile has no weight.
        tile: Largest side of a tile, above 2 (context + blending).
    """
    tile = max(tile, 2 * (context + BLEND) + 1)
    count, _, height, width = latents.shape
    total = torch.zeros(count, 3, factor * height, factor * width)
    weights = torch.zeros(1, 1, factor * height, factor * width)
    overlap = 2 * context + BLEND
    for top, bottom in tile_bounds(height, tile, overlap):
        for left, right in tile_bounds(width, tile, overlap):
            image = decode(latents[..., top:bottom, left:right]).float().cpu()
            rows = tile_weights(top, bottom, height, context, factor)
            columns = tile_weights(left, right, width, context, factor)
            weight = rows[:, None] * columns[None]
            place = (..., slice(factor * top, factor * bottom), slice(factor * left, factor * right))
            total[place] += weight * image
            weights[place] += weight
    return total / weights


def tile_bounds(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(first, end) of tiles of equal length that cover 0..length; neighbors overlap by at least `overlap`."""
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [(first := round(number * (length - tile) / (count - 1)), first + tile) for number in range(count)]


def tile_weights(first: int, end: int, length: int, context: int, factor: int) -> Tensor:
    """Weights of the pixels of a tile along one side: 1, but 0 for `context` beside a cut, then rising over BLEND."""
    pixel = torch.arange(factor * (end - first), dtype=torch.float32) + 0.5
    weight = torch.ones_like(pixel)
    for cut, distance in ((first > 0, pixel), (end < length, pixel.flip(0))):
        if cut:
            weight = torch.minimum(weight, ((distance / factor - context) / BLEND).clamp(0, 1))
    return weight


# Between two images: along a great circle in noise space, along a straight line in the autoencoder's latent space.


def slerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of two noises, so that the result is standard normal as well.

    The norm is interpolated linearly. Weights 0 and 1 return the inputs.
    """
    if weight in (0, 1):
        return (second if weight else first).clone()
    a, b = first.double(), second.double()
    a_norm, b_norm = a.norm(), b.norm()
    a, b = a / a_norm, b / b_norm
    angle = torch.arccos((a * b).sum().clamp(-1, 1))
    if angle < 1e-6:  # the same direction
        direction = a
    else:
        direction = (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
    return ((a_norm + weight * (b_norm - a_norm)) * direction).to(first.dtype)


def lerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Linear interpolation of two latents, which the decoder turns into a sharp cross-fade."""
    return (1 - weight) * first + weight * second


def interpolation_weights(count: int) -> list[float]:
    """`count` weights from 0 to 1, both included; [0] for one."""
    return torch.linspace(0, 1, count, dtype=torch.float64).tolist()
