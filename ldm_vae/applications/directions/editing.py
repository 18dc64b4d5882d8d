"""Moving latents along a direction, everywhere or where a mask says; pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_vae.data.pixels import pad_to_multiple
from ldm_vae.errors import UserError

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, right and bottom not included."""


def edited(latent: Tensor, vector: np.ndarray, strengths: Sequence[float], mask: Tensor | None = None) -> Tensor:
    """A latent (1, c, h, w) moved by each of s strengths along `vector` (c,), (s, c, h, w).

    `mask`: (1, 1, h, w), 0 to 1, how far each position moves; None: all of them. A strength of 0 changes nothing.
    """
    move = torch.from_numpy(vector).to(latent).view(1, -1, 1, 1)
    amounts = torch.tensor(strengths, dtype=torch.float64).to(latent).view(-1, 1, 1, 1)
    return latent + amounts * move * (1.0 if mask is None else mask.to(latent))


def latent_mask(mask: Tensor, factor: int, feather: float) -> Tensor:
    """A mask of pixels (1, 1, H, W), 0 to 1, at latent resolution (1, 1, h, w): the covered share of each position,
    softened by a Gaussian with a standard deviation of `feather` positions.

    Raises:
        UserError: the mask is empty.
    """
    small = F.avg_pool2d(pad_to_multiple(mask.float(), factor), factor)
    if not bool((small > 0).any()):
        raise UserError("mask: is empty, so that nothing would change; paint white what may change")
    if feather <= 0:
        return small
    radius = max(1, round(3 * feather))
    weights = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * feather**2)).to(small)
    weights = weights / weights.sum()
    padded = F.pad(small, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))


def box_mask(box: Box, height: int, width: int) -> Tensor:
    """(1, 1, height, width), 1 inside. Raises: UserError for a box that is empty or not inside."""
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise UserError(
            f"box: {left},{top},{right},{bottom} is no box inside an image of {width} x {height} pixels; give "
            "left,top,right,bottom"
        )
    mask = torch.zeros(1, 1, height, width)
    mask[..., top:bottom, left:right] = 1
    return mask
