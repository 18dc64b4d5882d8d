"""Training samples from an image source. The crop of an image depends only on the sample's global position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae.data import transforms
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.sources import ImageSource
from ldm_vae.data.transforms import resize_center_crop
from ldm_vae.errors import UserError
from ldm_vae.random import key_hash, numpy_rng
from ldm_vae.utils.text import pluralize

ATTEMPTS = 20

Transform = Callable[[np.ndarray, np.random.Generator, int], np.ndarray]
"""uint8 (h, w, 3), generator, size -> uint8 (size, size, 3); for example `transforms.random_crop`."""


class ImageSamples:
    """Random access to training samples, a pure function of (index, position, size): resuming needs no state."""

    def __init__(self, source: ImageSource, transform: Transform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def id(self, index: int) -> str:
        return self.source.id(index)

    def sample(self, index: int, position: int, size: int | None) -> dict[str, Any]:
        """Source image `index` as the training sample at global `position`, a crop of `size` pixels.

        An unreadable image is reported and replaced by another one, chosen by (seed, position).

        Returns:
            image: uint8 tensor (3, size, size); label and index: int, of the image that was used;
            rejected: (id, reason) of every image that was replaced.

        Raises:
            UserError: after 20 unreadable images in a row.
        """
        assert size is not None, "image samples need a size"
        rejected: list[tuple[str, str]] = []
        for attempt in range(ATTEMPTS):
            try:
                pixels = self.source.read(index)
            except ImageRejected as error:
                rejected.append((self.source.id(index), error.reason))
                index = key_hash(self.seed, "substitute", position, attempt) % len(self.source)
                continue
            crop = self.transform(pixels, numpy_rng(self.seed, "augment", position), size)
            return {
                "image": channels_first(crop),
                "label": self.source.label(index),
                "index": index,
                "rejected": rejected,
            }
        raise too_many_rejected(rejected)


def channels_first(pixels: np.ndarray) -> Tensor:
    """uint8 (h, w, 3) -> uint8 (3, h, w)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def too_many_rejected(rejected: list[tuple[str, str]]) -> UserError:
    name, reason = rejected[-1]
    return UserError(
        f"data: {len(rejected)} images in a row cannot be read, the last is {name} ({_in_words(reason)}); "
        "check that the disk is mounted and the files are images"
    )


Rejected = list[tuple[str, str]]
"""(id, reason) of images that could not be read."""

Enlarged = list[tuple[str, int]]
"""(id, short side in pixels) of images that were smaller than their crop. They are scaled up and have no fine detail,
so every autoencoder and codec gets better figures on them than it deserves."""


@dataclass(frozen=True)
class Crop:
    """The center crop of one image.

    Args:
        index: its index in the source.
        pixels: uint8 (h, w, 3).
        short_side: short side of the image before scaling, in pixels.
        scale: the factor it was scaled by.
    """

    index: int
    id: str
    pixels: np.ndarray
    short_side: int
    scale: float

    @property
    def enlarged(self) -> bool:
        """Whether the image was smaller than its crop, which makes the crop blurry."""
        return self.scale > 1


def crop_image(
    image: np.ndarray, resolution: int | tuple[int, int], id: str, enlarged: Enlarged, index: int = 0
) -> Crop:
    """The center crop of uint8 pixels (h, w, 3), a side or (h, w).

    This is the only place that scales images to a crop. An image that has to be enlarged is appended to `enlarged`,
    which the caller reports and records. Masks and refused images need no such list.
    """
    height, width = image.shape[:2]
    scale = transforms.cover_scale(height, width, resolution)
    crop = Crop(index, id, resize_center_crop(image, resolution), min(height, width), scale)
    if crop.enlarged:
        enlarged.append((id, crop.short_side))
    return crop


def iterate_crops(
    source: ImageSource,
    indices: Iterable[int],
    resolution: int | tuple[int, int],
    rejected: Rejected,
    enlarged: Enlarged,
) -> Iterator[Crop]:
    """Center crops of a side or (h, w), in the order of `indices`.

    Unreadable images are skipped and appended to `rejected`, enlarged ones to `enlarged`.
    """
    for index in indices:
        try:
            image = source.read(index)
        except ImageRejected as error:
            rejected.append((source.id(index), error.reason))
        else:
            yield crop_image(image, resolution, source.id(index), enlarged, index)


def read_crops(
    source: ImageSource,
    indices: Sequence[int],
    resolution: int | tuple[int, int],
    rejected: Rejected,
    enlarged: Enlarged,
) -> tuple[list[int], Tensor | None]:
    """The indices that could be read, and their center crops (n, 3, h, w) in [-1, 1]; None if no image could be read.

    `rejected` and `enlarged` as in `iterate_crops`.
    """
    found = list(iterate_crops(source, indices, resolution, rejected, enlarged))
    images = torch.stack([transforms.to_batch(crop.pixels)[0] for crop in found]) if found else None
    return [crop.index for crop in found], images


def enlarged_sentences(short_sides: Sequence[int], images: int, setting: str = "resolution") -> list[str]:
    """The warning if some of the `images` were smaller than their crop; empty otherwise.

    Args:
        short_sides: the short sides of the smaller images, in pixels.
        setting: the setting that gives the size of the crop.
    """
    if not short_sides:
        return []
    one = len(short_sides) == 1
    return [
        f"{len(short_sides)} of {pluralize(images, 'image')} {'is' if one else 'are'} smaller than the crop and "
        f"enlarged, which blurs {'it' if one else 'them'} and hides errors. The smallest short side is "
        f"{min(short_sides)} pixels: set {setting} to that or less, or leave small images out."
    ]


def enlarged_record(enlarged: Enlarged) -> dict[str, Any]:
    """The entry of results and `run.json` about images that were smaller than their crop; empty without any."""
    return {"enlarged": [{"id": name, "short_side": side} for name, side in enlarged]} if enlarged else {}


def _in_words(reason: str) -> str:
    """The code of a reason, such as `unknown_format`, in a sentence."""
    return reason.replace("_", " ")


def none_readable(where: str, count: int, rejected: Rejected) -> UserError:
    """The error when all of `count` images were rejected."""
    reasons = ", ".join(sorted({_in_words(reason) for _, reason in rejected}))
    example = f", for example {rejected[0][0]}" if rejected else ""
    return UserError(where, f"none of the {count} images can be read ({reasons}{example})", "give other images")


def evenly_spaced(count: int, wanted: int | None) -> list[int]:
    """`wanted` indices evenly spaced over range(count); all of them for None."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, wanted).round()]
