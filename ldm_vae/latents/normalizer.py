"""The only place where latents are normalized: per channel, with constants measured on the whole set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae.errors import UserError


class LatentNormalizer:
    """x = (z - mean) / std per channel, and its inverse. The constants are float64; tensors keep their precision."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Raises: UserError if the constants are not finite, a std is not positive, or the lengths differ."""
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        if not self.mean or len(self.mean) != len(self.std):
            raise UserError(
                f"latent statistics: {len(self.mean)} means for {len(self.std)} standard deviations; "
                "take both from one manifest"
            )
        for channel, (center, width) in enumerate(zip(self.mean, self.std)):
            if not (math.isfinite(center) and math.isfinite(width) and width > 0):
                raise UserError(
                    f"latent statistics: channel {channel} has mean {center} and std {width}, which must be finite and "
                    "the std above 0: the channel is dead or the file damaged; restore it, or encode again with a "
                    "healthy autoencoder"
                )

    def normalize(self, z: Tensor) -> Tensor:
        """Latents (..., c, h, w) of the autoencoder -> mean 0 and std 1 per channel over the set."""
        return (z - self._constant(self.mean, z)) / self._constant(self.std, z)

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of `normalize`, (..., c, h, w): latents that the autoencoder decodes."""
        return x * self._constant(self.std, x) + self._constant(self.mean, x)

    def to_dict(self) -> dict[str, list[float]]:
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatentNormalizer:
        """From `to_dict()`, or from the statistics of a manifest. Raises: UserError unless they are valid numbers."""
        try:
            return cls(values["mean"], values["std"])
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"latent statistics: mean is {values.get('mean')} and std is {values.get('std')}, which must be a "
                "number for each channel; restore the file that they come from"
            ) from error

    def _constant(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        if like.ndim < 3 or like.shape[-3] != len(values):
            raise UserError(
                f"latents of shape {tuple(like.shape)}: the normalizer is for {len(values)} channels (..., c, h, w); "
                "use the latents and the autoencoder that it was measured with"
            )
        return torch.tensor(values, dtype=torch.float64).to(like)[:, None, None]


# Mean and standard deviation of a set's latents per channel, exactly and without sampling.

ROWS = ("mean", "mean_squared", "variance")
"""Rows of the array of sums: mu, mu^2 and sigma^2 (zero without a log-variance); one column per channel."""


def channel_sums(stored: Sequence[Tensor], channels: int) -> np.ndarray:
    """Sums (3, c) in float64 over tensors (n, 2c, h, w) of moments, or (n, c, h, w), in their stored precision.

    numpy sums in one thread and always in the same order; torch's order depends on the number of threads.
    """
    sums = np.zeros((len(ROWS), channels))
    for part in stored:
        for channel in range(channels):
            mean = part[:, channel].double().numpy()
            sums[:2, channel] += [mean.sum(), np.square(mean).sum()]
            if part.shape[1] == 2 * channels:
                sums[2, channel] += np.exp(part[:, channels + channel].double().numpy()).sum()
    return sums


def combine(sums: np.ndarray, latents: int, positions: int) -> dict[str, Any]:
    """`{"mean": [c], "std": [c], "count": latents}` of the latents behind the sums (m, 3, c) of m shards.

    `latents`: their number over all shards, with mirror images; `positions`: number of values per channel, n h w.
    """
    assert positions, "statistics of no latents"
    totals = [[math.fsum(sums[:, row, channel]) / positions for channel in range(sums.shape[2])] for row in range(3)]
    means, squares, variances = totals
    spreads = [max(0.0, square - mean * mean) for mean, square in zip(means, squares)]
    stds = [math.sqrt(spread + variance) for spread, variance in zip(spreads, variances)]
    return {"mean": means, "std": stds, "count": latents}
