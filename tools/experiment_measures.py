"""What `experiments.py` measures of one trained autoencoder and of the images that a latent U-Net makes with it.

Owns the figures: reconstruction, noise on latents, rounding to a rate, interpolation, spectra, the discriminator, and
what the reader sees in generated images. The reader and the test images are those of `synthetic_reader.py`: no scene is
in two of the sets for training, for the reader and for the test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.gan import PatchDiscriminator
from ldm_vae.autoencoder.klt import block_moments, solve_klt
from ldm_vae.autoencoder.losses import LPIPS
from ldm_vae.autoencoder.rate import kl_divergence
from ldm_vae.data import transforms
from ldm_vae.data.synthetic.source import SyntheticConfig
from ldm_vae.diffusion.fid import squared_mmd
from ldm_vae.errors import UserError
from ldm_vae.evaluation.comparison import code_use
from ldm_vae.evaluation.latent_space import interpolation, prior_samples
from ldm_vae.evaluation.reconstruction import all_metrics
from ldm_vae.files import write_atomically, write_json
from ldm_vae.metrics import luma
from ldm_vae.random import generator
from ldm_vae.training import checkpoint
from tools.measure_synthetic import judge_attributes
from tools.synthetic_reader import (
    Reader,
    Truth,
    held_out_config,
    reader_config,
    reading_errors,
    render,
    train_reader,
)

BATCH = 50
LATENT_NOISE = 0.25
"""Standard deviation of the noise on latents, in standard deviations of each channel."""
INTERPOLATED_IMAGES = 40
FLAT_LEVELS, FLAT_SIDE = 1.5, 9
"""8-bit levels of fine contrast below which the original counts as flat, for a square with this side in pixels."""
FINE_PERIOD, HATCHING_PERIOD = 4, 8
"""Pixels: the longest period of fine detail, and of hatching, which the 8 x 8 pixels of a latent position make."""

Figures = dict[str, float | None]


@dataclass(frozen=True)
class TestSet:
    """Images (n, 3, side, side) in [-1, 1] of scenes that nothing was trained on, what they show, and their reader.

    Attributes:
        images: Real images.
        truth: What they show.
        reader: The network that reads classes and attributes.
        read: What the reader reads in `images`.
        errors: How far that is from the truth, see `synthetic_reader.reading_errors`.
    """

    images: Tensor
    truth: Truth
    reader: Reader
    read: Truth
    errors: dict[str, Any]

    __test__ = False  # not a test of pytest

    def features(self, images: Tensor) -> np.ndarray:
        """The reader's last hidden layer (n, d) for images (n, 3, side, side), standardized by the test images'."""
        real = hidden_layer(self.reader, self.images)
        return (hidden_layer(self.reader, images) - real.mean(0)) / real.std(0).clip(1e-6)


@torch.no_grad()
def hidden_layer(reader: Reader, images: Tensor) -> np.ndarray:
    """(n, 3, side, side) in [-1, 1] -> (n, d), float64."""
    reader.eval()
    return torch.cat([reader.trunk(part) for part in images.split(BATCH)]).double().numpy()


def open_test_set(folder: Path, config: SyntheticConfig, count: int, taught: int, epochs: int) -> TestSet:
    """The test images of a set, and its reader: from `folder`, or trained now and kept there.

    Args:
        folder: For reader.safetensors and reader.json.
        config: The set that the autoencoders learn from.
        count: Test images.
        taught: Real images that the reader learns from.
        epochs: How often it sees each.
    """
    side, file = config.resolution, folder / "reader.safetensors"
    images, truth = render(held_out_config(config, count), side, finer=1)
    if file.is_file():
        reader = Reader(side)
        reader.load_state_dict(load_file(file))
    else:
        reader = train_reader(*render(reader_config(config, taught), side, finer=1), epochs)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda path: save_file(reader.state_dict(), path))
    read = reader.read(images)
    errors = reading_errors(read, truth)
    write_json(folder / "reader.json", errors | {"images": count, "learned_from": taught, "epochs": epochs})
    return TestSet(images, truth, reader, read, errors)


# Reconstructions and latents.


def rounded_to_8_bits(images: Tensor) -> Tensor:
    return transforms.from_uint8(transforms.to_uint8(images))


def encode(autoencoder: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior means and log-variances (n, c, h, w) of images."""
    parts = [autoencoder.encode_moments(part) for part in images.split(BATCH)]
    means, logvars = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(logvars)


