"""Images that go in: what image-to-image and inpainting start from, and what they keep.

Owns the reading of images and masks, and the two rules of inpainting. Pixels are floats in [0, 1] here, as in the
outputs `np` and `pt` of the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_vae.errors import UserError
from ldm_vae.latents.words import counted

Picture = Any
"""A PIL image, an array (h, w, 3) or (n, h, w, 3), a tensor (3, h, w) or (n, 3, h, w), or a list of these."""


@dataclass(frozen=True)
class Source:
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


def read_source(image: Picture, mask: Picture | None, count: int, factor: int) -> Source:
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
        painted = for_each(painted, count, "mask")
    return Source(for_each(images, count, "image"), painted)


def for_each(values: Tensor, count: int, name: str) -> Tensor:
    """(1 or n, ...) -> (n, ...)."""
    if len(values) not in (1, count):
        raise UserError(
            f"{name}: {len(values)} of them for {counted(count, 'image')}; give one for all, or one per image"
        )
    return values.expand(count, *values.shape[1:])


def to_tensor(image: Picture, channels: int, name: str) -> Tensor:
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
