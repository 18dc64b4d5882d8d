"""Baselines without training: image codecs at an equal number of bytes, and bicubic scaling."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from ldm_vae.data import transforms

_JPEG = {"format": "JPEG", "optimize": True, "subsampling": "4:2:0"}
CODEC_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "JPEG": [_JPEG | {"progressive": True}, _JPEG | {"progressive": False}],
    "WebP": [{"format": "WEBP", "method": 6}],
    "AVIF": [{"format": "AVIF", "speed": 6, "subsampling": "4:2:0", "max_threads": 1}],
}
"""Settings of Pillow to try for each codec; the smallest file counts. Progressive JPEG is not always
smaller. AVIF at speed 4 makes files 4 % smaller in 5 times the time (6 photographs of 512 x 512 pixels)."""
QUALITIES = {"JPEG": (1, 95), "WebP": (0, 100), "AVIF": (0, 100)}
"""Lowest and highest; Pillow discourages JPEG above 95."""

NEIGHBORS = 3
"""Number of further qualities to try above the answer, since sizes rise with the quality with small exceptions."""


@dataclass(frozen=True)
class CodedImage:
    """An image through a codec: `picture` decoded, `size_bytes` of the file, `fits`: whether within the budget."""

    picture: Image.Image
    size_bytes: int
    quality: int
    fits: bool


def available_codecs() -> tuple[str, ...]:
    """The codecs among JPEG, WebP and AVIF that this Pillow can write."""
    supported = {"JPEG": "jpg", "WebP": "webp", "AVIF": "avif"}
    return tuple(name for name, feature in supported.items() if features.check(feature))


@dataclass(frozen=True)
class Bracket:
    """The two files of a picture next to a budget: the largest within it and the smallest above it.

    A codec has steps, so that no file fills the budget exactly. What it would reach there is read off the line between
    both over the logarithm of bytes: `at_budget`. Where one side does not exist, both are the same file.
    """

    below: CodedImage
    above: CodedImage
    budget_bytes: float

    @property
    def weight(self) -> float:
        """Weight of the file above the budget, 0 to 1."""
        if self.below.size_bytes >= self.above.size_bytes:
            return 0.0
        low, budget, high = (math.log(b) for b in (self.below.size_bytes, self.budget_bytes, self.above.size_bytes))
        return (budget - low) / (high - low)

    @property
    def size_bytes(self) -> float:
        """The budget, or the size of the only file where one side does not exist."""
        return self.budget_bytes if self.below.size_bytes < self.above.size_bytes else float(self.below.size_bytes)

    def at_budget(self, below: float, above: float) -> float:
        """A metric at the budget from its values for both files."""
        return (1 - self.weight) * below + self.weight * above

    def record(self) -> dict[str, Any]:
        """JSON-able: bytes and quality at the budget, the sizes of both files."""
        return {
            "bytes": self.size_bytes,
            "quality": self.at_budget(self.below.quality, self.above.quality),
            "within_budget": self.below.fits,
            "files": [self.below.size_bytes, self.above.size_bytes],
        }


def encode_picture(picture: Image.Image, codec: str, quality: int) -> bytes:
    """The file of an RGB picture: the smallest of `CODEC_SETTINGS`."""
    files = []
    for settings in CODEC_SETTINGS[codec]:
        buffer = io.BytesIO()
        picture.save(buffer, quality=quality, **settings)
        files.append(buffer.getvalue())
    return min(files, key=len)


def code_within(picture: Image.Image, codec: str, budget_bytes: float) -> CodedImage:
    """The largest file of at most `budget_bytes`, or that of the lowest quality where none is small enough."""
    return code_around(picture, codec, budget_bytes).below


def code_around(picture: Image.Image, codec: str, budget_bytes: float) -> Bracket:
    """The files of a picture next to a budget."""
    lowest, highest = QUALITIES[codec]
    files: dict[int, bytes] = {}

    def size(quality: int) -> int:
        if quality not in files:
            files[quality] = encode_picture(picture, codec, quality)
        return len(files[quality])

    def coded(quality: int) -> CodedImage:
        length = size(quality)
        decoded = Image.open(io.BytesIO(files[quality])).convert("RGB")
        return CodedImage(decoded, length, quality, length <= budget_bytes)

    best = largest_within(size, lowest, highest, budget_bytes)
    below = coded(lowest if best is None else best)
    larger = [quality for quality, data in files.items() if len(data) > budget_bytes]
    if not below.fits or not larger:
        return Bracket(below, below, budget_bytes)
    return Bracket(below, coded(min(larger, key=lambda quality: (size(quality), quality))), budget_bytes)


def largest_within(size: Callable[[int], int], lowest: int, highest: int, budget: float) -> int | None:
    """The quality of the largest size within the budget, by bisection and a look at its upper neighbors."""
    low, high = lowest - 1, highest + 1  # low fits (or is below the lowest), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    candidates = range(max(lowest, low), min(highest, low + NEIGHBORS) + 1)
    fitting = [quality for quality in candidates if size(quality) <= budget]
    return max(fitting, key=lambda quality: (size(quality), quality)) if fitting else None


def code_images(images: Tensor, codec: str, budgets_bytes: list[float]) -> tuple[Tensor, Tensor, list[Bracket]]:
    """Images (n, 3, h, w) in [-1, 1] through the codec at a budget each.

    Returns:
        Decoded, the same shape and range: of the files below the budgets, of those above them, and the files.
    """
    pictures = transforms.to_pil(images.cpu())
    found = [code_around(picture, codec, budget) for picture, budget in zip(pictures, budgets_bytes, strict=True)]
    below, above = ([getattr(one, side).picture for one in found] for side in ("below", "above"))
    return _stacked(below, images.device), _stacked(above, images.device), found


def _stacked(pictures: list[Image.Image], device: torch.device) -> Tensor:
    rows = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    return transforms.from_uint8(torch.stack(rows)).to(device)


def bicubic_round_trip(images: Tensor, factor: int) -> Tensor:
    """Images (n, 3, h, w) scaled down by `factor` and up again, bicubic, antialiased, rounded to 8 bits in between.

    The small picture has 3 numbers per factor**2 pixels, its bytes are not counted.
    """
    scaled = []
    for picture in transforms.to_pil(images.cpu()):
        small = picture.resize(
            (max(1, picture.width // factor), max(1, picture.height // factor)), Image.Resampling.BICUBIC
        )
        restored = small.resize(picture.size, Image.Resampling.BICUBIC)
        scaled.append(torch.from_numpy(np.array(restored)).permute(2, 0, 1))
    return transforms.from_uint8(torch.stack(scaled)).to(images.device)