def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Images (n, 3, h, w), rounded to 8 bits."""
    return rounded_to_8_bits(torch.cat([autoencoder.decode_images(part) for part in latents.split(BATCH)]))


def mean_metrics(decoded: Tensor, images: Tensor, lpips: LPIPS | None, suffix: str) -> Figures:
    """The mean over the images of each metric of `evaluate`, as psnr_SUFFIX and so on."""
    found = [all_metrics(x, y, lpips) for x, y in zip(decoded.split(BATCH), images.split(BATCH), strict=True)]
    return {f"{name}_{suffix}": float(torch.cat([one[name] for one in found]).mean()) for name in found[0]}


def latent_figures(autoencoder: Autoencoder, images: Tensor, lpips: LPIPS | None) -> Figures:
    """How the decoder takes latents that are not those of an image: noise, interpolation, draws from a Gaussian."""
    mean, logvar = encode(autoencoder, images)
    spread = aggregate_deviation(mean, logvar)
    noise = torch.randn(mean.shape, generator=generator(0, "latent noise"))
    noisy = decode(autoencoder, mean + LATENT_NOISE * spread * noise)
    few = images[:INTERPOLATED_IMAGES]
    line = interpolation(autoencoder, few, lpips)
    prior = prior_samples(autoencoder, few, solve_klt([block_moments(images, 8)], 8))
    return {
        **mean_metrics(noisy, images, lpips, "noisy"),
        "unevenness": line.unevenness,
        "midpoint_sharpness": line.midpoint_sharpness,
        "cycle_error": prior.cycle_error,
        "cycle_error_real": prior.cycle_error_real,
        "prior_distance": prior.frechet,
        "prior_distance_real": prior.frechet_reconstructions,
        "latent_deviation": float(spread.square().mean().sqrt()),
        "posterior_deviation": float(((0.5 * logvar).exp() / spread).square().mean().sqrt()),
    }


def aggregate_deviation(mean: Tensor, logvar: Tensor) -> Tensor:
    """Standard deviation of each channel of the aggregate posterior, (1, c, 1, 1)."""
    variance = mean.var(dim=(0, 2, 3), keepdim=True) + logvar.exp().mean(dim=(0, 2, 3), keepdim=True)
    return variance.sqrt().clamp_min(1e-6)


# Everything at one rate.


def rate_figures(
    autoencoder: Autoencoder, images: Tensor, training: Tensor, lpips: LPIPS | None, bits: float
) -> Figures:
    """A reconstruction from this number of bits per latent position: a posterior sample, a code, or a rounded plain
    latent.

    Plain latents are rounded to the multiples of one step, the one whose indices have a first-order entropy of `bits`
    over all channels on `training` images. The rates are measured on `images`: KL to N(0, 1), entropy of the used codes
    or of the rounded indices.
    """
    mean, logvar = encode(autoencoder, images)
    if autoencoder.has_codes:
        latents, used = mean, code_use(autoencoder, images)
        assert used is not None, "it has codes"
        rate = math.log2(used["perplexity"])
    elif autoencoder.deterministic:
        step = rounding_step(encode(autoencoder, training)[0], bits)
        latents, rate = (mean / step).round() * step, index_entropy(mean, step)
    else:
        noise = torch.randn(mean.shape, generator=generator(0, "posterior at a rate"))
        latents = mean + (0.5 * logvar).exp() * noise
        rate = float(kl_divergence(mean, logvar).sum(dim=1).mean()) / math.log(2)
    at_rate = mean_metrics(decode(autoencoder, latents), images, lpips, "at_rate")
    return {**at_rate, "bits_per_position": rate, "bits_per_pixel": rate / autoencoder.downsampling**2}


def index_entropy(latents: Tensor, step: float) -> float:
    """Bits for each position of latents (n, c, h, w) rounded to multiples of `step`: the channels' entropies, added."""
    total = 0.0
    for channel in (latents / step).round().transpose(0, 1).flatten(1):
        _, counts = channel.unique(return_counts=True)
        share = counts.double() / counts.sum()
        total -= float((share * share.log2()).sum())
    return total


def rounding_step(latents: Tensor, bits: float) -> float:
    """The step at which `index_entropy` is `bits`, by bisection.

    Raises: UserError if more bits are requested than this number of latents can show.
    """
    low, high = 1e-6 * float(latents.std()), 1e3 * float(latents.std())
    if index_entropy(latents, low) < bits:
        raise UserError(
            f"{len(latents)} images: their latents show less than {bits:g} bits a position; give more images"
        )
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if index_entropy(latents, middle) > bits else (low, middle)
    return high


# Spectra, grain, and the discriminator.


