"""Training on crops of latents: where each crop lies, and the coordinates that tell the U-Net (Patch Diffusion).

Wang et al. 2023, arXiv:2304.12526. Owns the settings, positions and coordinates; times and noise of a crop are
`training`'s business. Coordinates are the centres of latent positions, from -1 to 1 over the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_vae.errors import UserError
from ldm_vae.random import generator


@dataclass(frozen=True)
class CropsConfig:
    """Crops of latents on a share of the steps; needs `unet.coordinates=true`.

    Attributes:
        size: side of the crops in latent positions; None trains on whole latents alone.
        share: of the steps that train on crops, the whole batch at once.
    """

    size: int | None = None
    share: float = 0.6

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise UserError(f"crops.size: {self.size} is below 1; give latent positions, or null for whole latents")
        if not 0 <= self.share <= 1:
            raise UserError(f"crops.share: {self.share} is no share; give 0 to 1")

    def check(self, latent_shape: tuple[int, ...], multiple: int) -> None:
        """Raises: UserError where crops do not fit into latents (c, h, w) or a network that halves `multiple` sides."""
        if self.size is None:
            return
        if self.size > min(latent_shape[1:]):
            raise UserError(
                f"crops.size: {self.size} is larger than the latents ({latent_shape[1]}x{latent_shape[2]}); "
                f"give at most {min(latent_shape[1:])}, or null"
            )
        if self.size % multiple:
            raise UserError(
                f"crops.size: {self.size} is no multiple of {multiple}, which this U-Net needs; "
                f"give {max(1, self.size // multiple) * multiple}, or null"
            )


@dataclass(frozen=True)
class Crops:
    """One crop per sample of a global batch, or (`size` None) the whole of each. `tops`, `lefts`: int64 (n,)."""

    size: int | None
    tops: Tensor
    lefts: Tensor

    def cut(self, latents: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Crops (n, c, size, size) of whole latents (n, c, h, w), which are `rows` of the batch; their coordinates."""
        if self.size is None:
            return latents, None
        everywhere = whole_coordinates(*latents.shape[-2:]).to(latents.device)
        cut, coordinates = [], []
        for latent, top, left in zip(latents, self.tops[rows].tolist(), self.lefts[rows].tolist()):
            place = (..., slice(top, top + self.size), slice(left, left + self.size))
            cut.append(latent[place])
            coordinates.append(everywhere[0][place])
        return torch.stack(cut), torch.stack(coordinates)


def draw_crops(config: CropsConfig, seed: int, step: int, count: int, height: int, width: int) -> Crops:
    """The crops of a step: whether there are any follows from (seed, step), positions from (seed, step, row)."""
    rng = generator(seed, "crops", step)
    if config.size is None or torch.rand((), generator=rng) >= config.share:
        nowhere = torch.zeros(count, dtype=torch.int64)
        return Crops(None, nowhere, nowhere)
    tops = torch.randint(0, height - config.size + 1, (count,), generator=rng)
    lefts = torch.randint(0, width - config.size + 1, (count,), generator=rng)
    return Crops(config.size, tops, lefts)


def whole_coordinates(height: int, width: int) -> Tensor:
    """Row and column of every position of a whole latent, (1, 2, h, w) in (-1, 1), float32."""
    rows, columns = ((2 * torch.arange(side) + 1) / side - 1 for side in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]
