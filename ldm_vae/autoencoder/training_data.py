"""The images of a training run: random crops to learn from, and a fixed part to be judged by."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ldm_vae.autoencoder.recipe import TrainVaeConfig
from ldm_vae.data import pixels
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.samples import ImageSamples, to_tensor, too_many_rejected
from ldm_vae.data.sources import open_source
from ldm_vae.data.split import Part, repeated, subset
from ldm_vae.data.stream import StreamSamples, open_stream
from ldm_vae.data.transforms import cover_crop, random_crop
from ldm_vae.random import numpy_rng

logger = logging.getLogger(__name__)

RATE_IMAGES = 128
"""Held-out images that the rate is measured on: it differs from image to image, so many are needed."""
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


@dataclass(frozen=True)
class HeldOut:
    """What the training never sees, in [-1, 1] on the CPU.

    `images` (n, 3, r, r): centre crops, to measure and to look at. `crops` (m, 3, c, c): crops drawn as those of the
    training are, in the size of the last phase: the rate is defined on what the training sees.
    """

    images: Tensor
    crops: Tensor


def held_out_part(config: TrainVaeConfig) -> HeldOut | None:
    """A few images of the held-out part; None when nothing is held out."""
    if config.data.held_out == 0 or config.held_out_images == 0:
        return None
    side = config.phases[-1].crop
    images: list[Tensor] = []
    crops: list[Tensor] = []
    count = max(RATE_IMAGES, config.held_out_images)
    for number, (index, image) in enumerate(some_images(config, "held_out", count)):
        if number < config.held_out_images:
            images.append(to_tensor(cover_crop(image, config.held_out_resolution)))
        rng = numpy_rng(0, "held_out_crops", index)
        for _ in range(CROPS_OF_FEW if number < FEW_IMAGES else 1):
            crops.append(to_tensor(random_crop(image, rng, side, config.crop)))
    if not images:
        return None
    return HeldOut(pixels.from_uint8(torch.stack(images)), pixels.from_uint8(torch.stack(crops)))


def measured_batches(config: TrainVaeConfig) -> Iterator[Tensor]:
    """Training crops (1, 3, c, c) in [-1, 1] that fix what is measured before training, the same on every process.

    Raises: UserError where no image can be read.
    """
    side = config.phases[-1].crop
    for index, image in some_images(config, "train", MEASURED_IMAGES):
        crop = random_crop(image, numpy_rng(0, "measured_crops", index), side, config.crop)
        yield pixels.from_uint8(to_tensor(crop)[None])


def some_images(config: TrainVaeConfig, part: Part, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Up to `count` readable images of a part, with their index: of a stream the first, else an even pick.

    Raises: UserError where no training image can be read; without held-out ones a training is still possible.
    """
    held_out = config.data.held_out
    if config.data.streaming:
        source = open_stream(config.data).take(count, part, held_out)
    else:
        source = subset(open_source(config.data), part, held_out)
    found, rejected = 0, list[tuple[str, str]]()
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
