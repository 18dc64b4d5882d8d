"""Decoding latents that are too large for one pass: overlapping tiles, blended.

A tile is wrong near a border that it has and the whole latent has not, as far as the decoder sees. There its weight
is 0; from there it rises linearly. A decoder that sees no farther than `context` positions therefore gives what it
would give in one pass, up to rounding; one that looks at the whole image (attention, group normalisation) gives seams
that the blending hides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm_vae.autoencoder.wavelet import Decoder

TILE = 128
"""Latent positions along a side of a tile; larger latents are decoded in tiles."""

DEFAULT_CONTEXT = 8
BLEND = 8


def decoder_context(autoencoder: Any) -> int:
    """How many latent positions around its own a pixel depends on: exact for this package's decoder, else a choice.

    That decoder is 3x3 convolutions and nearest-neighbour upsampling, so the inputs of a pixel can be counted.
    """
    decoder = getattr(autoencoder, "decoder", None)
    if not isinstance(decoder, Decoder):
        return DEFAULT_CONTEXT
    blocks = [len(stage.blocks) for stage in decoder.stages]  # type: ignore[arg-type]
    farthest = 0
    for pixel in range(2 ** (len(blocks) - 1)):  # of one latent position
        low, high = pixel - 2, pixel + 2  # the tail and the head
        for level in reversed(range(len(blocks))):
            low, high = low - 2 * blocks[level], high + 2 * blocks[level]
            if level:
                low, high = low // 2, high // 2
        farthest = max(farthest, 1 - low, 1 + high)  # 1 of the first convolution
    return farthest


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor], latents: Tensor, factor: int, context: int, tile: int
) -> Tensor:
    """Latents (n, c, h, w) -> images (n, 3, factor h, factor w), float32, on the CPU.

    Args:
        decode: Latents (n, c, h', w') -> images (n, 3, factor h', factor w').
        latents: In the autoencoder's own units.
        factor: Pixels per latent position along a side.
        context: Positions beside a cut at which a tile does not count.
        tile: Largest side of a tile, above 2 (context + blending).
    """
    tile = max(tile, 2 * (context + BLEND) + 1)
    count, _, height, width = latents.shape
    total = torch.zeros(count, 3, factor * height, factor * width)
    weights = torch.zeros(1, 1, factor * height, factor * width)
    overlap = 2 * context + BLEND
    for top, bottom in cuts(height, tile, overlap):
        for left, right in cuts(width, tile, overlap):
            image = decode(latents[..., top:bottom, left:right]).float().cpu()
            rows = ramp(top, bottom, height, context, factor)
            columns = ramp(left, right, width, context, factor)
            weight = rows[:, None] * columns[None]
            place = (..., slice(factor * top, factor * bottom), slice(factor * left, factor * right))
            total[place] += weight * image
            weights[place] += weight
    return total / weights


def cuts(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(first, end) of tiles that cover 0..length with at least `overlap` in common, all of the same length."""
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [(first := round(number * (length - tile) / (count - 1)), first + tile) for number in range(count)]


def ramp(first: int, end: int, length: int, context: int, factor: int) -> Tensor:
    """Weights of the pixels of a tile along one side: 1, but 0 for `context` beside a cut, then rising over BLEND."""
    pixel = torch.arange(factor * (end - first), dtype=torch.float32) + 0.5
    weight = torch.ones_like(pixel)
    for cut, distance in ((first > 0, pixel), (end < length, pixel.flip(0))):
        if cut:
            weight = torch.minimum(weight, ((distance / factor - context) / BLEND).clamp(0, 1))
    return weight
