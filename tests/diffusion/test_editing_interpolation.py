"""Between noises the variance stays; between latents the way is straight."""

from __future__ import annotations

import pytest
import torch

from ldm_vae.diffusion.editing import interpolation_weights, lerp, slerp
from ldm_vae.random import generator


def test_between_two_noises_lies_noise() -> None:
    first, second = torch.randn(2, 4, 64, 64, generator=generator(0, "noises"))
    for share in (0.25, 0.5, 0.9):
        between = slerp(first, second, share)
        assert between.std().item() == pytest.approx(1, abs=0.02)
        assert lerp(first, second, 0.5).std().item() < 0.75  # what a straight line would do
    near = torch.cosine_similarity(slerp(first, second, 0.25).flatten(), first.flatten(), dim=0)
    assert near.item() == pytest.approx(torch.tensor(torch.pi / 8).cos().item(), abs=0.02)


def test_the_ends_and_equal_noises() -> None:
    first, second = torch.randn(2, 4, 8, 8, generator=generator(0, "noises"))
    assert torch.equal(slerp(first, second, 0.0), first)
    assert torch.equal(slerp(first, second, 1.0), second)
    torch.testing.assert_close(slerp(first, first, 0.3), first)
    torch.testing.assert_close(slerp(first, 3 * first, 0.5), 2 * first)


def test_latents_on_a_straight_line() -> None:
    first, second = torch.randn(2, 4, 8, 8, generator=generator(0, "latents"))
    torch.testing.assert_close(lerp(first, second, 0.25), 0.75 * first + 0.25 * second)


def test_shares() -> None:
    assert interpolation_weights(1) == [0]
    assert interpolation_weights(3) == [0, 0.5, 1]
