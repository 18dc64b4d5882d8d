"""Measuring images: what normal images teach (`learn`), and every score and heat map of others (`measure`).

Noise is the same for every image and run, so a score is a function of the image alone. Which images, thresholds and
files are other modules'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_vae.applications.anomaly import likelihood, maps, scores
from ldm_vae.applications.anomaly.gaussian import Gaussian, fit_gaussian
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.interface import decode, encode_moments, is_deterministic
from ldm_vae.autoencoder.models import downsampling, load_autoencoder
from ldm_vae.autoencoder.perceptual import LPIPS, Backbone
from ldm_vae.autoencoder.rate import kl_divergence
from ldm_vae.diffusion import flow
from ldm_vae.errors import UserError
from ldm_vae.random import generator

POSITIONS = 256
"""Latent positions of one image that the Gaussian of positions is fitted to, evenly spread."""
FLOW_DRAWS = 2
"""Noises at each time."""
SMALLEST_VARIANCE = 1e-6


@dataclass(frozen=True)
class Models:
    """The networks. `regret_steps`: of likelihood regret; 0 leaves it out."""

    autoencoder: Any
    device: torch.device
    lpips: LPIPS | None = None
    pipeline: Any = None
    regret_steps: int = 0

    @property
    def deterministic(self) -> bool:
        return is_deterministic(self.autoencoder)

    @property
    def names(self) -> list[str]:
        """Of all scores that these networks give."""
        return scores.names(
            self.deterministic, self.lpips is not None, self.regret_steps > 0, self.pipeline is not None
        )


@dataclass(frozen=True)
class Learnt:
    """Of normal images: the decoder's variance, the Gaussians of latent positions and of whole images."""

    variance: float
    positions: Gaussian
    pooled: Gaussian


@dataclass(frozen=True)
class Measured:
    """`values`: score -> (n,) float64; `maps`: quantity -> (n, h/4, w/4); both on the CPU."""

    values: dict[str, Tensor]
    maps: dict[str, Tensor]


def load_models(
    autoencoder: str,
    device: torch.device,
    pipeline: str | None = None,
    perceptual_net: Backbone | None = None,
    perceptual_weights: str | None = None,
    regret_steps: int = 0,
) -> Models:
    """From disk. Raises: UserError, also where the pipeline is of another autoencoder."""
    model = load_autoencoder(autoencoder).to(device)
    lpips = LPIPS(perceptual_net, perceptual_weights).to(device) if perceptual_net else None
    found = None
    if pipeline is not None:
        from ldm_vae.diffusion.generation import pipeline_directory
        from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline

        found = LatentDiffusionPipeline.from_pretrained(pipeline_directory(pipeline), use_safetensors=True)
        if found.config["encoder_fingerprint"] != encoder_fingerprint(model):
            raise UserError(f"pipeline: {pipeline} was trained on latents of another autoencoder; give {autoencoder}'s")
        found.unet.to(device)
    return Models(model, device, lpips, found, 0 if is_deterministic(model) else regret_steps)


def check_pipeline_size(models: Models, resolution: int) -> None:
    """Raises: UserError where the U-Net has learnt latents of images of another size."""
    if models.pipeline is None:
        return
    factor = downsampling(models.autoencoder)
    trained = [side * factor for side in models.pipeline.config["latent_size"]]
    if trained != [resolution, resolution]:
        raise UserError(
            f"resolution: {resolution} is not that of the pipeline, {trained[0]}x{trained[1]}, whose flow loss means "
            "nothing for others; set it, or leave pipeline out"
        )