def axis_power(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Power spectrum of the brightness of images (n, 3, s, s), in squared 8-bit levels, mean over the images.

    Returns:
        Along rows (s/2,): at vertical frequency 0 and the horizontal ones 1, 2 ... s/2, where vertical stripes stand;
        along columns (s/2,): the same for horizontal stripes; the sum over all frequencies with a period of at most
        `FINE_PERIOD` pixels in either direction, ().
    """
    side = images.shape[-1]
    levels = luma(images)[:, 0].double() * 127.5
    window = torch.hann_window(side, periodic=False, dtype=torch.float64)
    window = window[:, None] * window
    weighted = (levels - levels.mean(dim=(1, 2), keepdim=True)) * window
    power = torch.fft.fft2(weighted).abs().square().mean(0) / window.square().sum()
    frequency = (torch.fft.fftfreq(side) * side).abs()
    fine = torch.maximum(frequency[:, None], frequency) >= side / FINE_PERIOD
    half = side // 2
    return power[0, 1 : half + 1], power[1 : half + 1, 0], power[fine].sum()


def spectrum_figures(decoded: Tensor, images: Tensor) -> tuple[Figures, dict[str, list[float]]]:
    """Contrast of fine detail, hatching and grain of reconstructions; and the spectra relative to the originals, in dB.

    `fine_contrast_db`: power of fine detail relative to the originals': below 0 is blur. `hatching_db`: the largest
    surplus of power at a period of at most `HATCHING_PERIOD` pixels along rows or columns: above 0 stands a pattern
    that the originals do not have. `grain`: see `grain`.
    """
    made, real = axis_power(decoded), axis_power(images)
    rows, columns, fine = (10 * torch.log10(x / y.clamp_min(1e-12)) for x, y in zip(made, real, strict=True))
    first = images.shape[-1] // HATCHING_PERIOD - 1
    figures: Figures = {
        "fine_contrast_db": float(fine),
        "hatching_db": float(torch.cat([rows[first:], columns[first:]]).max()),
        "grain": grain(decoded, images),
    }
    return figures, {"rows_db": rows.tolist(), "columns_db": columns.tolist()}


def grain(decoded: Tensor, images: Tensor) -> float | None:
    """Root mean square of fine contrast where the original is flat, in 8-bit levels, less that of the original there.

    Fine contrast is a pixel's brightness less the mean of its 3 x 3 neighborhood. Flat is where the original has less
    than `FLAT_LEVELS` of it in all of `FLAT_SIDE` x `FLAT_SIDE` pixels, so that soft edges are not counted. None where
    nothing is flat.
    """

    def fine(x: Tensor) -> Tensor:
        levels = luma(x) * 127.5
        return levels[..., 1:-1, 1:-1] - F.avg_pool2d(levels, 3, 1)

    original, made = fine(images), fine(decoded)
    flat = F.max_pool2d(original.abs(), FLAT_SIDE, 1, FLAT_SIDE // 2) < FLAT_LEVELS
    if not bool(flat.any()):
        return None
    return float(made[flat].double().square().mean().sqrt() - original[flat].double().square().mean().sqrt())


def adversary_figures(run: Path, decoded: Tensor, images: Tensor) -> Figures:
    """What the discriminator of a finished run tells apart; nothing for a run without one.

    `logit_gap`: mean logit of training images less that of their reconstructions over the last fifth of the run; an
    untrained one has 0. `told_apart`: the share of the test images whose mean logit is above that of their own
    reconstruction; chance is 0.5.
    """
    newest, _ = checkpoint.newest(run / "checkpoints")
    weights = newest / "discriminator.safetensors" if newest else None
    if weights is None or not weights.is_file():
        return {}
    tensors = load_file(weights)
    discriminator = PatchDiscriminator(tensors["layers.0.weight"].shape[0]).eval()
    discriminator.load_state_dict(tensors)
    with torch.no_grad():
        real, made = (
            torch.cat([discriminator(part).mean(dim=(1, 2, 3)) for part in each.split(BATCH)])
            for each in (images, decoded)
        )
    gaps = logged(run / "metrics.jsonl", "logit_gap")
    late = [gap for _, gap in gaps[-max(1, len(gaps) // 5) :]]
    told = (real > made).double() + 0.5 * (real == made)
    return {"logit_gap": float(np.mean(late)) if late else None, "told_apart": float(told.mean())}


def logged(file: Path, ending: str) -> list[tuple[int, float]]:
    """(step, value) of the metric with this ending in a metrics.jsonl."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [(line["step"], value) for line in lines for name, value in line.items() if name.endswith(ending)]


# Generated images.


def read_images(paths: Sequence[Path]) -> Tensor:
    """PNG files -> (n, 3, h, w) in [-1, 1]."""
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(transforms.to_batch(np.asarray(picture.convert("RGB"))))
    return torch.cat(pictures)


def generation_figures(test: TestSet, generated: Tensor, asked: np.ndarray, decoded: Tensor) -> Figures:
    """How near generated images are to real ones, and how near the autoencoder alone comes.

    `accuracy`: share read as the class that was asked for; `kid`: squared MMD to the test images in the reader's
    features, x 1000; `attribute_gap`: mean over the readable attributes of the largest difference of shares, chance
    included (`attribute_chance`). With `_decoded`: the same of reconstructions `decoded` of the test images; their KID
    is that of one half to the originals of the other half.
    """
    read = test.reader.read(generated)
    half = len(test.images) // 2
    real, made = test.features(test.images), test.features(decoded)
    count = min(len(generated), half)
    compared = judge_attributes(test.read.first(2 * count), read.first(count), test.errors["correlations"])
    return {
        "accuracy": float((read.labels == asked).mean()),
        "kid": 1000 * squared_mmd(real, test.features(generated)),
        "attribute_gap": mean_of(compared, "gap"),
        "attribute_chance": mean_of(compared, "chance"),
        "accuracy_decoded": float((test.reader.read(decoded).labels == test.truth.labels).mean()),
        "kid_decoded": 1000 * squared_mmd(real[:half], made[half:]),
        "kid_real": 1000 * squared_mmd(real[:half], real[half:]),
    }


def mean_of(compared: Mapping[str, Mapping[str, float]], name: str) -> float | None:
    values = [one[name] for one in compared.values()]
    return float(np.mean(values)) if values else None
