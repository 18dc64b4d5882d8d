"""Mean and standard deviation of a set's latents per channel, exactly and without sampling.

Of posterior samples where moments are stored: with z ~ N(mu, sigma^2) and (mu, sigma) drawn from the set, E z = E mu
and Var z = Var mu + E sigma^2. Of the latents themselves where means or samples are stored. Everything is summed in
float64 from the values *as stored*. A shard's sums are a function of its bytes, and the sums of the shards are added
with exact rounding, so the result depends neither on the order of the shards nor on who made them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

ROWS = ("mean", "mean_squared", "variance")
"""Of the array of sums: mu, mu^2 and sigma^2 (zero where no log-variance is stored), one column a channel."""


def channel_sums(stored: Sequence[Tensor], channels: int) -> np.ndarray:
    """Sums (3, c) in float64 over tensors (n, 2c, h, w) of moments, or (n, c, h, w), in their stored precision.

    numpy sums in one thread, in the same order every time; torch's order depends on the number of threads.
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

    `latents` is their number over all shards, mirror images counted; `positions` that of values per channel, n h w.
    """
    assert positions, "statistics of no latents"
    totals = [[math.fsum(sums[:, row, channel]) / positions for channel in range(sums.shape[2])] for row in range(3)]
    means, squares, variances = totals
    spreads = [max(0.0, square - mean * mean) for mean, square in zip(means, squares)]
    stds = [math.sqrt(spread + variance) for spread, variance in zip(spreads, variances)]
    return {"mean": means, "std": stds, "count": latents}