def encode(models: Models, images: Tensor, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-variance. Raises: UserError naming the first image whose latents are not finite."""
    mean, logvar = encode_moments(models.autoencoder, images)
    finite = (mean.isfinite() & logvar.isfinite()).flatten(1).all(dim=1)
    if not bool(finite.all()):
        name = ids[int(finite.logical_not().nonzero()[0])]
        raise UserError(
            f"autoencoder: its latents of {name} are not finite; `ldm-vae diagnose` says more, give another autoencoder"
        )
    return mean, logvar


def learn(models: Models, batches: Iterable[tuple[list[str], Tensor]]) -> Learnt:
    """From batches (ids, images (n, 3, h, w) in [-1, 1]) of normal images."""
    errors, positions, pooled = [], [], []
    for ids, batch in batches:
        images = batch.to(models.device)
        mean, logvar = encode(models, images, ids)
        decoded = _decode_sample(models, images, mean, logvar)
        errors.append((images - decoded).square().flatten(1).mean(dim=1).double().cpu())
        flat = mean.flatten(2).transpose(1, 2)
        chosen = torch.linspace(0, flat.shape[1] - 1, min(POSITIONS, flat.shape[1])).round().long()
        positions.append(flat[:, chosen.to(flat.device)].flatten(0, 1).cpu())
        pooled.append(_pooled(mean).cpu())
    variance = max(float(torch.cat(errors).mean()), SMALLEST_VARIANCE)
    return Learnt(variance, fit_gaussian(torch.cat(positions)), fit_gaussian(torch.cat(pooled)))


@torch.no_grad()
def measure(models: Models, learnt: Learnt, images: Tensor, ids: Sequence[str]) -> Measured:
    """Every score and heat map of images (n, 3, h, w) in [-1, 1].

    Raises:
        UserError: naming the image and the score, where a value is not finite.
    """
    images = images.to(models.device)
    size = (images.shape[-2] // maps.STRIDE, images.shape[-1] // maps.STRIDE)
    mean, logvar = encode(models, images, ids)
    decoded = decode(models.autoencoder, mean)[..., : images.shape[-2], : images.shape[-1]]
    heat = {
        "l1": maps.of_pixels((images - decoded).abs().mean(dim=1, keepdim=True)),
        "ms_ssim": maps.smooth(maps.structural_dissimilarity(images, decoded)),
    }
    whole = {}
    if models.lpips is not None:
        heat["perceptual"] = maps.smooth(maps.perceptual_distance(models.lpips, images, decoded))
    if not models.deterministic:
        heat |= _posterior_maps(models, learnt, images, mean, logvar, size)
        if models.regret_steps:
            noise = _noise(mean, "posterior")
            whole["regret"] = likelihood.likelihood_regret(
                models.autoencoder, images, mean, logvar, noise, learnt.variance, models.regret_steps
            )
    distance = learnt.positions.distance(mean.movedim(1, -1))
    heat["mahalanobis"] = maps.of_positions(distance[:, None], size)
    whole["mahalanobis_pooled"] = learnt.pooled.distance(_pooled(mean))
    if models.pipeline is not None:
        heat |= {
            f"flow_t{time}": maps.of_positions(_flow_error(models, mean, time), size) for time in scores.FLOW_TIMES
        }
    values = whole | {name: found.flatten(1).mean(dim=1) for name, found in heat.items()}
    values |= {name + scores.PEAK: found.flatten(1).amax(dim=1) for name, found in heat.items()}
    values = {name: values[name].double().cpu() for name in models.names}
    for name, found in values.items():
        if not bool(found.isfinite().all()):
            bad = ids[int(found.isfinite().logical_not().nonzero()[0])]
            raise UserError(f"{bad}: its {name} is not finite; check the models, or leave this image out")
    return Measured(values, {name: found.float().cpu() for name, found in heat.items()})


def _posterior_maps(
    models: Models, learnt: Learnt, images: Tensor, mean: Tensor, logvar: Tensor, size: tuple[int, int]
) -> dict[str, Tensor]:
    """KL of a position in nats; negative ELBO in nats per value, whose mean is that of `likelihood.negative_elbo`."""
    kl = kl_divergence(mean, logvar).sum(dim=1, keepdim=True)
    error = (images - _decode_sample(models, images, mean, logvar)).square().mean(dim=1, keepdim=True)
    constant = 0.5 * math.log(2 * math.pi * learnt.variance)
    per_value = kl.shape[-2] * kl.shape[-1] / images[0].numel()
    elbo = maps.of_pixels(error / (2 * learnt.variance)) + constant + maps.of_positions(kl * per_value, size)
    return {"kl": maps.of_positions(kl, size), "elbo": elbo}


def _flow_error(models: Models, mean: Tensor, time: float) -> Tensor:
    """Squared velocity error, (n, 1, h, w), mean over channels and the fixed noises, without class."""
    clean = models.pipeline.normalizer.normalize(mean)
    times = torch.full((len(clean),), time, device=clean.device)
    found = clean.new_zeros(())
    for draw in range(FLOW_DRAWS):
        noise = _noise(clean, f"flow {draw}").expand_as(clean)
        velocity = models.pipeline.unet(flow.interpolate(clean, noise, times), times)
        error = (velocity - flow.velocity_target(clean, noise)).square()
        found = found + error.mean(dim=1, keepdim=True) / FLOW_DRAWS
    return found


def _decode_sample(models: Models, images: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Decoded from a posterior sample; of a deterministic autoencoder from its latents."""
    if not models.deterministic:
        mean = mean + torch.exp(0.5 * logvar) * _noise(mean, "posterior")
    return decode(models.autoencoder, mean)[..., : images.shape[-2], : images.shape[-1]]


def _noise(like: Tensor, purpose: str) -> Tensor:
    """(1, c, h, w), always the same."""
    return torch.randn(1, *like.shape[1:], generator=generator(0, "anomaly", purpose)).to(like.device)


def _pooled(latents: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, 2c): mean and standard deviation of each channel over the positions."""
    flat = latents.flatten(2)
    return torch.cat([flat.mean(dim=2), flat.std(dim=2, correction=0)], dim=1)
