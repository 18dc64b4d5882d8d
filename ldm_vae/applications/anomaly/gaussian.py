"""A Gaussian fitted to feature vectors, and how far others are from it.

The covariance is shrunk by Ledoit and Wolf's formula ("A well-conditioned estimator for large-dimensional covariance
matrices", 2004), after every feature was scaled to unit variance: it is invertible for any number of vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_DEVIATION = 1e-6
"""Of a feature, where the images do not differ at all in it."""
SMALLEST_SHARE = 1e-3
"""Of the identity, so that features that repeat each other can be inverted."""


@dataclass(frozen=True)
class Gaussian:
    """`mean` and `deviation` (d,), `precision` (d, d) of the scaled features; float64."""

    mean: Tensor
    deviation: Tensor
    precision: Tensor

    def distance(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distance of (..., d) over d: (...), float64, about 1 where the Gaussian is right."""
        scaled = (features.double() - self.mean.to(features.device)) / self.deviation.to(features.device)
        return torch.einsum("...i,ij,...j->...", scaled, self.precision.to(features.device), scaled) / len(self.mean)


def fit_gaussian(features: Tensor) -> Gaussian:
    """From the rows of (n, d), n >= 2."""
    features = features.double().cpu()
    mean = features.mean(dim=0)
    deviation = (features - mean).square().mean(dim=0).sqrt().clamp(min=SMALLEST_DEVIATION)
    return Gaussian(mean, deviation, torch.linalg.inv(shrunk_covariance((features - mean) / deviation)))


def shrunk_covariance(centred: Tensor) -> Tensor:
    """(1 - s) S + s m I of centred rows (n, d): S their covariance, m its mean variance, s from the data."""
    count, size = centred.shape
    covariance = centred.T @ centred / count
    variance = covariance.diagonal().mean()
    identity = torch.eye(size, dtype=centred.dtype)
    spread = (covariance - variance * identity).square().sum()
    squares = centred.square()
    error = ((squares.T @ squares).sum() / count - covariance.square().sum()) / count
    share = float((error / spread).clamp(SMALLEST_SHARE, 1)) if spread > 0 else 1.0
    return (1 - share) * covariance + share * variance.clamp(min=SMALLEST_DEVIATION**2) * identity
