"""The shape of a set's distribution, accumulated batch by batch from latents as a trainer sees them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae.autoencoder.rate import kl_divergence

HISTOGRAM_LIMIT, HISTOGRAM_BINS = 6.0, 120
TAIL = 4.0
"""Deviations; a Gaussian has 6.3e-5 of its values beyond."""


class Shape:
    """The distribution of normalised latents, batch by batch: sums in float64, so that memory stays bounded."""

    def __init__(self, latent_shape: tuple[int, int, int], has_moments: bool) -> None:
        channels, height, width = latent_shape
        self.count = 0
        self.powers = torch.zeros(4, channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)
        self.neighbours = torch.zeros(2, channels, dtype=torch.float64)
        self.pairs = torch.tensor([(height - 1) * width, height * (width - 1)])
        self.counts = torch.zeros(channels, HISTOGRAM_BINS, dtype=torch.float64)
        self.beyond = torch.zeros(channels, dtype=torch.int64)
        self.minimum = torch.full((channels,), math.inf)
        self.maximum = torch.full((channels,), -math.inf)
        self.positions = torch.zeros(2, channels, height, width, dtype=torch.float64)
        self.posterior = torch.zeros(2, channels, dtype=torch.float64)
        self.has_moments = has_moments

    def add(self, latents: Tensor, moments: Tensor | None) -> None:
        """Normalised latents (n, c, h, w), and the stored moments (n, 2c, h, w) behind them where there are any."""
        self.count += len(latents)
        rows = latents.transpose(0, 1).flatten(1).double()
        power = rows
        for sums in self.powers:
            sums += power.sum(1)
            power = power * rows
        self.products += rows @ rows.T
        self.neighbours[0] += (latents[:, :, 1:] * latents[:, :, :-1]).double().sum((0, 2, 3))
        self.neighbours[1] += (latents[..., 1:] * latents[..., :-1]).double().sum((0, 2, 3))
        for channel, row in enumerate(rows):
            self.counts[channel] += torch.histc(row, HISTOGRAM_BINS, -HISTOGRAM_LIMIT, HISTOGRAM_LIMIT)
        self.beyond += (rows.abs() > TAIL).sum(1)
        self.minimum = torch.minimum(self.minimum, latents.amin((0, 2, 3)))
        self.maximum = torch.maximum(self.maximum, latents.amax((0, 2, 3)))
        self.positions += torch.stack([latents.double().sum(0), latents.double().square().sum(0)])
        if moments is not None:
            mean, logvar = moments.chunk(2, dim=1)
            self.posterior[0] += torch.exp(0.5 * logvar).double().sum((0, 2, 3))
            self.posterior[1] += kl_divergence(mean, logvar).double().sum((0, 2, 3))

    @property
    def values(self) -> int:
        """Of each channel."""
        return self.count * self.positions[0, 0].numel()

    def channels(self) -> list[dict[str, Any]]:
        """For each channel the figures that a table shows."""
        first, second, third, fourth = self.powers / self.values
        variance = (second - first.square()).clamp_min(1e-30)
        skewness = (third - 3 * first * second + 2 * first**3) / variance**1.5
        kurtosis = (fourth - 4 * first * third + 6 * first.square() * second - 3 * first**4) / variance.square() - 3
        pairs = self.pairs[:, None] * self.count
        neighbours = (self.neighbours.sum(0) / pairs.sum() - first.square()) / variance if pairs.sum() else None
        deviation, nats = self.posterior / self.values
        return [
            {
                "posterior_deviation": float(deviation[channel]) if self.has_moments else None,
                "nats": float(nats[channel]) if self.has_moments else None,
                "minimum": float(self.minimum[channel]),
                "maximum": float(self.maximum[channel]),
                "skewness": float(skewness[channel]),
                "excess_kurtosis": float(kurtosis[channel]),
                "tail_share": float(self.beyond[channel]) / self.values,
                "neighbour_correlation": float(neighbours[channel]) if neighbours is not None else None,
            }
            for channel in range(len(first))
        ]

    def correlation(self) -> dict[str, Any]:
        """`matrix` (c, c), and the `largest` one of two channels with its sign; None for a single channel."""
        first, second = self.powers[:2] / self.values
        deviation = (second - first.square()).clamp_min(1e-30).sqrt()
        matrix = (self.products / self.values - torch.outer(first, first)) / torch.outer(deviation, deviation)
        found: dict[str, Any] = {"matrix": matrix.tolist(), "largest": None, "channels": None}
        if len(matrix) > 1:
            rows, columns = torch.triu_indices(len(matrix), len(matrix), 1)
            place = int(matrix[rows, columns].abs().argmax())
            found["channels"] = [int(rows[place]), int(columns[place])]
            found["largest"] = float(matrix[rows[place], columns[place]])
        return found

    def histograms(self) -> dict[str, Any]:
        """Density of each channel over `edges`; one more edge than values."""
        edges = np.linspace(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT, HISTOGRAM_BINS + 1)
        density = self.counts / self.values / (edges[1] - edges[0])
        return {"edges": edges.round(6).tolist(), "density": [[float(f"{d:.4g}") for d in row] for row in density]}

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation over samples at each position, (c, h, w)."""
        first, second = self.positions / self.count
        return first.numpy(), (second - first.square()).clamp_min(0).sqrt().numpy()
