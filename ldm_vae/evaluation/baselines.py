"""Baselines without training: image codecs at an equal number of bytes, and bicubic scaling."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from ldm_vae.data import transforms

CODEC_SETTINGS: dict[str, dict[str, Any]] = {
    "JPEG": {"format": "JPEG", "optimize": True, "subsampling": "4:2:0"},
    "WebP": {"format": "WEBP", "method": 4},
    "AVIF": {"format": "AVIF", "speed": 6, "subsampling": "4:2:0", "max_threads": 1},
}
QUALITIES = {"JPEG": (1, 95), "WebP": (0, 100), "AVIF": (0, 100)}
"""Lowest and highest; Pillow discourages JPEG above 95."""

NEIGHBORS = 3
"""Sizes rise with the quality but for small exceptions: so many qualities above the answer are tried too."""


@dataclass(frozen=True)
class CodedImage:
    """An image through a codec: `picture` decoded, `size_bytes` of the file, `fits`: whether within the budget."""

    picture: Image.Image
    size_bytes: int
    quality: int
    fits: bool


def available_codecs() -> tuple[str, ...]:
    """Those of JPEG, WebP and AVIF that this Pillow can write."""
    supported = {"JPEG": "jpg", "WebP": "webp", "AVIF": "avif"}
    return tuple(name for name, feature in supported.items() if features.check(feature))


def encode_picture(picture: Image.Image, codec: str, quality: int) -> bytes:
    """The file of an RGB picture."""
    buffer = io.BytesIO()
    picture.save(buffer, quality=quality, **CODEC_SETTINGS[codec])
    return buffer.getvalue()


def code_within(picture: Image.Image, codec: str, budget_bytes: float) -> CodedImage:
    """The largest file of at most `budget_bytes`, or that of the lowest quality where none is small enough."""
    lowest, highest = QUALITIES[codec]
    files: dict[int, bytes] = {}

    def size(quality: int) -> int:
        if quality not in files:
            files[quality] = encode_picture(picture, codec, quality)
        return len(files[quality])

    best = largest_within(size, lowest, highest, budget_bytes)
    quality = lowest if best is None else best
    length = size(quality)
    decoded = Image.open(io.BytesIO(files[quality])).convert("RGB")
    return CodedImage(decoded, length, quality, best is not None)


def largest_within(size: Callable[[int], int], lowest: int, highest: int, budget: float) -> int | None:
    """The quality of the largest size within the budget, by bisection and a look at its upper neighbors."""
    low, high = lowest - 1, highest + 1  # low fits (or is below the lowest), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    candidates = range(max(lowest, low), min(highest, low + NEIGHBORS) + 1)
    fitting = [quality for quality in candidates if size(quality) <= budget]
    return max(fitting, key=lambda quality: (size(quality), quality)) if fitting else None


def code_images(images: Tensor, codec: str, budgets_bytes: list[float]) -> tuple[Tensor, list[CodedImage]]:
    """Images (n, 3, h, w) in [-1, 1] through the codec -> decoded, the same shape and range, and each file's record."""
    coded = [
        code_within(picture, codec, budget)
        for picture, budget in zip(transforms.to_pil(images.cpu()), budgets_bytes, strict=True)
    ]
    rows = [torch.from_numpy(np.array(one.picture)).permute(2, 0, 1) for one in coded]
    return transforms.from_uint8(torch.stack(rows)).to(images.device), coded


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
