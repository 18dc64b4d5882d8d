"""Folding the normalizer into an AutoencoderKL: the same images, unit latents, with and without 1x1 convolutions."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from ldm_vae.autoencoder.interop.compvis import fold_normalizer
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.errors import UserError

MEAN, STD = [0.5, -2.0, 0.0, 7.0], [0.2, 3.0, 1.0, 5.0]
CENTRE, WIDTH = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))


def make(quant: bool, post_quant: bool) -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        use_quant_conv=quant,
        use_post_quant_conv=post_quant,
        scaling_factor=0.18215,
        shift_factor=0.1,
    )
    for layer in (model.quant_conv, model.post_quant_conv):
        if layer is not None:
            nn.init.normal_(layer.bias)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("quant", [True, False])
@pytest.mark.parametrize("post_quant", [True, False])
def test_latents_are_the_normalised_ones_and_images_stay(quant: bool, post_quant: bool, tmp_path) -> None:
    model = make(quant, post_quant)
    fold_normalizer(model, MEAN, STD).save_pretrained(tmp_path)
    folded = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert (folded.config.scaling_factor, folded.config.shift_factor) == (1.0, None)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    before, after = model.encode(images).latent_dist, folded.encode(images).latent_dist
    torch.testing.assert_close(after.mean, (before.mean - CENTRE) / WIDTH, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.std, before.std / WIDTH, atol=1e-5, rtol=0)
    latents = before.mean + before.std * torch.randn_like(before.std)
    decoded = folded.decode((latents - CENTRE) / WIDTH).sample
    torch.testing.assert_close(decoded, model.decode(latents).sample, atol=1e-5, rtol=0)


@torch.no_grad()
def test_tiling_slicing_and_half_precision_work_as_before() -> None:
    model = make(True, False)
    folded = fold_normalizer(model, MEAN, STD)
    latents = torch.randn(2, 4, 24, 40)
    for each in (model, folded):
        each.tile_latent_min_size, each.tile_sample_min_size = 16, 32
        each.enable_tiling()
        each.enable_slicing()
    tiled = model.decode(latents).sample
    torch.testing.assert_close(folded.decode((latents - CENTRE) / WIDTH).sample, tiled, atol=1e-5, rtol=0)
    rounded = nn.Module.to(folded, torch.bfloat16).decode(((latents - CENTRE) / WIDTH).bfloat16()).sample
    assert (rounded - tiled).abs().mean() < 0.02 * tiled.abs().mean() + 0.02


def test_the_model_stays_as_it_is_and_other_classes_are_refused() -> None:
    model = make(True, True)
    weight = model.quant_conv.weight.clone()  # type: ignore[union-attr]
    fold_normalizer(model, MEAN, STD)
    assert torch.equal(model.quant_conv.weight, weight)  # type: ignore[union-attr]
    assert model.config.scaling_factor == 0.18215
    with pytest.raises(UserError, match="3 channels for an autoencoder of 4"):
        fold_normalizer(model, [0.0] * 3, [1.0] * 3)
    with pytest.raises(UserError, match="latents: statistics fold into"):
        fold_normalizer(build_autoencoder(AutoencoderConfig("wavelet", "pico")), MEAN, STD)
