"""What lies between two images: in pixels, in an autoencoder's latents, and through a diffusion model's noise.

Owns the ways from one image to another, the draws from the prior, and their figures; the files are
`interpolation_folder`'s. Autoencoders' latents are image-like, so they are mixed along a straight line; noise is mixed
along a great circle, which keeps its variance (arXiv:2408.08558).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae.autoencoder.interface import decode, encode_moments
from ldm_vae.data import pixels
from ldm_vae.diffusion import flow
from ldm_vae.diffusion.guidance import Guidance, GuidedVelocity
from ldm_vae.diffusion.interpolation import between_latents, between_noises, shares
from ldm_vae.diffusion.sampling import Heun, first_step, flow_times, solve
from ldm_vae.diffusion.schedulers import shift_of
from ldm_vae.errors import UserError
from ldm_vae.evaluation import metrics
from ldm_vae.evaluation.sweeps.latent_quality import measure_path, round_trip
from ldm_vae.random import generator

PIXELS, LATENTS, OTHER, INVERTED, NOISED = "pixels", "latents", "other", "inverted", "noised"

Frames = Callable[[Tensor], Tensor]
"""Images (2, 3, h, w) in [-1, 1] -> the way from the first to the second (s, 3, h, w)."""


@dataclass(frozen=True)
class Way:
    """One way of going from an image to another. `key`: for file names, `title`: for people."""

    key: str
    title: str
    frames: Frames


@dataclass(frozen=True)
class WayFigures:
    """Of one way between one pair; the first four are those of `latent_quality.Path`.

    Attributes:
        end_psnr_db: of the first and the last frame to the two images, mean.
        fade_psnr_db: of the frame half way to the cross-fade of the pixels: where it is high, the way is little more.
    """

    unevenness: float
    midpoint_sharpness: float
    perceptual_length: float
    distance: str
    end_psnr_db: float
    fade_psnr_db: float


MEASURES = {
    "unevenness": "unevenness",
    "midpoint_sharpness": "midpoint sharpness",
    "perceptual_length": "perceptual length",
    "end_psnr_db": "ends (dB)",
    "fade_psnr_db": "midpoint to cross-fade (dB)",
}


def cross_fade(pair: Tensor, count: int) -> Tensor:
    """Mixed pixels (s, 3, h, w): what every other way has to be better than."""
    return torch.cat([between_latents(pair[:1], pair[1:], share) for share in shares(count)])


def through_latents(autoencoder: Any, pair: Tensor, count: int) -> Tensor:
    """A straight line between posterior means, decoded one by one."""
    ends = means_of(autoencoder, pair)
    return decode_cropped(autoencoder, [between_latents(ends[:1], ends[1:], share) for share in shares(count)], pair)


def through_inversion(pipeline: Any, pair: Tensor, count: int, steps: int) -> Tensor:
    """Both images followed back to the noise that the flow makes them of, a great circle there, and forward again."""
    ends = pipeline.normalizer.normalize(means_of(pipeline.autoencoder, pair))
    velocity, times = flow_of(pipeline, ends, steps)
    back = Heun(times[::-1])
    noises = [solve(velocity, end[None], back) for end in ends]
    ahead = Heun(times)
    found = [solve(velocity, between_noises(noises[0], noises[1], share), ahead) for share in shares(count)]
    return decode_cropped(pipeline.autoencoder, [pipeline.normalizer.denormalize(z) for z in found], pair)


def through_noising(pipeline: Any, pair: Tensor, count: int, steps: int, strength: float, seed: int) -> Tensor:
    """The straight line between normalised latents, noised by one noise for all frames and denoised by the model."""
    ends = pipeline.normalizer.normalize(means_of(pipeline.autoencoder, pair))
    velocity, times = flow_of(pipeline, ends, steps)
    times = times[first_step(steps, strength) :]
    noise = torch.randn(ends[:1].shape, generator=generator(seed, "interpolation")).to(ends)
    start = torch.full((1,), times[0], device=ends.device)
    found = []
    for share in shares(count):
        clean = between_latents(ends[:1], ends[1:], share)
        found.append(solve(velocity, flow.interpolate(clean, noise, start), Heun(times)))
    return decode_cropped(pipeline.autoencoder, [pipeline.normalizer.denormalize(z) for z in found], pair)


def flow_of(pipeline: Any, latents: Tensor, steps: int) -> tuple[Any, tuple[float, ...]]:
    """The velocity of any class, without guidance, and the times for latents of this size."""
    trained_height, trained_width = pipeline.config["latent_size"]
    height, width = latents.shape[-2:]
    shift = shift_of(pipeline.scheduler) * (height * width / (trained_height * trained_width)) ** 0.5
    guided = GuidedVelocity(pipeline.unet, None, None, Guidance())

    @torch.no_grad()
    def velocity(noisy: Tensor, time: Tensor) -> Tensor:
        return guided(noisy, time)

    return velocity, flow_times(steps, shift)


def means_of(autoencoder: Any, images: Tensor) -> Tensor:
    """Posterior means of images (n, 3, h, w), encoded one by one. Raises: UserError when they are not finite."""
    means = torch.cat([encode_moments(autoencoder, image[None].to(autoencoder.device))[0] for image in images])
    if not bool(torch.isfinite(means).all()):
        raise UserError("latents: some are not finite; check the autoencoder with `ldm-vae diagnose`")
    return means


def decode_cropped(autoencoder: Any, latents: Sequence[Tensor], like: Tensor) -> Tensor:
    """Latents (1, c, h, w) -> images of the height and width of `like`, on the CPU, after an 8-bit round trip."""
    images = torch.cat([decode(autoencoder, latent).cpu() for latent in latents])
    return pixels.from_uint8(pixels.to_uint8(images[..., : like.shape[-2], : like.shape[-1]]))


def measure_way(frames: Tensor, pair: Tensor) -> WayFigures:
    """Figures of frames (s, 3, h, w) between two images (2, 3, h, w)."""
    path = measure_path(frames)
    middle = cross_fade(pair, 3)[1:2]
    return WayFigures(
        unevenness=path.unevenness,
        midpoint_sharpness=path.midpoint_sharpness,
        perceptual_length=path.perceptual_length,
        distance=path.distance,
        end_psnr_db=float(metrics.psnr(frames[[0, -1]], pair).mean()),
        fade_psnr_db=float(metrics.psnr(frames[len(frames) // 2][None], middle)),
    )


@dataclass(frozen=True)
class Draws:
    """Decoded draws from one prior. `images` (n, 3, h, w). `round_trip`: rms of encode(decode(z)) - z, per channel in
    standard deviations of the latents: 0.1 says that the decoder understood z, 1 that z is nothing to it."""

    title: str
    images: Tensor
    round_trip: float


def draw_priors(autoencoder: Any, images: Tensor, count: int, seed: int) -> list[Draws]:
    """`count` draws from N(0, 1), from a normal of each channel's own mean and deviation, both independent between
    positions, and for comparison posterior samples of real images (n, 3, h, w), n >= 2; all from the same noise."""
    found = [encode_moments(autoencoder, image[None].to(autoencoder.device)) for image in images]
    mean, variance = torch.cat([one[0] for one in found]), torch.cat([one[1] for one in found]).exp()
    if not bool(torch.isfinite(mean).all()):
        raise UserError("latents: some are not finite; check the autoencoder with `ldm-vae diagnose`")
    centre = mean.mean(dim=(0, 2, 3), keepdim=True)
    spread = (mean.var(dim=(0, 2, 3), keepdim=True, correction=0) + variance.mean(dim=(0, 2, 3), keepdim=True)).sqrt()
    noise = torch.randn((count, *mean.shape[1:]), generator=generator(seed, "prior")).to(mean)
    rows = np.arange(count) % len(mean)
    kinds = {
        "N(0, 1)": noise,
        "channel statistics": centre + spread * noise,
        "posterior samples": mean[rows] + variance[rows].sqrt() * noise,
    }
    drawn = []
    for title, latents in kinds.items():
        decoded, error = round_trip(autoencoder, latents, spread)
        drawn.append(Draws(title, decoded[..., : images.shape[-2], : images.shape[-1]].cpu(), error))
    return drawn


def draw_model(pipeline: Any, like: Tensor, count: int, steps: int, seed: int) -> Draws:
    """`count` images that the diffusion model generates, of any class, without guidance, in the size of `like`."""
    normalized = torch.empty(1, *means_of(pipeline.autoencoder, like[:1]).shape[1:])
    velocity, times = flow_of(pipeline, normalized, steps)
    noise = torch.randn((count, *normalized.shape[1:]), generator=generator(seed, "prior"))
    device = pipeline.autoencoder.device
    latents = torch.cat([solve(velocity, one[None].to(device), Heun(times)) for one in noise])
    latents = pipeline.normalizer.denormalize(latents)
    spread = torch.tensor(pipeline.normalizer.std, device=device, dtype=torch.float32).view(1, -1, 1, 1)
    decoded, error = round_trip(pipeline.autoencoder, latents, spread)
    return Draws("diffusion model", decoded[..., : like.shape[-2], : like.shape[-1]].cpu(), error)
