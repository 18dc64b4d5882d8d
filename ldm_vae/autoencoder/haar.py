"""The orthonormal two-dimensional Haar transform: half the size, four times the channels, the same energy."""

from __future__ import annotations

import torch
from torch import Tensor


def haar_forward(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, 4c, h/2, w/2), bands [low, horizontal, vertical, diagonal], each of c channels.

    Orthonormal: the sum of squares is unchanged. `h` and `w` must be even.
    """
    top_left, top_right = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
    bottom_left, bottom_right = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
    top_sum, top_difference = top_left + top_right, top_left - top_right
    bottom_sum, bottom_difference = bottom_left + bottom_right, bottom_left - bottom_right
    return 0.5 * torch.cat(
        [
            top_sum + bottom_sum,
            top_difference + bottom_difference,
            top_sum - bottom_sum,
            top_difference - bottom_difference,
        ],
        dim=1,
    )


def haar_bands(x: Tensor, levels: int) -> Tensor:
    """`haar_forward` that many times, as one product with a matrix: (n, c, h, w) -> (n, 4^l c, h/2^l, w/2^l).

    The result is channels_last and in the precision of `x`, which each number is rounded to once.
    """
    count, channels, height, width = x.shape
    side = 2**levels
    block = channels * side**2
    bands = torch.eye(block, dtype=x.dtype, device=x.device).reshape(block, side, side, channels).movedim(-1, 1)
    for _ in range(levels):
        bands = haar_forward(bands)  # what a block with a single 1 becomes
    pixels = x.reshape(count, channels, height // side, side, width // side, side).permute(0, 2, 4, 3, 5, 1)
    with torch.autocast(x.device.type, enabled=False):
        found = pixels.reshape(-1, block) @ bands.reshape(block, block)
    return found.reshape(count, height // side, width // side, block).permute(0, 3, 1, 2)


def haar_inverse(y: Tensor) -> Tensor:
    """(n, 4c, h, w) -> (n, c, 2h, 2w), the exact inverse (and transpose) of `haar_forward`."""
    low, horizontal, vertical, diagonal = (0.5 * y).chunk(4, dim=1)
    n, c, h, w = low.shape
    x = y.new_empty((n, c, 2 * h, 2 * w))
    x[..., 0::2, 0::2] = low + horizontal + vertical + diagonal
    x[..., 0::2, 1::2] = low - horizontal + vertical - diagonal
    x[..., 1::2, 0::2] = low + horizontal - vertical - diagonal
    x[..., 1::2, 1::2] = low - horizontal - vertical + diagonal
    return x
