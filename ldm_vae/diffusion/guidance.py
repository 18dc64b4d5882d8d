"""The velocity that is sampled: the U-Net's, for classes or mixtures of them, pushed away from a worse one.

Two worse ones: the network without its label (classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598), and
a smaller or less trained network with the same label (autoguidance, Karras et al. 2024, arXiv:2406.02507), which works
without labels too. Both add up where both are asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_vae.diffusion.flow import SMALLEST_DIVISOR
from ldm_vae.errors import UserError

EVERYWHERE = (0.0, 1.0)


@dataclass(frozen=True)
class Guidance:
    """How strongly, and at which times.

    Attributes:
        scale: Of classifier-free guidance; 1 is none.
        autoguidance: Of autoguidance; 1 is none.
        interval: Lowest and highest t at which guidance acts (Kynkäänniemi et al. 2024, arXiv:2404.07724).
        rescale: 0 to 1, how far the clean latents that a guided velocity leads to get the spread of unguided ones back,
            which strong guidance raises: oversaturated images (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    """

    scale: float = 1.0
    autoguidance: float = 1.0
    interval: tuple[float, float] = EVERYWHERE
    rescale: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.interval
        for name, value in (("guidance_scale", self.scale), ("autoguidance_scale", self.autoguidance)):
            if not math.isfinite(value):
                raise UserError(f"{name}: {value} is no number; 1 is no guidance, 2 to 5 is usual")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale: {self.rescale} is no share; give 0 to 1")
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
        return velocity if velocity is plain else self._rescaled(velocity, plain, noisy, time)

    def _rescaled(self, velocity: Tensor, plain: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Per image, over all of its elements, as in the paper."""
        if not self.guidance.rescale:
            return velocity
        t = float(time)
        clean, unguided = noisy - t * velocity, noisy - t * plain
        spread, wanted = (x.flatten(1).std(1).view(-1, 1, 1, 1) for x in (clean, unguided))
        factor = 1 + self.guidance.rescale * (wanted / spread.clamp(min=1e-6) - 1)
        return velocity + (1 - factor) * clean / max(t, SMALLEST_DIVISOR)

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
