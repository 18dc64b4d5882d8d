"""Every kind of model with its weights offloaded gives what it gives without: layer by layer, and in groups."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from ldm_vae.autoencoder.losses import LPIPS
from ldm_vae.autoencoder.models import AutoencoderConfig, as_autoencoder, build_autoencoder
from ldm_vae.diffusion.unet import UNetConfig, build_unet
from tests.autoencoder import test_frozen
from tests.diffusion.conftest import NAMES, make_pipeline

CONFIGS = {
    "kl": AutoencoderConfig(preset="pico"),
    "small": AutoencoderConfig(preset="small"),
    "linear path": AutoencoderConfig(preset="pico", latent_channels=12, linear_path=True),
    "ae": AutoencoderConfig(preset="pico", kind="ae"),
    "vq": AutoencoderConfig(preset="pico", kind="vq", codebook_size=16),
    "vq ema": AutoencoderConfig(preset="pico", kind="vq", codebook_size=16, codebook="ema"),
    "fsq": AutoencoderConfig(preset="pico", kind="fsq"),
    "sd": AutoencoderConfig("sd", "tiny"),
    "vector": AutoencoderConfig("vector", "digits", 2),
    "vector ae": AutoencoderConfig("vector", "digits", 2, kind="ae"),
}
SMALL = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "norm_num_groups": 4, "block_out_channels": [8, 8]}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
STOCK = {
    "AutoencoderTiny": {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
    | {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]},
    "VQModel": {**SMALL, **BLOCKS, "num_vq_embeddings": 16, "vq_embed_dim": 4, "latent_channels": 4},
}


def model(name: str) -> Any:
    torch.manual_seed(0)
    if name in CONFIGS:
        return build_autoencoder(CONFIGS[name]).eval()
    return as_autoencoder(getattr(diffusers, name)(**STOCK[name]).eval())


def in_one_order(autoencoder: Any) -> Any:
    """safetensors, in which diffusers keeps offloaded groups, takes no channels_last."""
    return autoencoder.to(memory_format=torch.contiguous_format)


def outputs(autoencoder: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    mean, logvar = autoencoder.encode_moments(images)
    found = [mean, logvar, autoencoder.decode_images(mean), autoencoder.quantized(mean)]
    if autoencoder.has_codes:
        indices = autoencoder.token_indices(images)
        found += [indices, autoencoder.decode_indices(indices).sample]
    with torch.no_grad():
        return [*found, autoencoder(images).sample]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [*CONFIGS, *STOCK])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_layer_by_layer(name: str, offload_buffers: bool) -> None:
    expected = outputs(model(name))
    offloaded = model(name)
    accelerate.cpu_offload(offloaded, "cpu", offload_buffers=offload_buffers)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert_equal(outputs(offloaded), expected)
    assert all(parameter.is_meta for parameter in offloaded.parameters())


@pytest.mark.parametrize("name", [*CONFIGS, *STOCK])
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, level: str) -> None:
    """On disk, with NaN in place of offloaded weights: what is read at the wrong time shows, also without a GPU."""

    def nowhere(tensor: Tensor, **settings: Any) -> Tensor:
        return torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 0, **settings)

    monkeypatch.setattr(torch, "empty_like", nowhere)
    expected = outputs(in_one_order(model(name)))
    offloaded = in_one_order(model(name))
    apply_group_offloading(
        offloaded, torch.device("cpu"), torch.device("cpu"), level, 1, offload_to_disk_path=str(tmp_path)
    )
    assert_equal(outputs(offloaded), expected)


def test_the_folded_upsampling_of_stable_diffusion_is_the_same_layer() -> None:
    autoencoder = model("sd")
    copied = copy.deepcopy(autoencoder)
    assert (
        autoencoder.state_dict().keys() == diffusers.AutoencoderKL.from_config(autoencoder.config).state_dict().keys()
    )
    assert_equal(outputs(copied), outputs(autoencoder))


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3_vit"])
def test_a_frozen_transformer(tmp_path: Path, kind: str) -> None:
    test_frozen.transformer(kind).save_pretrained(tmp_path)
    expected = outputs(test_frozen.build(tmp_path, residual_channels=2).eval())
    offloaded = test_frozen.build(tmp_path, residual_channels=2).eval()
    accelerate.cpu_offload(offloaded, "cpu", offload_buffers=True)
    assert_equal(outputs(offloaded), expected)


def test_the_unet() -> None:
    def velocity(offload: bool) -> Tensor:
        torch.manual_seed(0)
        unet = build_unet(UNetConfig(preset="tiny", widths=(32, 64), coordinates=True), 4, 3).eval()
        nn.init.normal_(unet.network.conv_out.weight, std=0.05)
        if offload:
            accelerate.cpu_offload(unet, "cpu", offload_buffers=True)
        with torch.no_grad():
            return unet(torch.ones(2, 4, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([0, 2]))

    assert torch.equal(velocity(True), velocity(False))


def test_a_pipeline_layer_by_layer() -> None:
    def drawn(offload: bool) -> Tensor:
        pipeline = make_pipeline(NAMES)
        if offload:
            for network in (pipeline.unet, pipeline.autoencoder):
                accelerate.cpu_offload(network, "cpu", offload_buffers=True)
        image = torch.linspace(-1, 1, 3 * 64 * 64).view(3, 64, 64)
        return pipeline("cat", seed=0, num_inference_steps=2, image=image, output_type="pt").images

    assert torch.equal(drawn(True), drawn(False))


def test_the_perceptual_loss(random_backbone: Path) -> None:
    images = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
    loss = LPIPS("squeeze", str(random_backbone)).eval()
    with torch.no_grad():
        expected = loss(images, images.flip(0))
        accelerate.cpu_offload(loss, "cpu", offload_buffers=True)
        assert torch.equal(loss(images, images.flip(0)), expected)
