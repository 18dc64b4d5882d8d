"""Mean and standard deviation of posterior samples per channel, exactly and without sampling.

With z ~ N(mu, sigma^2) and (mu, sigma) drawn from the set: E z = E mu and Var z = Var mu + E sigma^2. Everything is
summed in float64 from the moments *as stored*. A shard's sums are a function of its bytes, and the sums of the shards
are added with exact rounding, so the result depends neither on the order of the shards nor on who made them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class ChannelSums:
    """Sums over latents and positions; the lists hold one number a channel.

    Attributes:
        latents: number of latents (n, c, h, w) summed, n.
        positions: number of values in each channel, n h w.
        mean, mean_squared, variance: sums of mu, mu^2 and sigma^2.
    """

    latents: int
    positions: int
    mean: list[float]
    mean_squared: list[float]
    variance: list[float]


def channel_sums(moments: Sequence[Tensor]) -> ChannelSums:
    """Sums of one or more tensors of moments (n, 2c, h, w), mean before log-variance, in their stored precision.

    numpy sums in one thread, in the same order every time; torch's order depends on the number of threads.
    """
    channels = moments[0].shape[1] // 2
    sums = np.zeros((3, channels))
    for part in moments:
        for channel in range(channels):
            mean = part[:, channel].double().numpy()
            logvar = part[:, channels + channel].double().numpy()
            sums[:, channel] += [mean.sum(), np.square(mean).sum(), np.exp(logvar).sum()]
    latents = sum(part.shape[0] for part in moments)
    positions = sum(part[:, 0].numel() for part in moments)
    return ChannelSums(latents, positions, *sums.tolist())


def combine(sums: Sequence[ChannelSums]) -> dict[str, Any]:
    """`{"mean": [c], "std": [c], "count": latents}` of the samples behind all sums together."""
    positions = sum(part.positions for part in sums)
    assert positions, "statistics of no latents"

    def total(name: str, channel: int) -> float:
        return math.fsum(getattr(part, name)[channel] for part in sums) / positions

    means, stds = [], []
    for channel in range(len(sums[0].mean)):
        mean = total("mean", channel)
        spread = max(0.0, total("mean_squared", channel) - mean * mean)
        means.append(mean)
        stds.append(math.sqrt(spread + total("variance", channel)))
    return {"mean": means, "std": stds, "count": sum(part.latents for part in sums)}
