"""From pooled latents to directions: pure functions of arrays.

A direction is a vector (c,) that is added to every position of a latent. Its length is one standard deviation of the
images' pooled latents along it, so that a strength means the same for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata
from torch import Tensor, nn

from ldm_vae.applications.directions.known import Attribute
from ldm_vae.autoencoder.interface import decode
from ldm_vae.autoencoder.models import latent_channels
from ldm_vae.errors import UserError

LABELLED = ("difference", "probe")
UNLABELLED = ("pca", "sefa")
PENALTY = 1e-2
"""Of the squared weights of a probe on standardised features."""
FOLDS = 5
IMPULSE_SIDE = 9
"""Positions of the latent that the first convolution is probed with."""


@dataclass(frozen=True)
class Direction:
    """One direction.

    Attributes:
        name: as `brightness/probe` or `pca/1`.
        vector: (c,) float64, latent units for a strength of 1.
        attribute: what it is for; None without labels.
        told: of `attribute`: how well a linear probe tells it from pooled latents of images it was not fitted to,
            AUROC for yes or no (0.5: not at all), R2 for a number (0: not at all). Without labels: the share of the
            variance (pca) or of the squared gain (sefa).
    """

    name: str
    vector: np.ndarray
    attribute: str | None
    told: dict[str, Any]

    @property
    def method(self) -> str:
        return self.name.rsplit("/", 1)[1] if self.attribute else self.name.split("/")[0]


def labelled(pooled: np.ndarray, attribute: Attribute) -> list[Direction]:
    """The difference of the means (for a number: the slope of the latents over it), and the normal of a linear probe,
    logistic for yes or no, ridge for a number. Pooled latents (n, c). Needs `attribute.problem()` None."""
    features, y = pooled[attribute.known], attribute.values[attribute.known]
    deviation = _deviation(pooled)
    standard = (features - features.mean(axis=0)) / deviation
    told = {"measure": "AUROC" if attribute.binary else "R2", "value": cross_validated(standard, y, attribute.binary)}
    difference = (y - y.mean()) @ standard / ((y - y.mean()) @ (y - y.mean()))
    vectors = {"difference": difference, "probe": probe(standard, y, attribute.binary)[0]}
    return [
        Direction(f"{attribute.name}/{method}", scaled(vector * deviation, pooled), attribute.name, told)
        for method, vector in vectors.items()
    ]


def probe(features: np.ndarray, y: np.ndarray, binary: bool) -> tuple[np.ndarray, float]:
    """Weights (c,) and offset of a penalised logistic (0 and 1) or linear regression of y (n,) on features (n, c)."""
    if not binary:
        centre, spread = y.mean(), y.std()
        mean = features.mean(axis=0)
        centred = features - mean
        gram = centred.T @ centred / len(y) + PENALTY * np.eye(features.shape[1])
        weights = spread * np.linalg.solve(gram, centred.T @ ((y - centre) / spread) / len(y))
        return weights, float(centre - mean @ weights)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, offset = parameters[:-1], parameters[-1]
        scores = features @ weights + offset
        value = np.mean(np.logaddexp(0, scores) - y * scores) + PENALTY * weights @ weights / 2
        error = (expit(scores) - y) / len(y)
        return float(value), np.append(features.T @ error + PENALTY * weights, error.sum())

    found = minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return found[:-1], float(found[-1])


def cross_validated(features: np.ndarray, y: np.ndarray, binary: bool) -> float:
    """AUROC or R2 of five probes, each on the fifth that it was not fitted to."""
    rows = np.arange(len(y))
    order = np.argsort(y, kind="stable") if binary else rows  # every fold gets its share of both
    fold = np.empty(len(y), int)
    fold[order] = rows % FOLDS
    scores = np.empty(len(y))
    for number in range(FOLDS):
        apart = fold == number
        weights, offset = probe(features[~apart], y[~apart], binary)
        scores[apart] = features[apart] @ weights + offset
    if binary:
        return auroc(scores, y)
    return float(1 - np.square(y - scores).sum() / np.square(y - y.mean()).sum())


def auroc(scores: np.ndarray, y: np.ndarray) -> float:
    """The chance that an image with y = 1 scores above one with y = 0 (Mann and Whitney 1947)."""
    yes = y == 1
    ranks = rankdata(scores)[yes].sum() - yes.sum() * (yes.sum() + 1) / 2
    return float(ranks / (yes.sum() * (~yes).sum()))


def principal(pooled: np.ndarray, count: int) -> list[Direction]:
    """The first principal directions of pooled latents (n, c), with their share of the variance."""
    values, vectors = np.linalg.eigh(np.cov(pooled, rowvar=False).reshape(pooled.shape[1], -1))
    return _numbered("pca", pooled, values[::-1], vectors[:, ::-1], "share of variance", count)


def closed_form(autoencoder: Any, pooled: np.ndarray, count: int) -> list[Direction]:
    """SeFa: what the decoder's first convolution W amplifies most, the eigenvectors of W^T W (arXiv:2007.06600)."""
    response = first_response(autoencoder)
    values, vectors = np.linalg.eigh(response.T @ response)
    return _numbered("sefa", pooled, values[::-1], vectors[:, ::-1], "share of squared gain", count)


def _numbered(
    method: str, pooled: np.ndarray, values: np.ndarray, vectors: np.ndarray, measure: str, count: int
) -> list[Direction]:
    shares = values.clip(0) / max(values.clip(0).sum(), 1e-30)
    return [
        Direction(
            f"{method}/{k + 1}", scaled(vectors[:, k], pooled), None, {"measure": measure, "value": float(shares[k])}
        )
        for k in range(min(count, len(values)))
    ]


def first_response(autoencoder: Any) -> np.ndarray:
    """(m, c) float64: what a unit in channel k adds to the first convolution that widens the latent. What comes before
    it, as Stable Diffusion's `post_quant_conv`, is linear and included.

    Raises:
        UserError: the decoder has no such convolution.
    """
    channels = latent_channels(autoencoder)
    first: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not first:
            first.append(output.double().cpu())

    impulses = torch.zeros(channels + 1, channels, IMPULSE_SIDE, IMPULSE_SIDE, device=autoencoder.device)
    impulses[torch.arange(channels), torch.arange(channels), IMPULSE_SIDE // 2, IMPULSE_SIDE // 2] = 1
    widening = [m for m in autoencoder.modules() if isinstance(m, nn.Conv2d) and m.out_channels > channels]
    hooks = [module.register_forward_hook(keep) for module in widening]
    try:
        decode(autoencoder, impulses)
    finally:
        for hook in hooks:
            hook.remove()
    if not first:
        raise UserError("sefa: the decoder has no convolution that widens the latent; leave sefa out of methods")
    response = first[0]
    return (response[:-1] - response[-1:]).flatten(1).T.numpy()


def scaled(vector: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """The same direction (c,), one standard deviation of pooled latents (n, c) long; its sign stays."""
    unit = vector / max(float(np.linalg.norm(vector)), 1e-30)
    return unit * float((pooled @ unit).std())


def _deviation(pooled: np.ndarray) -> np.ndarray:
    """Per channel; a dead one counts as it is."""
    deviation = pooled.std(axis=0)
    return np.where(deviation > 1e-12, deviation, 1.0)
