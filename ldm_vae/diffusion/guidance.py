"""The velocity that is sampled: the U-Net's, for classes or mixtures of them, pushed away from a worse one.

Two worse ones: the network without its label (classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598), and
a smaller or less trained network with the same label (autoguidance, Karras et al. 2024, arXiv:2406.02507), which works
without labels too. Both add up where both are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_vae.errors import UserError

EVERYWHERE = (0.0, 1.0)


@dataclass(frozen=True)
class Guidance:
    """How strongly, and at which times.

    Attributes:
        scale: Of classifier-free guidance; 1 is none.
        autoguidance: Of autoguidance; 1 is none.
        interval: Lowest and highest t at which guidance acts (Kynkäänniemi et al. 2024, arXiv:2404.07724).
    """

    scale: float = 1.0
    autoguidance: float = 1.0
    interval: tuple[float, float] = EVERYWHERE

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise UserError(
                f"guidance_interval: {low} to {high} is no part of 0 to 1; give the lower time first, as (0.1, 0.8)"
            )


@dataclass(frozen=True)
class Classes:
    """Of n images: class ids (n, k), and the share of each (n, k), which add up to 1 for each image."""

    ids: Tensor
    shares: Tensor

    def __getitem__(self, rows: slice) -> Classes:
        """Of some of the images, without columns that only others need: what is computed is theirs alone."""
        used = (self.shares[rows] > 0).any(0)
        return Classes(self.ids[rows][:, used], self.shares[rows][:, used])


@dataclass(frozen=True)
class GuidedVelocity:
    """v (n, c, h, w), float32, at x_t (n, c, h, w) and a scalar t.

    Attributes:
        unet: A `LatentUNet`, or a module of the same interface.
        weak_unet: The worse network of autoguidance; None where that is not asked for.
        classes: Of the n images; None for any class.
        guidance: How strongly.
    """

    unet: Any
    weak_unet: Any
    classes: Classes | None
    guidance: Guidance

    def __call__(self, noisy: Tensor, time: Tensor) -> Tensor:
        low, high = self.guidance.interval
        guided = low <= float(time) <= high
        by_label = guided and self.classes is not None and self.guidance.scale != 1
        plain, null = self._velocities(self.unet, noisy, time, with_null=by_label)
        velocity = plain
        if null is not None:
            velocity = null + self.guidance.scale * (plain - null)
        if guided and self.guidance.autoguidance != 1:
            weak, _ = self._velocities(self.weak_unet, noisy, time)
            velocity = velocity + (self.guidance.autoguidance - 1) * (plain - weak)
        return velocity

    def _velocities(
        self, unet: Any, noisy: Tensor, time: Tensor, with_null: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """With the labels and, if asked for, without them; one pass of the network for both."""
        if self.classes is None:
            return unet(noisy, time, None), None
        columns = list(self.classes.ids.unbind(1))
        if with_null:
            columns.append(torch.full_like(columns[0], int(unet.config["num_classes"])))
        passes = unet(torch.cat([noisy] * len(columns)), time, torch.cat(columns).to(noisy.device)).chunk(len(columns))
        null = passes[-1] if with_null else None
        shares = self.classes.shares.to(noisy)
        if shares.shape[1] == 1:
            return passes[0], null
        return sum(share.view(-1, 1, 1, 1) * v for share, v in zip(shares.unbind(1), passes)), null  # type: ignore[return-value]
