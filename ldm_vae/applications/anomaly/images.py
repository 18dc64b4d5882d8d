"""Images on their way to the scores: crops, what was known of the picture before, and which were used to fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_vae.applications.anomaly.complexity import png_bytes
from ldm_vae.data import pixels
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.sources import ImageSource
from ldm_vae.data.transforms import cover_crop
from ldm_vae.errors import UserError
from ldm_vae.files import checksum_bytes


@dataclass(frozen=True)
class Crop:
    """One image as it is scored.

    Args:
        index: in its source.
        pixels: uint8 (resolution, resolution, 3).
        short_side: of the picture before scaling, in pixels.
    """

    index: int
    id: str
    pixels: np.ndarray
    short_side: int

    @property
    def enlarged(self) -> bool:
        """Whether the picture was smaller than its crop, so that it is blurred."""
        return self.short_side < self.pixels.shape[0]

    def mark(self) -> int:
        """A number that tells equal pixels, int64."""
        return int(checksum_bytes(self.pixels.tobytes()).split(":")[1][:16], 16) - 2**63

    def png_bytes(self) -> int:
        return png_bytes(self.pixels)


def read_crops(
    source: ImageSource, indices: Sequence[int], resolution: int, rejected: list[tuple[str, str]]
) -> Iterator[Crop]:
    """In their order. What cannot be read is left out and appended to `rejected` as (id, reason)."""
    for index in indices:
        try:
            image = source.read(index)
        except ImageRejected as error:
            rejected.append((source.id(index), error.reason))
        else:
            yield Crop(index, source.id(index), cover_crop(image, resolution), min(image.shape[:2]))


def batches(crops: Iterator[Crop], size: int, total: int, task: str) -> Iterator[list[Crop]]:
    """Lists of up to `size` crops, with a progress bar of `total` images."""
    from tqdm import tqdm

    waiting: list[Crop] = []
    for crop in tqdm(crops, total=total, desc=task, unit="image", dynamic_ncols=True, leave=False):
        waiting.append(crop)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def stack(crops: Sequence[Crop]) -> Tensor:
    """(n, 3, h, w) in [-1, 1]."""
    return pixels.from_uint8(torch.from_numpy(np.stack([crop.pixels for crop in crops])).permute(0, 3, 1, 2))


def refuse_enlarged(crops: Sequence[Crop], resolution: int) -> None:
    """Raises: UserError for pictures of mixed size, of which some would be told apart by their blur."""
    small = next((crop for crop in crops if crop.enlarged), None)
    if small is not None:
        raise UserError(
            f"resolution: {small.id} has a short side of {small.short_side} pixels, fewer than {resolution}, and "
            f"enlarging blurs it, which every score sees; set resolution to {small.short_side} or less, or leave such "
            "images out"
        )
