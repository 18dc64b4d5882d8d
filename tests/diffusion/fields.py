"""Velocity fields of distributions that are known: a Gaussian, whose flow has a closed form, and two moons."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std²), each of shape (c, 1, 1) or a number."""

    mean: Tensor
    std: Tensor

    def velocity(self, noisy: Tensor, t: Tensor) -> Tensor:
        """E[eps - x0 | x_t]."""
        slope = (t - (1 - t) * self.std**2) / ((1 - t) ** 2 * self.std**2 + t**2)
        return -self.mean + slope * (noisy - (1 - t) * self.mean)

    def solution(self, noise: Tensor, start: float = 1.0) -> Tensor:
        """Where the flow takes `noise` from t = start to 0: x_t in units of its own mean and std does not change."""
        width = ((1 - start) ** 2 * self.std**2 + start**2) ** 0.5
        return self.mean + self.std * (noise - (1 - start) * self.mean) / width


class Moons:
    """Two moons in the plane, unit variance: a mixture of many small round Gaussians along two half circles."""

    std = 0.08

    def __init__(self) -> None:
        angle = torch.linspace(0, math.pi, 60, dtype=torch.float64)
        upper = torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
        lower = torch.stack([1 - torch.cos(angle), 0.5 - torch.sin(angle)], dim=1)
        self.centres = (torch.cat([upper, lower]) - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])

    def samples(self, count: int, generator: torch.Generator) -> Tensor:
        """(n, 2), float64."""
        rows = torch.randint(len(self.centres), (count,), generator=generator)
        noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        return self.centres[rows] + self.std * noise

    def velocity(self, noisy: Tensor, t: Tensor) -> Tensor:
        """E[eps - x0 | x_t] for (n, 2): (x_t - E[x0 | x_t]) / t."""
        t = t.double().clamp(min=1e-4)
        total = (1 - t) ** 2 * self.std**2 + t**2
        apart = noisy.double()[:, None] - (1 - t) * self.centres  # (n, k, 2)
        share = torch.softmax(-apart.square().sum(-1) / (2 * total), dim=1)[..., None]
        clean = self.centres + (1 - t) * self.std**2 / total * apart
        return (noisy - (share * clean).sum(1)) / t


def maximum_mean_discrepancy(first: Tensor, second: Tensor, width: float = 0.3) -> float:
    """Unbiased squared MMD of samples (n, d) and (m, d) with a Gaussian kernel; about 0 for equal distributions."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * width**2))

    within = [(kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1)) for x in (first, second)]
    return float(within[0] + within[1] - 2 * kernel(first, second).mean())
