"""Pixels as tensors: the only conversion between 8 bits and the [-1, 1] that models see, and padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 0..255 of any shape -> float32 in [-1, 1]. `to_uint8` gives back exactly the same values."""
    assert pixels.dtype == torch.uint8, f"from_uint8 takes uint8, got {pixels.dtype}"
    return pixels.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Floats of any shape and precision, clamped to [-1, 1], -> uint8, rounded to the nearest level."""
    return images.detach().float().add(1.0).mul_(127.5).clamp_(0.0, 255.0).round_().to(torch.uint8)


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
