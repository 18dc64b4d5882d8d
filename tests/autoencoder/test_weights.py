"""Weights that are not exactly those of their class, or not finite, are refused by every loader, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_vae.autoencoder.frozen import AutoencoderFrozenEncoder
from ldm_vae.autoencoder.interop.compvis import load_compvis, tensors_from_model
from ldm_vae.autoencoder.losses import LPIPS
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.posthoc_ema import copy_to, synthesize_ema
from ldm_vae.diffusion.power_function_ema import snapshot_name
from ldm_vae.errors import UserError
from ldm_vae.files import MANIFEST
from tests.diffusion.test_posthoc_ema_snapshots import network
from tests.test_golden import unpacked

Tensors = dict[str, Tensor]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def lacking(tensors: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def with_another(tensors: Tensors, name: str) -> Tensors:
    return tensors | {name + "_of_another": tensors[name].clone()}


def of_another_shape(tensors: Tensors, name: str) -> Tensors:
    return tensors | {name: torch.zeros(*tensors[name].shape, 2)}


def with_nan(tensors: Tensors, name: str) -> Tensors:
    damaged = tensors[name].clone()
    damaged.view(-1)[-1] = float("nan")
    return tensors | {name: damaged}


def with_infinity(tensors: Tensors, name: str) -> Tensors:
    damaged = tensors[name].clone()
    damaged.view(-1)[0] = float("-inf")
    return tensors | {name: damaged}


CHANGES = [lacking, with_another, of_another_shape, with_nan, with_infinity]


def rewrite(file: Path, change: Callable[[Tensors, str], Tensors], name: str | None = None) -> None:
    tensors = load_file(file)
    wide = [key for key, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() > 4]
    save_file(change(tensors, name or wide[len(wide) // 2]), file, {"format": "pt"})


@pytest.mark.promise(6)
@pytest.mark.parametrize("change", CHANGES)
def test_an_autoencoder(change, tmp_path, record_property):
    """Of each class, without a seal, as others write them."""
    kinds = [
        AutoencoderConfig(preset="pico"),
        AutoencoderConfig("sd", "tiny"),
        AutoencoderConfig(preset="pico", kind="vq", codebook_size=16),
    ]
    for number, config in enumerate(kinds):
        folder = tmp_path / str(number)
        build_autoencoder(config).save_pretrained(folder)
        load_autoencoder(folder)
        rewrite(folder / WEIGHTS, change)
        with pytest.raises(UserError, match=re_tensor(folder)) as error:
            load_autoencoder(folder)
        assert "\n" not in str(error.value)
    record_property("figure", f"weights {change.__name__.replace('_', ' ')}: refused for {len(kinds)} kinds")


def re_tensor(folder: Path) -> str:
    return rf"{folder}.*(encoder|decoder|quant)"


@pytest.mark.promise(6)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["unet", "autoencoder"])
def test_a_pipeline(change, part, tmp_path, record_property):
    folder = unpacked("pipeline", tmp_path)
    rewrite(folder / part / WEIGHTS, change)
    with pytest.raises(UserError, match=rf"{part}/{WEIGHTS} is damaged"):
        LatentDiffusionPipeline.from_pretrained(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=rf"{folder}/{part}: .*tensor|{folder}/{part}: .*size mismatch"):
        LatentDiffusionPipeline.from_pretrained(folder)
    record_property("figure", f"{part} {change.__name__.replace('_', ' ')}: refused, with and without checksums")


@pytest.mark.promise(6)
@pytest.mark.parametrize("change", CHANGES)
def test_stored_averages(change, tmp_path, record_property):
    unpacked("snapshots", tmp_path)
    file = tmp_path / "snapshots" / snapshot_name(8)
    record = metadata_of(file)
    save_file(change(load_file(file), "0.05/weight"), file, {"snapshot": record})
    with pytest.raises(UserError, match=r"is not a snapshot|not those of this U-Net"):
        copy_to(network(), synthesize_ema(tmp_path, 0.05))
    record_property("figure", f"averages {change.__name__.replace('_', ' ')}: refused")


def metadata_of(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()["snapshot"]


@pytest.mark.promise(6)
@pytest.mark.parametrize("change", [lacking, of_another_shape, with_nan, with_infinity])
def test_the_weights_of_a_perceptual_loss(change, random_backbone, tmp_path, record_property):
    """A backbone may come with a classifier that is not used."""
    file = tmp_path / "backbone.safetensors"
    save_file(load_file(random_backbone), file)
    LPIPS("squeeze", str(file))
    rewrite(file, change)
    with pytest.raises(UserError, match=r"^perceptual_weights="):
        LPIPS("squeeze", str(file))
    record_property("figure", f"perceptual weights {change.__name__.replace('_', ' ')}: refused")


@pytest.mark.promise(6)
@pytest.mark.parametrize("change", CHANGES)
def test_a_compvis_checkpoint(change, tmp_path, record_property):
    file = tmp_path / "model.safetensors"
    save_file(tensors_from_model(AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)), file)
    load_compvis(file)
    rewrite(file, change, "decoder.mid.block_1.conv1.bias")
    with pytest.raises(UserError):
        load_compvis(file)
    record_property("figure", f"CompVis weights {change.__name__.replace('_', ' ')}: refused")


@pytest.mark.promise(6)
@pytest.mark.parametrize("change", [lacking, of_another_shape, with_nan, with_infinity])
def test_a_pretrained_transformer(change, tmp_path, record_property):
    """A checkpoint of a classifier has tensors more, which are left out."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    AutoencoderFrozenEncoder.from_encoder(str(tmp_path))
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"classifier.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    AutoencoderFrozenEncoder.from_encoder(str(tmp_path))
    rewrite(file, change, next(name for name in load_file(file) if name.endswith("norm1.weight")))
    with pytest.raises(UserError, match=r"autoencoder\.encoder"):
        AutoencoderFrozenEncoder.from_encoder(str(tmp_path))
    record_property("figure", f"encoder weights {change.__name__.replace('_', ' ')}: refused")
