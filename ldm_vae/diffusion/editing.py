"""Images that go in: what image-to-image and inpainting start from, and what they keep.

Owns the reading of images and masks, and the two rules of inpainting. Pixels are floats in [0, 1] here, as in the
outputs `np` and `pt` of the pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_vae.errors import UserError
from ldm_vae.utils.text import pluralize

ImageInput = Any
"""A PIL image, an array (h, w, 3) or (n, h, w, 3), a tensor (3, h, w) or (n, 3, h, w), or a list of these."""


@dataclass(frozen=True)
class InitImage:
    """Images to start from, and where they may change.

    Attributes:
        images: (n, 3, h, w) in [0, 1].
        mask: (n, 1, h, w), true where a pixel is to be painted anew; None: everywhere.
    """

    images: Tensor
    mask: Tensor | None

    @property
    def default_strength(self) -> float:
        """What is painted anew starts from nothing; a whole image keeps its composition."""
        return 0.6 if self.mask is None else 1.0

    def latent_mask(self, factor: int) -> Tensor:
        """(n, 1, h/f, w/f): true where the latent may change, which is where any of its pixels may."""
        assert self.mask is not None
        return F.max_pool2d(self.mask.float(), factor) > 0

    def paste(self, images: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [0, 1] with the pixels that were not to change exactly as they were."""
        return images if self.mask is None else torch.where(self.mask, images, self.images)


def read_init_image(image: ImageInput, mask: ImageInput | None, count: int, factor: int) -> InitImage:
    """Images and masks for `count` results; a single one serves all of them.

    Args:
        image: In [0, 1], or 8-bit.
        mask: One value per pixel; above one half means: paint anew.
        count: Results.
        factor: Pixels per latent position, which must divide both sides.

    Raises:
        UserError: sizes or numbers that do not fit, each with what would.
    """
    images = to_tensor(image, 3, "image")
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        near = [max(1, side // factor) * factor for side in (height, width)]
        raise UserError(
            f"image: {height} x {width} pixels cannot be encoded in steps of {factor}; crop or scale it to "
            f"{near[0]} x {near[1]}"
        )
    painted = None
    if mask is not None:
        painted = to_tensor(mask, 1, "mask") > 0.5
        if painted.shape[-2:] != images.shape[-2:]:
            found = " x ".join(map(str, painted.shape[-2:]))
            raise UserError(f"mask: {found} pixels for an image of {height} x {width}; give one of the same size")
        painted = expand_batch(painted, count, "mask")
    return InitImage(expand_batch(images, count, "image"), painted)


def expand_batch(values: Tensor, count: int, name: str) -> Tensor:
    """(1 or n, ...) -> (n, ...)."""
    if len(values) not in (1, count):
        raise UserError(
            f"{name}: {len(values)} of them for {pluralize(count, 'image')}; give one for all, or one per image"
        )
    return values.expand(count, *values.shape[1:])


def to_tensor(image: ImageInput, channels: int, name: str) -> Tensor:
    """Any picture -> float32 (n, channels, h, w) in [0, 1]. Raises: UserError for another shape."""
    if isinstance(image, Sequence):
        return torch.cat([to_tensor(one, channels, name) for one in image])
    if isinstance(image, Image.Image):
        array = np.asarray(image.convert("RGB" if channels == 3 else "L"))
        return to_tensor(array, channels, name)
    whole = image.dtype in (torch.uint8, np.uint8)
    if isinstance(image, Tensor):
        tensor = image.cpu().float()
        if channels == 1 and tensor.ndim == 2:
            tensor = tensor[None]
    else:
        tensor = torch.from_numpy(np.array(image)).float()
        if channels == 1 and tensor.ndim == 2:
            tensor = tensor[..., None]
        tensor = tensor.movedim(-1, -3)
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    if tensor.ndim != 4 or tensor.shape[1] != channels or not tensor.numel():
        shapes = "(h, w, 3) arrays, (3, h, w) tensors" if channels == 3 else "(h, w) arrays, (1, h, w) tensors"
        raise UserError(f"{name}: its shape is {tuple(image.shape)}; give PIL images, {shapes} or batches of these")
    return tensor / 255 if whole else tensor


# Decoding latents that are too large for one pass: overlapping tiles, blended.

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
        context: Positions beside a cut at which a tile does not count.
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
    """(first, end) of tiles that cover 0..length with at least `overlap` in common, all of the same length."""
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


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Noise of the same shape at `share` of the way: spherical, so that two standard normals give a standard normal.

    The norm goes linearly from the one to the other. `share` 0 and 1 give the two themselves.
    """
    if share in (0, 1):
        return (second if share else first).clone()
    a, b = first.double(), second.double()
    a_norm, b_norm = a.norm(), b.norm()
    a, b = a / a_norm, b / b_norm
    angle = torch.arccos((a * b).sum().clamp(-1, 1))
    if angle < 1e-6:  # the same direction
        direction = a
    else:
        direction = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return ((a_norm + share * (b_norm - a_norm)) * direction).to(first.dtype)


def lerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Latents of the same shape at `share` of the straight way: a cross-fade that the decoder draws sharply."""
    return (1 - share) * first + share * second


def interpolation_weights(count: int) -> list[float]:
    """`count` places from 0 to 1, both included; [0] for one."""
    return torch.linspace(0, 1, count, dtype=torch.float64).tolist()
