"""What a training run of an autoencoder is: its configuration. Each part owns its own settings; here they meet."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ldm_vae.autoencoder.gan import AdversarialConfig
from ldm_vae.autoencoder.losses import LossConfig
from ldm_vae.autoencoder.models import AutoencoderConfig
from ldm_vae.autoencoder.rate import RateConfig
from ldm_vae.data import open_source, transforms
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.samples import Enlarged, ImageSamples, Rejected, channels_first, crop_image, too_many_rejected
from ldm_vae.data.sources import DataConfig, labels_from
from ldm_vae.data.split import Part, Subset, repeated, subset
from ldm_vae.data.streaming import StreamSamples, open_stream
from ldm_vae.data.survey import describe_classes, describe_images
from ldm_vae.data.transforms import CropConfig, random_crop
from ldm_vae.errors import UserError
from ldm_vae.random import numpy_rng
from ldm_vae.training.loader import Plan, Span
from ldm_vae.training.run_directory import ModelKeys
from ldm_vae.training.trainer import TrainingConfig
from ldm_vae.utils.text import pluralize


@dataclass(frozen=True)
class Phase:
    """A stretch of the run. Small crops first are cheap; larger ones in the last part teach the context.

    Args:
        steps: optimizer steps.
        crop: side of the square training crops in pixels, divisible by 8.
        batch: images per step over all processes.
        micro_batch: images per forward pass of a process; null: all of its images of a step.
        perceptual: factor of the weight loss.perceptual in this phase; 0 saves its cost.
    """

    steps: int = 1000
    crop: int = 64
    batch: int = 32
    micro_batch: int | None = None
    perceptual: float = 1.0

    def __post_init__(self) -> None:
        if self.crop < 16 or self.crop % 8:
            raise UserError(f"phases: crop {self.crop} is not a multiple of 8 from 16 on; use 64, 128, 192, 256 ...")
        if self.steps < 1 or self.batch < 1:
            raise UserError("phases: steps and batch are at least 1")


@dataclass(frozen=True)
class LatentConfig:
    """What is asked of the latent space beyond its rate.

    Args:
        scale_equivariance: share of the steps that shrink latents and images alike (antialiased), decode the small
            latents and compare them with the small images, instead of the full-size comparison (arXiv:2502.14831). Such
            latents are easier to diffuse, and such a step is cheaper.
        scales: the factors, drawn with equal probability.
        decoder_noise: with a frozen encoder: strength of the noise on the decoder's input, as the latents of a
            diffusion model have it. White noise with the standard deviation |N(0, 1)| times this, drawn per image
            (arXiv:2510.11690). 0.2 suits a decoder that is used with a small diffusion model only.
        nested: channel counts below the full one. Half of the images keep only this number of first channels, so that
            one autoencoder works at each count (nested dropout, arXiv:1402.0915). `[4, 8, 12]` suits 16 channels.
    """

    scale_equivariance: float = 0.0
    scales: list[float] = field(default_factory=lambda: [0.5, 0.75])
    decoder_noise: float = 0.0
    nested: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.scale_equivariance <= 1:
            raise UserError(f"latents.scale_equivariance: {self.scale_equivariance} is not a share; 0.35 is usual")
        if not self.scales or not all(0 < scale < 1 for scale in self.scales):
            raise UserError(f"latents.scales: {list(self.scales)} are not factors between 0 and 1")
        if not 0 <= self.decoder_noise <= 2:
            raise UserError(f"latents.decoder_noise: {self.decoder_noise} is not between 0 and 2; 0.2 is usual")
        if any(count < 1 for count in self.nested):
            raise UserError(f"latents.nested: {list(self.nested)} are not channel counts")


@dataclass(frozen=True)
class TrainVaeConfig:
    """`ldm-vae train-vae`: L1 + perceptual + KL at a rate that you choose, on one or many processes.

    The same command resumes an interrupted run.

      ldm-vae train-vae configs/vae_f8c4_nano.yaml data=~/images output=runs/mine
      torchrun --nproc_per_node 4 scripts/train_vae.py configs/vae_f8c4_base.yaml output=runs/base

    Args:
        output: the run directory.
        repeat: repetitions per epoch of the images whose ids match a pattern, for example `{photos/*: 6}`, for a few
            good images among many lesser ones. Held-out images, and all images in evaluation, count once.
        initial: an autoencoder to start from: a diffusers directory, a run of `train-vae`, or a hub id. Its
            architecture is used.
        train: the parameters to train, as the start of their names; null: all. `[decoder]` does not change the encoder,
            so existing latents stay valid.
        phases: the phases of the run, each with steps, crop, batch, micro_batch and perceptual.
        held_out_resolution: side in pixels of the held-out images for metrics and previews.
        held_out_images: largest number of held-out images for metrics.
        changed_data: `refuse` or `continue` a run whose images have changed since it began (files added, removed or
            edited).
    """

    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    repeat: dict[str, int] = field(default_factory=dict)
    crop: CropConfig = field(default_factory=CropConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    initial: str | None = None
    train: list[str] | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    rate: RateConfig = field(default_factory=RateConfig)
    latents: LatentConfig = field(default_factory=LatentConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    phases: list[Phase] = field(default_factory=lambda: [Phase()])
    training: TrainingConfig = field(default_factory=TrainingConfig)
    held_out_resolution: int = 256
    held_out_images: int = 16
    changed_data: Literal["refuse", "continue"] = "refuse"

    KEYS: ClassVar[ModelKeys] = ModelKeys(
        may_change=("phases.*.steps", "phases.*.micro_batch", "changed_data"),
        exports=("autoencoder",),
        memory=("phases.*.micro_batch", "phases.*.crop"),
        progress=("loss/*", "rate/nats_per_dim"),
        hidden=("loss/kl",),
        command="train-vae",
    )

    def __post_init__(self) -> None:
        if not self.phases:
            raise UserError("phases: at least one is needed")
        if any(times < 1 for times in self.repeat.values()):
            raise UserError(f"repeat: {dict(self.repeat)} are not counts from 1 on; data.include leaves images out")
        if self.repeat and self.data.streaming:
            raise UserError("repeat: has no effect on a stream; leave it out")
        if self.initial is not None and self.autoencoder != AutoencoderConfig():
            raise UserError(
                "autoencoder: has no effect with initial, whose architecture is taken; leave one of them out"
            )
        if self.train is not None and self.initial is None:
            raise UserError(
                "train: leaves random weights as they are; name an autoencoder to start from as initial=DIR"
            )
        if self.latents.decoder_noise and self.train != ["decoder"]:
            raise UserError(
                "latents.decoder_noise: an encoder that is trained would only grow its latents against it; "
                "set train=[decoder], or leave it out"
            )
        first_of_last = sum(phase.steps for phase in self.phases[:-1])
        steps = first_of_last + self.phases[-1].steps
        start = self.adversarial.starts_at(steps)
        if self.adversarial.loss != "off" and start < first_of_last:
            raise UserError(
                f"adversarial.start: step {start} lies before the last phase, and its guard compares losses, which "
                f"change with the phase; start it at step {first_of_last} or later"
            )

    def plan(self, processes: int) -> Plan:
        return Plan(
            tuple(
                Span(phase.steps, phase.batch, phase.micro_batch or max(1, phase.batch // processes), phase.crop)
                for phase in self.phases
            )
        )

    def phase_at(self, step: int) -> Phase:
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]


# The images of a training run: random crops to learn from, and a fixed part to evaluate on.

logger = logging.getLogger(__name__)

RATE_IMAGES = 128
"""Number of held-out images for the rate, which differs from image to image and needs many."""
FEW_IMAGES, CROPS_OF_FEW = 32, 4
"""So many of them give more than one crop."""
MEASURED_IMAGES = 256


def training_samples(config: TrainVaeConfig) -> ImageSamples | StreamSamples:
    """Random crops of the training part of the images."""
    transform, seed, held_out = partial(random_crop, config=config.crop), config.training.seed, config.data.held_out
    if config.data.streaming:
        return StreamSamples(open_stream(config.data), transform, seed, held_out=held_out)
    images = repeated(subset(open_source(config.data), "train", held_out), config.repeat)
    return ImageSamples(images, transform, seed)


def describe_data(config: TrainVaeConfig, samples: ImageSamples | StreamSamples, held_out: HeldOut | None) -> list[str]:
    """What a training has to learn from and to measure on, for its first line."""
    if isinstance(samples, StreamSamples):
        classes = describe_classes(samples.stream.label_names, labels_from(samples.stream))
        found = [f"a stream of images {classes}"]
    else:
        train: Any = samples.source
        while isinstance(train.source, Subset):  # `repeat`
            train = train.source
        again = "" if train is samples.source else f", with repetitions {len(samples):,}"
        found = [f"{describe_images(train)}{again}", f"{len(train.source) - len(train):,} held out"]
    if held_out is not None and held_out.read + held_out.rejected:
        small, unread = len(held_out.enlarged_crops), held_out.rejected
        checked = f"{held_out.read + unread:,} of these checked"
        found.append(f"{checked}: {small or 'none'} enlarged, {unread or 'none'} rejected")
    return [*found, describe_phases(config)]


def describe_phases(config: TrainVaeConfig) -> str:
    """`2,000 steps of 32 crops of 64 pixels, then 500 steps of 16 crops of 128 pixels`."""
    phases = config.phases
    return ", then ".join(f"{pluralize(one.steps, 'step')} of {one.batch} crops of {one.crop} pixels" for one in phases)


def large_batch(config: TrainVaeConfig, samples: ImageSamples | StreamSamples) -> str:
    """A sentence where a step takes more images than there are; else empty."""
    batch = max(phase.batch for phase in config.phases)
    if isinstance(samples, StreamSamples) or batch <= len(samples):
        return ""
    return (
        f"phases: a batch of {batch} is larger than the set of {pluralize(len(samples), 'training image')}, so that "
        "every step repeats some; lower phases.batch, or add images"
    )


@dataclass(frozen=True)
class HeldOut:
    """What the training never sees, in [-1, 1] on the CPU.

    `images` (n, 3, r, r): center crops, to measure and to look at. `crops` (m, 3, c, c): crops drawn as those of the
    training are, in the size of the last phase: the rate is defined on what the training sees. `enlarged`: the short
    sides of those that were smaller than their center crop; `enlarged_crops`: of those that were smaller than a crop of
    the last phase, among the `read` images that the crops are of. `rejected`: how many could not be read.
    """

    images: Tensor
    crops: Tensor
    enlarged: tuple[int, ...] = ()
    enlarged_crops: tuple[int, ...] = ()
    read: int = 0
    rejected: int = 0


def held_out_part(config: TrainVaeConfig) -> HeldOut | None:
    """A few images of the held-out part; None when nothing is held out."""
    if config.data.held_out == 0 or config.held_out_images == 0:
        return None
    side = config.phases[-1].crop
    images: list[Tensor] = []
    crops: list[Tensor] = []
    enlarged, short_sides = Enlarged(), list[int]()
    count, rejected = max(RATE_IMAGES, config.held_out_images), Rejected()
    for number, (index, image) in enumerate(some_images(config, "held_out", count, rejected)):
        if number < config.held_out_images:
            crop = crop_image(image, config.held_out_resolution, str(index), enlarged)
            images.append(channels_first(crop.pixels))
        short_sides.append(min(image.shape[:2]))
        rng = numpy_rng(0, "held_out_crops", index)
        for _ in range(CROPS_OF_FEW if number < FEW_IMAGES else 1):
            crops.append(channels_first(random_crop(image, rng, side, config.crop)))
    if not images:
        return None
    whole, parts = (transforms.from_uint8(torch.stack(pixels)) for pixels in (images, crops))
    small = tuple(short for short in short_sides if short < side)
    return HeldOut(whole, parts, tuple(short for _, short in enlarged), small, len(short_sides), len(rejected))


def measured_batches(config: TrainVaeConfig) -> Iterator[Tensor]:
    """Training crops (1, 3, c, c) in [-1, 1] that fix what is measured before training, the same on every process.

    Raises: UserError where no image can be read.
    """
    side = config.phases[-1].crop
    for index, image in some_images(config, "train", MEASURED_IMAGES):
        crop = random_crop(image, numpy_rng(0, "measured_crops", index), side, config.crop)
        yield transforms.from_uint8(channels_first(crop)[None])


def some_images(
    config: TrainVaeConfig, part: Part, count: int, rejected: Rejected | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Up to `count` readable images of a part, with their index: of a stream the first, else an even pick.

    Those that could not be read are appended to `rejected`.

    Raises: UserError where no training image can be read; without held-out ones a training is still possible.
    """
    held_out = config.data.held_out
    if config.data.streaming:
        source = open_stream(config.data).take(count, part, held_out)
    else:
        source = subset(open_source(config.data), part, held_out)
    found, rejected = 0, Rejected() if rejected is None else rejected
    for index in numpy_rng(0, part).permutation(len(source)):
        try:
            image = source.read(int(index))
        except ImageRejected as error:
            logger.warning("%s: cannot be read (%s); it is left out", source.id(int(index)), error.reason)
            rejected.append((source.id(int(index)), error.reason))
            continue
        yield int(index), image
        found += 1
        if found == count:
            return
    if found == 0 and part == "train":
        raise too_many_rejected(rejected)
