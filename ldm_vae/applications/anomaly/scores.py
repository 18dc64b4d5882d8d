"""The scores: their names, what they look at, and what each of them can miss. Measuring them is `measurement`'s.

A score is higher for what is more anomalous. Those with a heat map come twice: the mean of the map, and its highest
value as `NAME_peak`, which a small defect raises and the mean hides.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_vae.autoencoder.base import decode, encode_moments, is_deterministic
from ldm_vae.autoencoder.losses import LPIPS, Backbone
from ldm_vae.autoencoder.models import downsampling, load_autoencoder
from ldm_vae.autoencoder.rate import kl_divergence
from ldm_vae.autoencoder.weights import encoder_fingerprint
from ldm_vae.diffusion import flow
from ldm_vae.errors import UserError
from ldm_vae.random import generator

FLOW_TIMES = (0.3, 0.5)
"""Of the flow loss: enough noise to hide details, not the arrangement."""

Kind = Literal["reconstruction", "posterior", "likelihood", "latent", "flow"]


@dataclass(frozen=True)
class Score:
    """What a score is. `kind`: what it looks at; `local`: whether it has a heat map; `needs`: beside an autoencoder."""

    title: str
    kind: Kind
    local: bool = True
    needs: str = ""


POSTERIOR, REGRET, PERCEPTUAL, FLOW = "a posterior", "a posterior and regret_steps", "perceptual_net", "pipeline"

MEASURED = {
    "l1": Score("L1 of the reconstruction", "reconstruction"),
    "ms_ssim": Score("structural dissimilarity of the reconstruction, three scales", "reconstruction"),
    "perceptual": Score("LPIPS of the reconstruction", "reconstruction", needs=PERCEPTUAL),
    "kl": Score("KL of the posterior", "posterior", needs=POSTERIOR),
    "elbo": Score("negative ELBO, sigma-VAE", "likelihood", needs=POSTERIOR),
    "regret": Score("likelihood regret", "likelihood", local=False, needs=REGRET),
    "mahalanobis": Score("Mahalanobis distance of latent positions", "latent"),
    "mahalanobis_pooled": Score("Mahalanobis distance of pooled latents", "latent", local=False),
    **{f"flow_t{time}": Score(f"flow loss at t = {time}", "flow", needs=FLOW) for time in FLOW_TIMES},
}
PEAK = "_peak"


def names(deterministic: bool, perceptual: bool, regret: bool, flow: bool) -> list[str]:
    """The scores that the models at hand allow, peaks included. Latents that are points have no posterior to judge."""
    there = {"": True, POSTERIOR: not deterministic, REGRET: regret, PERCEPTUAL: perceptual, FLOW: flow}
    found = []
    for name, score in MEASURED.items():
        if there[score.needs]:
            found += [name, name + PEAK] if score.local else [name]
    return found


def base(name: str) -> str:
    """The measured quantity of a score: itself, or that whose peak it is."""
    return name.removesuffix(PEAK)


def title(name: str) -> str:
    """In words."""
    return f"{MEASURED[base(name)].title}{', peak' if name.endswith(PEAK) else ''}"


def check_name(name: str, known: Iterable[str]) -> None:
    """Raises: UserError for a score that is not among the `known`, saying what it needs or which was probably meant."""
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
    if name in names(False, True, True, True):
        hint = f"it needs {MEASURED[base(name)].needs} when a detector is fitted; there are: {', '.join(known)}"
    raise UserError(f"by: {name!r} is no score here; {hint}")


# A Gaussian fitted to feature vectors, and how far others are from it.

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


def shrunk_covariance(centered: Tensor) -> Tensor:
    """(1 - s) S + s m I of centered rows (n, d): S their covariance, m its mean variance, s from the data."""
    count, size = centered.shape
    covariance = centered.T @ centered / count
    variance = covariance.diagonal().mean()
    identity = torch.eye(size, dtype=centered.dtype)
    spread = (covariance - variance * identity).square().sum()
    squares = centered.square()
    error = ((squares.T @ squares).sum() / count - covariance.square().sum()) / count
    share = float((error / spread).clamp(SMALLEST_SHARE, 1)) if spread > 0 else 1.0
    return (1 - share) * covariance + share * variance.clamp(min=SMALLEST_DEVIATION**2) * identity


# The evidence lower bound of an image, and by how much a few steps on its own posterior improve it.

STEP = 0.3
"""Of Adam, in posterior standard deviations."""


def negative_elbo(images: Tensor, decoded: Tensor, kl: Tensor, variance: float) -> Tensor:
    """(n,): -ln N(images; decoded, variance) and the KL, over the number of values.

    Args:
        images, decoded: (n, 3, h, w) in [-1, 1]; decoded from one posterior sample.
        kl: element by element, (n, c, h/f, w/f).
        variance: of the decoder.
    """
    error = (images - decoded).square().flatten(1).mean(dim=1)
    rate = kl.flatten(1).sum(dim=1) / images[0].numel()
    return error / (2 * variance) + 0.5 * math.log(2 * math.pi * variance) + rate


def likelihood_regret(
    autoencoder: Any, images: Tensor, mean: Tensor, logvar: Tensor, noise: Tensor, variance: float, steps: int
) -> Tensor:
    """(n,) >= 0: the negative ELBO of the encoder's posterior less the lowest within `steps` steps on that posterior.

    High where the encoder serves an image badly (Xiao et al., arXiv:2003.02977; there it is the whole encoder that is
    trained further, here its outputs). Mean and log-variance move in units of the posterior, with the same `noise`
    (1 or n, c, h, w) in every step; images do not affect each other.
    """
    mean, logvar = mean.detach(), logvar.detach()
    shift, log_scale = (torch.zeros_like(mean).requires_grad_() for _ in range(2))
    optimizer = torch.optim.Adam([shift, log_scale], lr=STEP)
    best = first = torch.zeros(0)
    for step in range(steps + 1):
        with torch.enable_grad():
            moved, widened = mean + torch.exp(0.5 * logvar) * shift, logvar + log_scale
            latents = moved + torch.exp(0.5 * widened) * noise
            decoded = autoencoder.decode(latents.to(autoencoder.dtype)).sample.float()
            losses = negative_elbo(images, decoded, kl_divergence(moved, widened), variance)
            total = losses.sum()
        found = losses.detach()
        first = found if step == 0 else first
        best = found if step == 0 else torch.minimum(best, found)
        if step < steps:
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    return first - best


# Heat maps: one value every four pixels, averaged over a window, the same grid for every score.

STRIDE = 4
"""Pixels from one value of a heat map to the next."""
WINDOW = 3
"""Values that are averaged along each side: 12 pixels, a little more than a latent position at f8."""
SCALES = 3
CONTRAST_FLOOR = 0.06**2
LUMINANCE_FLOOR = 0.02**2
"""C2 and C1 of SSIM (Wang 2004) for the range -1 to 1."""


def of_pixels(values: Tensor) -> Tensor:
    """(n, 1, h, w), a value each pixel -> (n, h/4, w/4)."""
    return smooth(F.avg_pool2d(values.float(), STRIDE))


def of_positions(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 1, h, w) of a coarser grid, as of latent positions -> (n, *size)."""
    return smooth(F.interpolate(values.float(), size=size, mode="bilinear", align_corners=False))


