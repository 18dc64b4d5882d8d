from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm_vae.autoencoder.fast_layers import (
    FoldedUpsample2D,
    can_be_folded,
    only_values,
    prepare_for_inference,
    upsampled_convolution,
)
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.autoencoder.weights import fingerprint

TOLERANCE = 1e-5
"""Of float32, relative to the largest value: sums in another order."""


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 8, 5, 7), (1, 16, 12, 8)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_upsampling_folded_into_a_convolution_is_both(shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(6, shape[1], 3, 3)
    bias = torch.randn(6) if with_bias else None
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    found = upsampled_convolution(x, weight, bias)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    rough = upsampled_convolution(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - expected).abs().max() < 0.03 * expected.abs().max()


def plain_and_prepared() -> tuple[nn.Module, nn.Module]:
    """The same small `AutoencoderKL`, as diffusers builds it and prepared."""
    torch.manual_seed(0)
    prepared = build_autoencoder(AutoencoderConfig(architecture="sd", preset="tiny")).eval()
    plain = type(prepared).from_config(prepared.config).eval()
    plain.load_state_dict(prepared.state_dict())
    return plain, prepared


def test_the_same_weights_and_outputs() -> None:
    plain, prepared = plain_and_prepared()
    assert fingerprint(prepared) == fingerprint(plain)
    assert sum(isinstance(layer, FoldedUpsample2D) for layer in prepared.modules()) == 3
    images, latents = torch.rand(2, 3, 64, 96) * 2 - 1, torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        for expected, found in (
            (plain.encode(images).latent_dist.mean, prepared.encode(images).latent_dist.mean),
            (plain.decode(latents).sample, prepared.decode(latents).sample),
        ):
            assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_training_sees_the_plain_network() -> None:
    """Bit for bit but for the memory layout, which changes the order of sums; so the layouts are made equal."""
    plain, prepared = plain_and_prepared()
    plain = plain.to(memory_format=torch.channels_last)
    latents = torch.randn(1, 4, 8, 8)
    for model in (plain, prepared):
        model.decode(latents).sample.square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), prepared.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_saved_again_it_is_diffusers_own(tmp_path) -> None:
    plain, prepared = plain_and_prepared()
    prepared.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert fingerprint(again) == fingerprint(load_autoencoder(tmp_path)) == fingerprint(plain)
    assert not any(isinstance(layer, FoldedUpsample2D) for layer in again.modules())


def test_other_layers_are_left_alone() -> None:
    from diffusers.models.upsampling import Upsample2D

    assert can_be_folded(Upsample2D(4, use_conv=True))
    for layer in (
        Upsample2D(4), Upsample2D(4, use_conv_transpose=True), Upsample2D(4, use_conv=True, interpolate=False),
        Upsample2D(4, use_conv=True, kernel_size=1, padding=0), nn.Upsample(scale_factor=2),
        Upsample2D(4, use_conv=True, norm_type="ln_norm", eps=1.0),
    ):  # fmt: skip
        assert not can_be_folded(layer)


def test_a_size_that_is_asked_for_is_kept() -> None:
    _, prepared = plain_and_prepared()
    layer = next(layer for layer in prepared.modules() if isinstance(layer, FoldedUpsample2D))
    with torch.no_grad():
        assert layer(torch.randn(1, layer.channels, 4, 4), output_size=(7, 9)).shape[-2:] == (7, 9)


def test_only_values_are_wanted_without_gradients() -> None:
    assert not only_values()
    with torch.no_grad():
        assert only_values()
    with torch.inference_mode():
        assert only_values()


def test_gradient_or_not_the_wavelet_encoder_is_the_same() -> None:
    torch.manual_seed(0)
    for preset in ("pico", "small"):
        model = prepare_for_inference(build_autoencoder(AutoencoderConfig(preset=preset)).eval())
        images = torch.rand(2, 3, 64, 96) * 2 - 1
        expected = model.encode(images).latent_dist
        with torch.no_grad():
            found = model.encode(images).latent_dist
        for one, other in ((expected.mean, found.mean), (expected.logvar, found.logvar)):
            assert (one - other).abs().max() < TOLERANCE * one.abs().max()
