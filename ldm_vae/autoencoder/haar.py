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
