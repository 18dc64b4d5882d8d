"""The scores of anomaly detection, each defined in one place: `SCORES`.

A score is higher for what is more anomalous. Most scores are heat maps; each of these counts twice, as the mean of its
map and as the highest value, `NAME_peak`, which a small defect raises and the mean hides.

    images -> Batch (what the networks make of them) -> Score.compute -> heat map or value -> `measure`

To add a score, write a function of a `Batch` that returns a heat map, `of_pixels(...)` or `of_positions(...)`, or one
value per image, and give it a line in `SCORES`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.losses import LPIPS, Backbone
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.rate import kl_divergence
from ldm_vae.diffusion import flow
from ldm_vae.errors import UserError
from ldm_vae.metrics import similarity_maps
from ldm_vae.random import generator

FLOW_TIMES = (0.3, 0.5)
"""Times of the flow loss, with enough noise to hide details but not the arrangement."""
FLOW_DRAWS = 2
"""Noises at each time."""
PEAK = "_peak"
POSITIONS = 256
"""Latent positions of one image that the Gaussian of positions is fitted to, evenly spaced."""
SMALLEST_VARIANCE = 1e-6


@dataclass(frozen=True)
class Networks:
    """What images are measured with. `regret_steps`: of likelihood regret; 0 leaves it out."""

    autoencoder: Autoencoder
    device: torch.device
    lpips: LPIPS | None = None
    pipeline: Any = None
    regret_steps: int = 0

    @property
    def deterministic(self) -> bool:
        return self.autoencoder.deterministic

    @property
    def score_names(self) -> list[str]:
        """All scores that these networks give."""
        return score_names(self.deterministic, self.lpips is not None, self.regret_steps > 0, self.pipeline is not None)


def load_networks(
    autoencoder: str,
    device: torch.device,
    pipeline: str | None = None,
    perceptual_net: Backbone | None = None,
    perceptual_weights: str | None = None,
    regret_steps: int = 0,
) -> Networks:
    """From disk. Raises: UserError, also where the pipeline is of another autoencoder."""
    model = load_autoencoder(autoencoder).to(device)
    lpips = LPIPS(perceptual_net, perceptual_weights).to(device) if perceptual_net else None
    found = None
    if pipeline is not None:
        from ldm_vae.diffusion.generation import pipeline_directory
        from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline

        found = LatentDiffusionPipeline.from_pretrained(pipeline_directory(pipeline), use_safetensors=True)
        if found.config["encoder_fingerprint"] != model.encoder_fingerprint():
            raise UserError(f"pipeline: {pipeline} was trained on latents of another autoencoder; give {autoencoder}'s")
        found.unet.to(device)
    return Networks(model, device, lpips, found, 0 if model.deterministic else regret_steps)


def check_pipeline_size(networks: Networks, resolution: int) -> None:
    """Raises: UserError where the U-Net has learned latents of images of another size."""
    if networks.pipeline is None:
        return
    factor = networks.autoencoder.downsampling
    trained = [side * factor for side in networks.pipeline.config["latent_size"]]
    if trained != [resolution, resolution]:
        raise UserError(
            f"resolution: {resolution} is not that of the pipeline, {trained[0]}x{trained[1]}, whose flow loss means "
            "nothing for others; set it, or leave pipeline out"
        )


@dataclass(frozen=True)
class NormalStatistics:
    """Statistics of normal images: the decoder's variance, the Gaussians of latent positions and of whole images."""

    variance: float
    positions: Gaussian
    pooled: Gaussian


