"""Between two images: along a great circle in noise space, along a straight line in the autoencoder's latent space.

The U-Net knows noise only at the variance it was trained with, which a straight line between two noises loses (half
of it in the middle); the autoencoder's latents have no such shell.
"""

from __future__ import annotations

import torch
from torch import Tensor


def between_noises(first: Tensor, second: Tensor, share: float) -> Tensor:
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


def between_latents(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Latents of the same shape at `share` of the straight way: a cross-fade that the decoder draws sharply."""
    return (1 - share) * first + share * second


def shares(count: int) -> list[float]:
    """`count` places from 0 to 1, both included; [0] for one."""
    return torch.linspace(0, 1, count, dtype=torch.float64).tolist()
