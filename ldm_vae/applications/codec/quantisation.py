"""The grid that latents are rounded to, and the one knob that sets it: from `--quality` to a step to integers.

A step is given in units that belong to each channel: the posterior's standard deviation, which says how exactly the
decoder wants the channel where a rate was held; for latents without a posterior a twelfth of their own standard
deviation. Steps are multiples of 1/1024, so that integer arithmetic can follow them. How latents are rounded is the
encoder's matter: any integers make a file.
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
DIFFUSED = 0.75
"""The part of a rounding error that its neighbours make up for. All of it would cost more bytes than it is worth."""
NEIGHBOURS = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))
"""(down, right, share of that part) of the neighbours. Source: Floyd and Steinberg 1976."""
COARSEST_DIFFUSED = 4 * STEP_DENOMINATOR
"""Decoders smooth away about as much noise as they were trained with: that of a coarser step remains as texture. Then a
context model, too, which writes equal levels for nothing, takes more bytes than for a finer step that is as good."""


def step_of(quality: float) -> int:
    """The step in 1/1024 units for a quality from 1 to 100: 50 is 2 units. Raises: UserError."""
    low, high = QUALITIES
    if not low <= quality <= high:
        raise UserError(f"quality: {quality:g} is not between {low:g} and {high:g}; 50 suits most pictures")
    return round(STEP_DENOMINATOR * STEP_AT_MIDDLE * 2.0 ** ((50.0 - quality) / QUALITY_PER_OCTAVE))


def diffused_levels(values: np.ndarray) -> np.ndarray:
    """Numbers (..., h, w) -> a whole number near each, less than 1 off, so that errors cancel among neighbours.

    Where values hardly change, plain rounding errs alike everywhere: a decoder smooths noise away, and turns that into
    a colour. Positions of one x + 2 y do not depend on each other and are rounded together.
    """
    height, width = values.shape[-2:]
    wanted = np.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, 1), (1, 1)])  # a border takes what leaves the plane
    levels = np.empty_like(values)
    for front in range(width + 2 * height - 2):
        y = np.arange(max(0, (front - width) // 2 + 1), min(height, front // 2 + 1))
        x = front - 2 * y
        given = wanted[..., y, x + 1]
        levels[..., y, x] = np.rint(given)
        error = DIFFUSED * (given - levels[..., y, x])
        for down, right, share in NEIGHBOURS:
            wanted[..., y + down, x + right + 1] += share * error
    return levels


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
        """Latents (..., c, h, w) -> `diffused_levels`, at coarse steps the nearest level of each, int64.

        Raises:
            TooFine: they span too many levels.
            UserError: they are not finite.
        """
        if not np.isfinite(latents).all():
            raise UserError(f"{where}: the autoencoder gives latents that are not finite; it is damaged or diverged")
        values = (latents - self.mean[:, None, None]) / self.width
        levels = diffused_levels(values) if self.step <= COARSEST_DIFFUSED else np.rint(values)
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