class EncodedImages:
    """Images (n, 3, h, w) in [-1, 1] and what the networks make of them, each computed once and only where needed.

    Raises:
        UserError: naming the first image whose latents are not finite.
    """

    def __init__(self, networks: Networks, images: Tensor, ids: Sequence[str]) -> None:
        self.networks, self.images = networks, images.to(networks.device)
        self.size = (images.shape[-2] // STRIDE, images.shape[-1] // STRIDE)
        self.mean, self.logvar = networks.autoencoder.encode_moments(self.images)
        finite = (self.mean.isfinite() & self.logvar.isfinite()).flatten(1).all(dim=1)
        if not bool(finite.all()):
            name = ids[int(finite.logical_not().nonzero()[0])]
            raise UserError(
                f"autoencoder: its latents of {name} are not finite; `ldm-vae diagnose` says more, give another "
                "autoencoder"
            )

    @cached_property
    def decoded(self) -> Tensor:
        """Decoded from the posterior's mean."""
        return self._decode(self.mean)

    @cached_property
    def decoded_sample(self) -> Tensor:
        """Decoded from a posterior sample; of a deterministic autoencoder from its latents."""
        if self.networks.deterministic:
            return self._decode(self.mean)
        return self._decode(self.mean + torch.exp(0.5 * self.logvar) * self.noise("posterior"))

    @cached_property
    def kl(self) -> Tensor:
        """KL of each position in nats, (n, 1, h/f, w/f)."""
        return kl_divergence(self.mean, self.logvar).sum(dim=1, keepdim=True)

    @cached_property
    def pooled(self) -> Tensor:
        """(n, 2c): mean and standard deviation of each latent channel over the positions."""
        flat = self.mean.flatten(2)
        return torch.cat([flat.mean(dim=2), flat.std(dim=2, correction=0)], dim=1)

    def noise(self, purpose: str) -> Tensor:
        """(1, c, h/f, w/f), always the same."""
        return torch.randn(1, *self.mean.shape[1:], generator=generator(0, "anomaly", purpose)).to(self.mean.device)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.networks.autoencoder.decode_images(latents)[..., : self.images.shape[-2], : self.images.shape[-1]]


Compute = Callable[[EncodedImages, NormalStatistics], Tensor]
"""A heat map (n, h/4, w/4), or for a score that is not `local` one value per image (n,)."""
ScoreKind = Literal["reconstruction", "posterior", "likelihood", "latent", "flow"]
POSTERIOR, REGRET, PERCEPTUAL, FLOW = "a posterior", "a posterior and regret_steps", "perceptual_net", "pipeline"


@dataclass(frozen=True)
class Score:
    """A score. `kind`: what it looks at; `local`: whether it has a heat map; `needs`: besides an autoencoder."""

    title: str
    kind: ScoreKind
    compute: Compute
    local: bool = True
    needs: str = ""


def _l1(batch: EncodedImages, normal: NormalStatistics) -> Tensor:
    return of_pixels((batch.images - batch.decoded).abs().mean(dim=1, keepdim=True))


def _ms_ssim(batch: EncodedImages, normal: NormalStatistics) -> Tensor:
    return smooth(structural_dissimilarity(batch.images, batch.decoded))


def _perceptual(batch: EncodedImages, normal: NormalStatistics) -> Tensor:
    assert batch.networks.lpips is not None, "the score needs it"
    return smooth(perceptual_distance(batch.networks.lpips, batch.images, batch.decoded))


def _kl(batch: EncodedImages, normal: NormalStatistics) -> Tensor:
    return of_positions(batch.kl, batch.size)


def _elbo(batch: EncodedImages, normal: NormalStatistics) -> Tensor:
    """Negative ELBO in nats per value; the mean of the map is that of `negative_elbo`."""
    error = (batch.images - batch.decoded_sample).square().mean(dim=1, keepdim=True)
    constant = 0.5 * math.log(2 * math.pi * normal.variance)
    per_value = batch.kl.shape[-2] * batch.kl.shape[-1] / batch.images[0].numel()
    return of_pixels(error / (2 * normal.variance)) + constant + of_positions(batch.kl * per_value, batch.size)


def _regret(batch: EncodedImages, normal: NormalStatistics) -> Tensor:
    return likelihood_regret(
        batch.networks.autoencoder, batch.images, batch.mean, batch.logvar, batch.noise("posterior"),
        normal.variance, batch.networks.regret_steps,
    )  # fmt: skip


def _mahalanobis(batch: EncodedImages, normal: NormalStatistics) -> Tensor:
    return of_positions(normal.positions.distance(batch.mean.movedim(1, -1))[:, None], batch.size)


def _mahalanobis_pooled(batch: EncodedImages, normal: NormalStatistics) -> Tensor:
    return normal.pooled.distance(batch.pooled)


def _flow(time: float, batch: EncodedImages, normal: NormalStatistics) -> Tensor:
    """Squared velocity error, mean over channels and the fixed noises, without class."""
    pipeline = batch.networks.pipeline
    clean = pipeline.normalizer.normalize(batch.mean)
    times = torch.full((len(clean),), time, device=clean.device)
    found = clean.new_zeros(())
    for draw in range(FLOW_DRAWS):
        noise = batch.noise(f"flow {draw}").expand_as(clean)
        velocity = pipeline.unet(flow.interpolate(clean, noise, times), times)
        error = (velocity - flow.velocity_target(clean, noise)).square()
        found = found + error.mean(dim=1, keepdim=True) / FLOW_DRAWS
    return of_positions(found, batch.size)


SCORES = {
    "l1": Score("L1 of the reconstruction", "reconstruction", _l1),
    "ms_ssim": Score("structural dissimilarity of the reconstruction, three scales", "reconstruction", _ms_ssim),
    "perceptual": Score("LPIPS of the reconstruction", "reconstruction", _perceptual, needs=PERCEPTUAL),
    "kl": Score("KL of the posterior", "posterior", _kl, needs=POSTERIOR),
    "elbo": Score("negative ELBO, sigma-VAE", "likelihood", _elbo, needs=POSTERIOR),
    "regret": Score("likelihood regret", "likelihood", _regret, local=False, needs=REGRET),
    "mahalanobis": Score("Mahalanobis distance of latent positions", "latent", _mahalanobis),
    "mahalanobis_pooled": Score("Mahalanobis distance of pooled latents", "latent", _mahalanobis_pooled, local=False),
    **{
        f"flow_t{time}": Score(f"flow loss at t = {time}", "flow", partial(_flow, time), needs=FLOW)
        for time in FLOW_TIMES
    },
}


def score_names(deterministic: bool, perceptual: bool, regret: bool, flow: bool) -> list[str]:
    """The scores that the networks at hand allow, peaks included. Deterministic latents have no posterior."""
    there = {
        "": True, POSTERIOR: not deterministic, REGRET: regret and not deterministic, PERCEPTUAL: perceptual, FLOW: flow
    }  # fmt: skip
    found = []
    for name, score in SCORES.items():
        if there[score.needs]:
            found += [name, name + PEAK] if score.local else [name]
    return found


def score_quantity(name: str) -> str:
    """The measured quantity of a score: itself, or the one whose peak it is."""
    return name.removesuffix(PEAK)


def title(name: str) -> str:
    """In words."""
    return f"{SCORES[score_quantity(name)].title}{', peak' if name.endswith(PEAK) else ''}"


def check_score(name: str, known: Iterable[str]) -> None:
    """Raises: UserError for a score that is not among the `known`, saying what it needs or which was probably meant."""
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
    if name in score_names(False, True, True, True):
        hint = f"it needs {SCORES[score_quantity(name)].needs} when a detector is fitted; there are: {', '.join(known)}"
    raise UserError(f"by: {name!r} is not a score here; {hint}")


@dataclass(frozen=True)
class MeasuredScores:
    """`values`: score -> (n,) float64; `maps`: quantity -> (n, h/4, w/4); both on the CPU."""

    values: dict[str, Tensor]
    maps: dict[str, Tensor]


def learn(networks: Networks, batches: Iterable[tuple[Sequence[str], Tensor]]) -> NormalStatistics:
    """From batches (ids, images (n, 3, h, w) in [-1, 1]) of normal images."""
    errors, positions, pooled = [], [], []
    for ids, images in batches:
        batch = EncodedImages(networks, images, ids)
        errors.append((batch.images - batch.decoded_sample).square().flatten(1).mean(dim=1).double().cpu())
        flat = batch.mean.flatten(2).transpose(1, 2)
        chosen = torch.linspace(0, flat.shape[1] - 1, min(POSITIONS, flat.shape[1])).round().long()
        positions.append(flat[:, chosen.to(flat.device)].flatten(0, 1).cpu())
        pooled.append(batch.pooled.cpu())
    variance = max(float(torch.cat(errors).mean()), SMALLEST_VARIANCE)
    return NormalStatistics(variance, fit_gaussian(torch.cat(positions)), fit_gaussian(torch.cat(pooled)))


@torch.no_grad()
def measure_scores(networks: Networks, normal: NormalStatistics, images: Tensor, ids: Sequence[str]) -> MeasuredScores:
    """Every score and heat map of images (n, 3, h, w) in [-1, 1].

    Raises:
        UserError: naming the image and the score, where a value is not finite.
    """
    batch = EncodedImages(networks, images, ids)
    values, maps = dict[str, Tensor](), dict[str, Tensor]()
    for name in dict.fromkeys(map(score_quantity, networks.score_names)):
        found = SCORES[name].compute(batch, normal)
        if SCORES[name].local:
            maps[name] = found.float().cpu()
            values[name], values[name + PEAK] = found.flatten(1).mean(dim=1), found.flatten(1).amax(dim=1)
        else:
            values[name] = found
    values = {name: of_score.double().cpu() for name, of_score in values.items()}
    for name, of_score in values.items():
        if not bool(of_score.isfinite().all()):
            bad = ids[int(of_score.isfinite().logical_not().nonzero()[0])]
            raise UserError(f"{bad}: its {name} is not finite; check the models, or leave this image out")
    return MeasuredScores(values, maps)


# Heat maps: one value every four pixels, averaged over a window, the same grid for every score.

STRIDE = 4
"""Pixels from one value of a heat map to the next."""
WINDOW = 3
"""Values that are averaged along each side: 12 pixels, a little more than a latent position at f8."""
SCALES = 3


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
    x, y = (F.pad(image, (5, 5, 5, 5), mode="replicate") for image in (x, y))
    contrast, luminance = similarity_maps(x, y)
    return (contrast * luminance if with_luminance else contrast).clamp(-1, 1)


def perceptual_distance(lpips: LPIPS, images: Tensor, references: Tensor) -> Tensor:
    """LPIPS at every place: (n, 3, h, w) twice -> (n, 1, h/4, w/4), the layers' maps summed."""
    size = (images.shape[-2] // STRIDE, images.shape[-1] // STRIDE)
    found = images.new_zeros(())
    for head, x, y in zip(lpips.heads, lpips.features(images), lpips.features(references)):
        found = found + F.interpolate(head((x - y).square()), size=size, mode="bilinear", align_corners=False)
    return found


# A Gaussian fitted to feature vectors, and how far others are from it.

SMALLEST_DEVIATION = 1e-6
"""Smallest deviation of a feature, for features that are the same in all images."""
SMALLEST_SHARE = 1e-3
"""Share of the identity in a covariance, so that it can be inverted if features repeat each other."""


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
"""Step size of Adam, in posterior standard deviations."""


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
    autoencoder: Autoencoder, images: Tensor, mean: Tensor, logvar: Tensor, noise: Tensor, variance: float, steps: int
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
