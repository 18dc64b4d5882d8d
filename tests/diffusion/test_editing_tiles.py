"""Tiles: every pixel covered, weights that add up, the bounded sight of the wavelet decoder, equality with one pass."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm_vae.autoencoder.base import DEFAULT_CONTEXT, Autoencoder
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.diffusion.editing import (
    BLEND,
    decode_in_tiles,
    tile_bounds,
    tile_weights,
)
from ldm_vae.random import generator


def wavelet() -> Autoencoder:
    torch.manual_seed(0)
    return build_autoencoder(AutoencoderConfig("wavelet", "pico", 4)).eval()


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(10, 16, 4), (16, 16, 4), (17, 16, 4), (100, 40, 24), (41, 40, 39)]
)
def test_cuts(length: int, tile: int, overlap: int) -> None:
    found = tile_bounds(length, tile, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert all(end - first == min(tile, length) for first, end in found)
    assert all(before[1] - after[0] >= overlap for before, after in pairwise(found))


def test_weights_reach_every_pixel() -> None:
    length, context, factor = 70, 3, 4
    total = torch.zeros(factor * length)
    for first, end in tile_bounds(length, 30, 2 * context + BLEND):
        weight = tile_weights(first, end, length, context, factor)
        total[factor * first : factor * end] += weight
        if first:
            assert weight[: context * factor].abs().max() == 0
    assert total.min() > 0.5
    assert tile_weights(0, 10, 10, context, factor).tolist() == [1.0] * 40


def test_how_far_the_decoder_sees() -> None:
    """Exactly: one position more changes no pixel, and at that distance one does."""
    autoencoder, context = wavelet(), wavelet().decoder_context
    side = 2 * context + 9
    latents = torch.randn(1, 4, 1, side, generator=generator(0, "latents")).expand(1, 4, side, side).contiguous()
    before = autoencoder.decode_images(latents)
    middle = side // 2
    latents[..., middle] += 100.0
    changed = (autoencoder.decode_images(latents) - before).abs().amax((0, 1, 2)).view(side, 8).amax(1) > 0
    reached = changed.nonzero().flatten()
    assert reached.min() >= middle - context
    assert reached.max() <= middle + context
    assert max(middle - reached.min(), reached.max() - middle) >= context - 1
    assert Autoencoder().decoder_context == DEFAULT_CONTEXT


@pytest.mark.parametrize("size", [(70, 8), (40, 41)])
def test_tiles_equal_one_pass(size: tuple[int, int]) -> None:
    autoencoder = wavelet()
    latents = torch.randn(1, 4, *size, generator=generator(0, "latents"))
    calls: list[torch.Size] = []

    def decode(part: Tensor) -> Tensor:
        calls.append(part.shape)
        return autoencoder.decode_images(part)

    whole = autoencoder.decode_images(latents)
    context = autoencoder.decoder_context
    tiled = decode_in_tiles(decode, latents, 8, context, tile=2 * (context + BLEND) + 4)
    assert len(calls) > 1
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)
    careless = decode_in_tiles(decode, latents, 8, context=0, tile=40)
    assert (careless - whole).abs().max() > 1e-4
