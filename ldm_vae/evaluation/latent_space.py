"""What the latent space of an autoencoder is like to work in: straight lines between images, and samples of a prior.

The same autoencoder serves the comparison of kinds, `ldm-vae compare`, and what lies between images, `interpolate`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_vae import metrics
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.klt import BlockKLT, block_moments
from ldm_vae.autoencoder.losses import LPIPS
from ldm_vae.data import transforms
from ldm_vae.diffusion.fid import frechet_distance
from ldm_vae.random import generator

INTERPOLATION_STEPS = 8
FRECHET_COMPONENTS = 16


@dataclass(frozen=True)
class Interpolation:
    """Over pairs of images, means. `unevenness` >= 1: the largest of the 8 steps of the path relative to the mean step;
    `midpoint_sharpness`: fine contrast half way, relative to the mean of both ends; `distance`: what a step is."""

    unevenness: float
    midpoint_sharpness: float
    distance: str
    pairs: int


@dataclass(frozen=True)
class PriorSamples:
    """Latents drawn per channel from N(mean, standard deviation) of the aggregate posterior, decoded.

    `cycle_error`: rms of E(D(z)) - z per channel in its standard deviations; `cycle_error_real` the same for posterior
    samples of real images; `frechet`: distance of block statistics to real images, relative to their total variance;
    `frechet_reconstructions` the same for reconstructions: what an autoencoder loses without any sampling.
    """

    cycle_error: float
    cycle_error_real: float
    frechet: float
    frechet_reconstructions: float
    samples: int


def step_distance(x: Tensor, y: Tensor, lpips: LPIPS | None) -> tuple[Tensor, str]:
    """Perceptual distance of images (n, 3, h, w), (n,), and its name: LPIPS, else 1 - MS-SSIM, else 1 - SSIM."""
    if lpips is not None:
        return lpips(x, y), "LPIPS"
    if min(x.shape[-2:]) >= metrics.MS_SSIM_SMALLEST_SIDE:
        return 1 - metrics.ms_ssim(x, y), "1 - MS-SSIM"
    return 1 - metrics.ssim(x, y), "1 - SSIM"


@torch.no_grad()
def interpolation(autoencoder: Autoencoder, images: Tensor, lpips: LPIPS | None = None) -> Interpolation:
    """Straight lines between the latent means of images (n, 3, h, w), the first with the second and so on; n >= 2.

    A path of equal steps has an unevenness of 1, one that jumps once of 8. A blur in the middle, the usual sign of a
    latent space with holes, has a midpoint sharpness under 1; even a perfect one need not reach 1, since a cross-fade
    of two images has less contrast than either.
    """
    if len(images) < 2:
        raise ValueError(f"interpolation: {len(images)} image(s); give at least 2")
    found = []
    for pair in images[: len(images) // 2 * 2].split(2):
        ends, _ = autoencoder.encode_moments(pair)
        weights = torch.linspace(0, 1, INTERPOLATION_STEPS + 1, device=ends.device).view(-1, 1, 1, 1)
        path = torch.cat(
            [autoencoder.decode_images(latent[None]) for latent in (1 - weights) * ends[0] + weights * ends[1]]
        )
        found.append(measure_path(path, lpips))
    unevenness, sharpness = ([getattr(one, name) for one in found] for name in ("unevenness", "midpoint_sharpness"))
    return Interpolation(float(np.mean(unevenness)), float(np.mean(sharpness)), found[0].distance, len(found))


@dataclass(frozen=True)
class LatentPath:
    """One way from an image to another. `unevenness`, `midpoint_sharpness`, `distance`: see `Interpolation`.

    `perceptual_length`: mean over steps of distance / step**2, the whole way being 1 (Karras et al. 2019,
    arXiv:1812.04948, section 4.1): the smaller, the smoother. Comparable between ways of as many frames.
    """

    unevenness: float
    midpoint_sharpness: float
    perceptual_length: float
    distance: str


def measure_path(path: Tensor, lpips: LPIPS | None = None) -> LatentPath:
    """Frames (s, 3, h, w) in [-1, 1], s >= 3, from one image to another, after an 8-bit round trip."""
    path = transforms.from_uint8(transforms.to_uint8(path))
    distances, name = step_distance(path[:-1], path[1:], lpips)
    steps = distances.double().clamp_min(0)
    ends = path[[0, -1]]
    ratios = metrics.sharpness_ratio(path[len(path) // 2][None].expand_as(ends), ends).clamp_min(1e-12)
    return LatentPath(
        unevenness=float(steps.max() / steps.mean().clamp_min(1e-12)),
        midpoint_sharpness=float(2 / (1 / ratios).sum()),  # contrast over the mean contrast of both ends
        perceptual_length=float(steps.mean() * len(steps) ** 2),
        distance=name,
    )


@torch.no_grad()
def prior_samples(autoencoder: Autoencoder, images: Tensor, klt: BlockKLT, seed: int = 0) -> PriorSamples:
    """As many samples as images (n, 3, h, w), of the latents' size. Positions are drawn independently: this is the
    prior of the KL term, not that of a diffusion model, so pictures are not expected; the figures say how far off."""
    means, logvars = zip(*(autoencoder.encode_moments(image[None]) for image in images), strict=True)
    mean, variance = torch.cat(means), torch.cat(logvars).exp()
    center = mean.mean(dim=(0, 2, 3), keepdim=True)
    spread = (mean.var(dim=(0, 2, 3), keepdim=True, correction=0) + variance.mean(dim=(0, 2, 3), keepdim=True)).sqrt()
    noise = torch.randn(mean.shape, generator=generator(seed, "prior samples")).to(mean.device)
    noise_real = torch.randn(mean.shape, generator=generator(seed, "posterior samples")).to(mean.device)
    prior, real = center + spread * noise, mean + variance.sqrt() * noise_real
    decoded, cycle = decode_and_encode(autoencoder, prior, spread)
    reconstructed, cycle_real = decode_and_encode(autoencoder, real, spread)
    return PriorSamples(
        cycle,
        cycle_real,
        block_frechet(decoded, images, klt),
        block_frechet(reconstructed, images, klt),
        len(images),
    )


def decode_and_encode(autoencoder: Autoencoder, latents: Tensor, spread: Tensor) -> tuple[Tensor, float]:
    """The decoded images, and the rms distance of their encoding from the latents, in standard deviations."""
    decoded, squares = [], []
    for latent in latents.split(1):
        image = autoencoder.decode_images(latent)
        again, _ = autoencoder.encode_moments(image)
        decoded.append(image)
        squares.append(((again - latent) / spread.clamp_min(1e-6)).square().mean())
    return torch.cat(decoded), float(torch.stack(squares).mean().sqrt())


def block_frechet(images: Tensor, references: Tensor, klt: BlockKLT) -> float:
    """Fréchet distance between the blocks of two sets of images as Gaussians in the first 16 KLT components, relative
    to the references' variance there. 0: same colors and local structure on average; says nothing about objects."""
    basis = klt.components[:FRECHET_COMPONENTS].double()
    statistics = []
    for each in (images, references):
        moments = block_moments(each, klt.block)
        mean = moments.total / moments.count
        covariance = moments.products / moments.count - torch.outer(mean, mean)
        statistics.append(((basis @ mean).numpy(), (basis @ covariance @ basis.T).numpy()))
    (mean_x, covariance_x), (mean_y, covariance_y) = statistics
    return frechet_distance(mean_x, covariance_x, mean_y, covariance_y) / max(float(np.trace(covariance_y)), 1e-12)
