"""Kinds and architectures: the settings, building, loading, and diffusers' deterministic autoencoders behind it all."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from ldm_vae import config as configuration
from ldm_vae.autoencoder import deterministic
from ldm_vae.autoencoder.base import DETERMINISTIC_LOGVAR, Autoencoder, deterministic_posterior
from ldm_vae.autoencoder.lineage import read_record
from ldm_vae.autoencoder.models import (
    KINDS,
    AutoencoderConfig,
    Kind,
    build_autoencoder,
    load_autoencoder,
)
from ldm_vae.autoencoder.train_config import Phase, TrainVaeConfig
from ldm_vae.autoencoder.training import train_vae
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.synthetic.source import SyntheticConfig
from ldm_vae.data.transforms import pad_to_multiple
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.samplers import flow_scheduler
from ldm_vae.diffusion.unet import UNetConfig, build_unet
from ldm_vae.errors import UserError
from ldm_vae.evaluation.diagnosis import DiagnoseConfig, diagnose
from ldm_vae.latents.normalizer import LatentNormalizer
from ldm_vae.training.trainer import TrainingConfig


@dataclass(frozen=True)
class Settings:
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)


def settings(*overrides: str) -> AutoencoderConfig:
    return configuration.load(Settings, None, [f"autoencoder.{override}" for override in overrides]).autoencoder


def test_a_name_that_is_neither_a_directory_nor_on_the_hub_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/vae-f8c5: no such folder, and as a hub id it gives no config"):
        load_autoencoder("nobody/vae-f8c5")


def test_a_misspelt_name_in_a_folder_that_is_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    with pytest.raises(UserError, match="checkpoints/vae-f8c5: no such folder; give a finished run"):
        load_autoencoder("checkpoints/vae-f8c5")


def test_the_kinds_load_from_text():
    assert settings() == AutoencoderConfig("wavelet", "nano", 4)
    assert settings().kind == "kl"
    vq = settings("kind=vq", "codebook_size=256", "codebook=ema", "latent_channels=8")
    assert (vq.codebook_size, vq.codebook) == (256, "ema")
    fsq = settings("kind=fsq", "fsq_levels=[7,5,5]", "latent_channels=3")
    assert fsq.levels == (7, 5, 5)
    assert settings("kind=fsq").levels == (8, 5, 5, 5)
    assert settings("kind=frozen", "encoder=owner/name", "residual_channels=8").encoder == "owner/name"
    assert settings("kind=vq", "codebook_size=null").codebook_size is None


class AutoencoderMeans(Autoencoder):
    """Ten lines: the latents are scaled means of 4x4 blocks."""

    downsampling, deterministic = 4, True

    @register_to_config
    def __init__(self, latent_channels: int = 3, scale: float = 1.0) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, latent_channels, 4, 4), nn.ConvTranspose2d(latent_channels, 3, 4, 4)

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        return deterministic_posterior(self.encoder(self.config.scale * x))


def test_a_new_kind_is_a_class_and_a_line_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, ("means", "ae"), Kind(AutoencoderMeans, {"double": {"scale": 2.0}}))
    chosen = settings("architecture=means", "kind=ae", "preset=double", "latent_channels=5")
    with pytest.raises(
        UserError, match=r"linear_path: has no effect with autoencoder.architecture=means and autoencoder.kind=ae"
    ):
        settings("architecture=means", "kind=ae", "preset=double", "linear_path=true")
    config = TrainVaeConfig(
        output=str(tmp_path / "run"),
        autoencoder=chosen,
        data=DataConfig(synthetic=SyntheticConfig(count=40, resolution=64)),
        phases=[Phase(steps=2, crop=32, batch=4)],
        training=TrainingConfig(device="cpu", workers=0, tracker="none", precision="fp32"),
        held_out_resolution=32,
        held_out_images=2,
    )
    assert train_vae(config) == 0
    model = load_autoencoder(tmp_path / "run")
    assert type(model) is AutoencoderMeans
    assert (model.kind, model.downsampling, model.latent_channels, model.image_channels) == ("ae", 4, 5, 3)
    assert (model.only_side, model.codebook_size, model.logvar_bounds) == (None, None, (-30.0, 20.0))
    assert model.fingerprint() == read_record(tmp_path / "run")["fingerprint"] != model.encoder_fingerprint()
    images = torch.rand(1, 3, 33, 40) * 2 - 1
    mean, logvar = model.encode_moments(images)
    assert (mean.shape, float(logvar.max())) == ((1, 5, 9, 10), DETERMINISTIC_LOGVAR)
    assert model.reconstruct(images).shape == images.shape
    places = {"autoencoder": str(tmp_path / "run"), "output": str(tmp_path / "health")}
    report = diagnose(DiagnoseConfig(**places, data=config.data, part="all", resolution=64, device="cpu"))
    assert report["rate"]["deterministic_by_design"]


def test_settings_survive_yaml(tmp_path):
    for overrides in (["kind=fsq", "fsq_levels=[7,5,5,5]"], ["kind=vq", "codebook=ema"], []):
        config = Settings(settings(*overrides))
        (tmp_path / "a.yaml").write_text(configuration.to_yaml(config))
        assert configuration.load(Settings, tmp_path / "a.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kind=vqq"], "autoencoder.kind: 'vqq' is unknown; choose one of kl, ae, vq, fsq, frozen"),
        (["kind=vq", "architecture=sd", "preset=sd"], "vq is built with autoencoder.architecture=wavelet only"),
        (
            ["kind=ae", "codebook_size=64"],
            r"autoencoder\.codebook_size: has no effect with autoencoder.architecture=wavelet and autoencoder.kind=ae",
        ),
        (["codebook=ema"], "has no effect with .*kind=kl; .* autoencoder.kind=vq"),
        (["kind=vq", "fsq_levels=[8,5,5,5]"], r"fsq_levels: has no effect .*kind=vq"),
        (["kind=fsq", "encoder=a/b"], r"encoder: has no effect .*kind=fsq"),
        (["residual_channels=4"], r"residual_channels: has no effect .*kind=kl"),
        (["kind=vq", "codebook_size=1"], "codebook_size: 1 is not between 2 and"),
        (["kind=fsq", "fsq_levels=[8,5,5]"], "3 entries for 4 latent channels; .* set autoencoder.latent_channels=3"),
        (["kind=fsq", "fsq_levels=[8,5,5,2]"], "is not from 3 on"),
        (["kind=fsq", "fsq_levels=[99,99,99,99]"], "a product up to 1048576"),
        (["kind=frozen"], "encoder: kind=frozen needs one; give the directory or hub id"),
        (["kind=frozen", "encoder=a/b", "latent_channels=8"], "latent_channels: has no effect .* the encoder sets it"),
        (["kind=frozen", "encoder=a/b", "residual_channels=-1"], "residual_channels: -1 is not between 0 and 256"),
    ],
)
def test_mistakes_are_refused_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        settings(*overrides)
    assert "\n" not in str(error.value)


def test_an_autoencoder_that_was_saved_before_there_were_kinds_keeps_its_fingerprint():
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(preset="pico"))
    old = {name: value for name, value in dict(model.config).items() if name != "deterministic"}
    assert model.config.deterministic is False
    before = fingerprint(model)
    model._internal_dict = type(model.config)(old)
    assert fingerprint(model) == before


def tiny() -> Any:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=5,
    )


def dc() -> Any:
    return diffusers.AutoencoderDC(
        latent_channels=6,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
    )


def vq() -> Any:
    return diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        vq_embed_dim=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
    )


FOREIGN = {"AutoencoderTiny": (tiny, 4, 5), "AutoencoderDC": (dc, 4, 6), "VQModel": (vq, 2, 3)}


@pytest.mark.parametrize("name", FOREIGN)
def test_deterministic_autoencoders_of_diffusers_get_the_interface_of_a_posterior(name, tmp_path):
    make, factor, channels = FOREIGN[name]
    torch.manual_seed(0)
    original = make().eval()
    original.save_pretrained(tmp_path / "original")
    model = load_autoencoder(tmp_path / "original")
    assert isinstance(model, deterministic.ADAPTED[name])
    assert (model.deterministic, model.downsampling, model.latent_channels) == (True, factor, channels)
    images = torch.rand(1, 3, 30, 41) * 2 - 1
    mean, logvar = model.encode_moments(images)
    with torch.no_grad():
        expected = original.encode(pad_to_multiple(images, factor), return_dict=False)[0]
        expected_image = original.decode(expected).sample.clamp(-1, 1)
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logvar, torch.full_like(mean, DETERMINISTIC_LOGVAR))
    torch.testing.assert_close(model.decode_images(mean), expected_image, rtol=1e-4, atol=1e-4)
    assert model.reconstruct(images).shape == images.shape
    # saved again it is diffusers' own, with the same identity
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["_class_name"] == name
    assert fingerprint(getattr(diffusers, name).from_pretrained(tmp_path / "again")) == fingerprint(original)
    assert fingerprint(model) == fingerprint(original)


def test_the_forward_pass_of_an_adapted_model_encodes_and_decodes(tmp_path):
    vq().save_pretrained(tmp_path)
    model = load_autoencoder(tmp_path)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(model(images).sample, model.decode(model.encode(images).latent_dist.mode()).sample)


@pytest.mark.parametrize("kind", ["ae", "vq", "fsq", "AutoencoderTiny"])
def test_a_saved_pipeline_gives_the_same_images(kind, tmp_path):
    """diffusers finds the class of each part by the name of its module."""
    torch.manual_seed(0)
    if kind == "AutoencoderTiny":
        tiny().save_pretrained(tmp_path / "original")
        autoencoder = load_autoencoder(tmp_path / "original")
    else:
        autoencoder = build_autoencoder(AutoencoderConfig(preset="pico", kind=kind)).eval()
    channels = autoencoder.latent_channels
    unet = build_unet(UNetConfig(preset="tiny", widths=(32, 64)), channels, 2).eval()
    normalizer = LatentNormalizer([0.0] * channels, [1.0] * channels).to_dict()
    scheduler = flow_scheduler(shift=1.5)
    pipeline = LatentDiffusionPipeline(autoencoder, unet, scheduler, normalizer, (4, 4), ["a", "b"])
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(loaded.autoencoder) is type(autoencoder)
    assert fingerprint(loaded.autoencoder) == fingerprint(autoencoder)
    images = []
    for candidate in (pipeline, loaded):
        candidate.set_progress_bar_config(disable=True)
        images.append(candidate(labels=["a"], num_inference_steps=2, seed=0, output_type="pt").images)
    assert torch.equal(*images)


def test_an_autoencoder_of_one_size_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE"}')
    with pytest.raises(UserError, match=r"one image size only .* autoencoder\.kind=frozen"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "VQModell"}')
    with pytest.raises(UserError, match="not an autoencoder"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"images: uint8 of shape \(1, 3, 32, 32\); give floats"),
        (torch.zeros(3, 32, 32), r"images: float32 of shape \(3, 32, 32\); give floats \(n, 3, h, w\)"),
        (torch.zeros(1, 1, 32, 32), r"images: float32 of shape \(1, 1, 32, 32\)"),
        (torch.full((1, 3, 32, 32), 200.0), "images: numbers from 200 to 200; scale them to -1"),
        (torch.full((1, 3, 32, 32), float("nan")), "images: numbers from nan to nan"),
    ],
)
def test_images_that_are_not_from_minus_one_to_one_are_refused(images, message):
    autoencoder = build_autoencoder(AutoencoderConfig(preset="pico"))
    with pytest.raises(UserError, match=message):
        autoencoder.reconstruct(images)
