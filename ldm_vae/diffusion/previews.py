"""Pictures of latents without the decoder: a linear map of each position to one RGB pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_latent_rgb(latents: Tensor, images: Tensor) -> dict[str, Any]:
    """The `latent_rgb` of a pipeline: least squares from latents to images reduced to one pixel per position.

    A hundred pairs are plenty: each has thousands of positions.

    Args:
        latents: Normalised, (n, c, h, w).
        images: Theirs, (n, 3, fh, fw) in [-1, 1].

    Returns:
        `weights`, 3 lists of c numbers, and `bias`, 3 numbers (JSON-able).
    """
    small = F.interpolate(images.float(), size=latents.shape[-2:], mode="area")
    positions = latents.double().movedim(1, -1).flatten(0, -2)
    colours = small.double().movedim(1, -1).flatten(0, -2)
    inputs = torch.cat([positions, torch.ones_like(positions[:, :1])], dim=1)
    # gelsd is the driver that a dead channel does not disturb; it exists on CPU only
    solution = torch.linalg.lstsq(inputs.cpu(), colours.cpu(), driver="gelsd").solution
    return {"weights": solution[:-1].T.tolist(), "bias": solution[-1].tolist()}


def latents_to_rgb(latents: Tensor, latent_rgb: Mapping[str, Any]) -> Tensor:
    """Normalised latents (n, c, h, w) -> images (n, 3, h, w), float32, clamped to [-1, 1]."""
    weights, bias = (torch.tensor(latent_rgb[key]).to(latents.device) for key in ("weights", "bias"))
    return (torch.einsum("nchw,dc->ndhw", latents.float(), weights) + bias.view(1, 3, 1, 1)).clamp(-1, 1)
