"""Pictures of latents that were moved: by the posterior's noise, by channel, along directions, along a path."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm_vae.applications.directions.editing import edited
from ldm_vae.applications.explorer.explored import Explored
from ldm_vae.applications.explorer.plane import Plane
from ldm_vae.errors import UserError


def reconstruction(
    explored: Explored,
    index: int,
    noise: float = 1.0,
    sample: bool = True,
    seed: int = 0,
    offsets: Mapping[int, float] | None = None,
    directions: Mapping[str, float] | None = None,
) -> Tensor:
    """The decoded latent of image `index`, uint8 (3, H, W); with `sample` off and nothing moved that of its mean.

    Args:
        noise, sample, seed: see `Explored.latent`.
        offsets: channel -> standard deviations of that channel over all images, added at every position.
        directions: name -> strength, see `applications.directions`.

    Raises:
        UserError: a channel or a direction that there is not.
    """
    latent = explored.latent(index, noise, sample, seed)
    channels = latent.shape[1]
    deviation = explored.channel_deviation
    for channel, amount in (offsets or {}).items():
        if not 0 <= channel < channels:
            raise UserError(f"channels: {channel} is not between 0 and {channels - 1}; give one of these")
        latent = latent.clone()
        latent[:, channel] += amount * deviation[channel]
    for name, amount in (directions or {}).items():
        if explored.directions is None:
            raise UserError("directions: none are open; start `ldm-vae explore` with --directions FOLDER")
        latent = edited(latent, explored.directions.find(name).vector, [amount])
    return explored.decode(latent)[0]


def path_strip(explored: Explored, plane: Plane, points: Tensor, frames: int) -> Tensor:
    """Decoded points along the line through `points` (k, 2), k >= 1, evenly spaced on it, side by side: uint8
    (3, H, W * frames). The first frame is the first point, the last one the last."""
    images = explored.decode(plane.latent_at(along(points, frames)))
    return torch.cat(list(images), dim=2)


def along(points: Tensor, count: int) -> Tensor:
    """`count` points (count, 2), evenly spaced on the line through `points` (k, 2), k >= 1, its ends included."""
    assert len(points) >= 1, "a path needs a point"
    points = points.double()
    lengths = (points[1:] - points[:-1]).norm(dim=1)
    reached = torch.cat([lengths.new_zeros(1), lengths.cumsum(dim=0)])
    wanted = torch.linspace(0, 1, count, dtype=torch.float64) * reached[-1]
    before = (torch.searchsorted(reached, wanted, right=True) - 1).clamp(0, max(0, len(points) - 2))
    after = (before + 1).clamp_max(len(points) - 1)
    share = ((wanted - reached[before]) / (reached[after] - reached[before]).clamp_min(1e-12)).clamp(0, 1)[:, None]
    return (points[before] + share * (points[after] - points[before])).float()