def smooth(maps: Tensor) -> Tensor:
    """(n, 1, h, w) -> (n, h, w): the mean over the window, which ends at the border."""
    return F.avg_pool2d(maps, WINDOW, stride=1, padding=WINDOW // 2, count_include_pad=False)[:, 0]


def structural_dissimilarity(images: Tensor, references: Tensor) -> Tensor:
    """(n, 3, h, w) twice -> (n, 1, h/4, w/4) in [0, 1]: (1 - SSIM) / 2, mean over three scales and RGB.

    As in MS-SSIM the finer scales compare contrast and structure, the coarsest one brightness as well; their mean
    takes the place of the product, which is one number for an image and no map.
    """
    found = images.new_zeros(())
    for scale in range(SCALES):
        similarity = _similarity(images, references, with_luminance=scale == SCALES - 1)
        found = found + F.avg_pool2d((1 - similarity) / 2, STRIDE >> scale).mean(dim=1, keepdim=True) / SCALES
        images, references = F.avg_pool2d(images, 2), F.avg_pool2d(references, 2)
    return found


def _similarity(x: Tensor, y: Tensor, with_luminance: bool) -> Tensor:
    """SSIM at every pixel, Gaussian window of 11 pixels and sigma 1.5, borders replicated."""
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    variance_x = _local_mean(x * x) - mean_x.square()
    variance_y = _local_mean(y * y) - mean_y.square()
    covariance = _local_mean(x * y) - mean_x * mean_y
    found = (2 * covariance + CONTRAST_FLOOR) / (variance_x + variance_y + CONTRAST_FLOOR)
    if with_luminance:
        found = found * (2 * mean_x * mean_y + LUMINANCE_FLOOR) / (mean_x**2 + mean_y**2 + LUMINANCE_FLOOR)
    return found.clamp(-1, 1)


def _local_mean(x: Tensor) -> Tensor:
    offsets = torch.arange(-5, 6, device=x.device)
    weights = torch.softmax(-offsets.square() / (2 * 1.5**2), dim=0).to(x)
    channels = x.shape[1]
    x = F.pad(x, (5, 5, 5, 5), mode="replicate")
    x = F.conv2d(x, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def perceptual_distance(lpips: LPIPS, images: Tensor, references: Tensor) -> Tensor:
    """LPIPS at every place: (n, 3, h, w) twice -> (n, 1, h/4, w/4), the layers' maps summed."""
    size = (images.shape[-2] // STRIDE, images.shape[-1] // STRIDE)
    found = images.new_zeros(())
    for head, x, y in zip(lpips.heads, lpips.features(images), lpips.features(references)):
        found = found + F.interpolate(head((x - y).square()), size=size, mode="bilinear", align_corners=False)
    return found


# Measuring images: what normal images teach (`learn`), and every score and heat map of others (`measure`).

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
        return names(self.deterministic, self.lpips is not None, self.regret_steps > 0, self.pipeline is not None)


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
    size = (images.shape[-2] // STRIDE, images.shape[-1] // STRIDE)
    mean, logvar = encode(models, images, ids)
    decoded = decode(models.autoencoder, mean)[..., : images.shape[-2], : images.shape[-1]]
    heat = {
        "l1": of_pixels((images - decoded).abs().mean(dim=1, keepdim=True)),
        "ms_ssim": smooth(structural_dissimilarity(images, decoded)),
    }
    whole = {}
    if models.lpips is not None:
        heat["perceptual"] = smooth(perceptual_distance(models.lpips, images, decoded))
    if not models.deterministic:
        heat |= _posterior_maps(models, learnt, images, mean, logvar, size)
        if models.regret_steps:
            noise = _noise(mean, "posterior")
            whole["regret"] = likelihood_regret(
                models.autoencoder, images, mean, logvar, noise, learnt.variance, models.regret_steps
            )
    distance = learnt.positions.distance(mean.movedim(1, -1))
    heat["mahalanobis"] = of_positions(distance[:, None], size)
    whole["mahalanobis_pooled"] = learnt.pooled.distance(_pooled(mean))
    if models.pipeline is not None:
        heat |= {f"flow_t{time}": of_positions(_flow_error(models, mean, time), size) for time in FLOW_TIMES}
    values = whole | {name: found.flatten(1).mean(dim=1) for name, found in heat.items()}
    values |= {name + PEAK: found.flatten(1).amax(dim=1) for name, found in heat.items()}
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
    elbo = of_pixels(error / (2 * learnt.variance)) + constant + of_positions(kl * per_value, size)
    return {"kl": of_positions(kl, size), "elbo": elbo}


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
