"""The grid that latents are rounded to, and the one knob that sets it: from `--quality` to a step to integers.

A step is given in units that belong to each channel: the posterior's standard deviation, which says how exactly the
decoder wants the channel where a rate was held; for latents without a posterior a twelfth of their own standard
deviation. Steps are multiples of 1/1024, so that integer arithmetic can follow them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldm_vae.errors import UserError

STEP_DENOMINATOR = 1024
STEP_AT_MIDDLE = 2.0
QUALITIES = (1.0, 100.0)
QUALITY_PER_OCTAVE = 12.0
"""So many points of quality halve the step."""
DETERMINISTIC_SHARE = 12.0
NARROWEST_SHARE = 128.0
"""A posterior narrower than such a part of the latents' deviation was held to no rate: it says nothing."""
LARGEST_SYMBOL = 16383


def step_of(quality: float) -> int:
    """The step in 1/1024 units for a quality from 1 to 100: 50 is 2 units. Raises: UserError."""
    low, high = QUALITIES
    if not low <= quality <= high:
        raise UserError(f"quality: {quality:g} is not between {low:g} and {high:g}; 50 suits most pictures")
    return round(STEP_DENOMINATOR * STEP_AT_MIDDLE * 2.0 ** ((50.0 - quality) / QUALITY_PER_OCTAVE))


class TooFine(UserError):
    """Latents have no levels at this step; at a larger one they may."""


@dataclass(frozen=True)
class Grid:
    """Where the levels of each channel lie: `mean` + integer * `unit` * step, (c,) float64 each; step in 1/1024."""

    mean: np.ndarray
    unit: np.ndarray
    step: int

    @property
    def width(self) -> np.ndarray:
        """Distance of two levels in each channel, (c, 1, 1)."""
        return (self.unit * (self.step / STEP_DENOMINATOR))[:, None, None]

    def quantise(self, latents: np.ndarray, where: str) -> np.ndarray:
        """Latents (c, h, w) -> the nearest level of each, int64. Raises: TooFine when they span too many levels."""
        levels = np.rint((latents - self.mean[:, None, None]) / self.width)
        if not np.isfinite(levels).all():
            raise UserError(f"{where}: the autoencoder gives latents that are not finite; it is damaged or diverged")
        if np.abs(levels).max(initial=0) > LARGEST_SYMBOL:
            raise TooFine(f"{where}: its latents span more than {LARGEST_SYMBOL} steps; take a lower quality")
        return levels.astype(np.int64)

    def restore(self, levels: np.ndarray) -> np.ndarray:
        """Levels (k, h, w) of the first k channels -> latents, float32."""
        first = len(levels)
        return (self.mean[:first, None, None] + levels * self.width[:first]).astype(np.float32)


def channel_units(mean: Tensor, logvar: Tensor | None) -> np.ndarray:
    """Units of each channel, (c,) float64, of moments (n, c, h, w); `logvar` None: the latents have no posterior."""
    deviation = mean.double().std(dim=(0, 2, 3), correction=0)
    if logvar is not None:
        units = logvar.double().exp().mean(dim=(0, 2, 3)).sqrt().maximum(deviation / NARROWEST_SHARE)
    else:
        units = deviation / DETERMINISTIC_SHARE
    return units.clamp_min(1e-4).cpu().numpy()


def channel_means(mean: Tensor) -> np.ndarray:
    """(c,) float64 of latents (n, c, h, w)."""
    return mean.double().mean(dim=(0, 2, 3)).cpu().numpy()
