"""The frozen vision transformer as an encoder: what stays fixed, what is learned, a saved model is complete."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTConfig
from transformers import ViTModel as OtherModel

from ldm_vae.autoencoder.base import DETERMINISTIC_LOGVAR
from ldm_vae.autoencoder.frozen import RESIDUAL_BOUND, AutoencoderFrozenEncoder
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.errors import UserError
from ldm_vae.training.trainer import Ema

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}


def transformer(name: str) -> Any:
    torch.manual_seed(0)
    if name == "dinov2":
        model: Any = Dinov2Model(Dinov2Config(patch_size=14, **SMALL))
    elif name == "dinov2_with_registers":
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, num_register_tokens=4, **SMALL))
    else:
        transformers = pytest.importorskip("transformers", minversion="4.56")
        config = transformers.DINOv3ViTConfig(
            patch_size=16, num_register_tokens=3, intermediate_size=32, pos_embed_rescale=2.0, **SMALL
        )
        model = transformers.DINOv3ViTModel(config)
    with torch.no_grad():  # fresh biases and token embeddings are zero, which would hide a wrong token or layer
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=["dinov2", "dinov2_with_registers", "dinov3_vit"])
def encoder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    transformer(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dinov2")
    transformer("dinov2").save_pretrained(path)
    return path


def build(encoder: Path, residual_channels: int = 0) -> AutoencoderFrozenEncoder:
    torch.manual_seed(1)
    return build_autoencoder(
        AutoencoderConfig(preset="pico", kind="frozen", encoder=str(encoder), residual_channels=residual_channels)
    )


def pictures(count: int = 2, height: int = 64, width: int = 48) -> torch.Tensor:
    rng = torch.Generator().manual_seed(2)
    coarse = torch.rand(count, 3, 6, 6, generator=rng) * 2 - 1
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


def test_latents_are_the_last_hidden_state_without_class_and_register_tokens(encoder):
    model, images = build(encoder), pictures()
    vision = transformer(model.vision.config.model_type)
    patch = vision.config.patch_size
    resized = images
    if patch != 16:
        resized = nn.functional.interpolate(images, (4 * patch, 3 * patch), mode="bicubic", antialias=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 1, 3, 1, 1)
    with torch.no_grad():
        hidden = vision(pixel_values=((resized + 1) / 2 - mean) / std).last_hidden_state
    expected = hidden[:, -12:].transpose(1, 2).reshape(2, 24, 4, 3)  # patches come last
    latents, logvar = model.encode_moments(images)
    torch.testing.assert_close(latents, expected)
    assert torch.equal(logvar, torch.full_like(logvar, DETERMINISTIC_LOGVAR))
    assert model.deterministic
    assert (model.downsampling, model.config.latent_channels) == (16, 24)


def test_any_size_is_padded_to_16_and_cropped_back(encoder):
    model, images = build(encoder, residual_channels=4), pictures(1, 50, 67)
    latents, _ = model.encode_moments(images)
    assert latents.shape == (1, 28, 4, 5)
    assert model.decode_images(latents).shape == (1, 3, 64, 80)
    assert model.reconstruct(images).shape == images.shape
    with pytest.raises(ValueError, match="give multiples of 16"):
        model.encode(images)


def test_a_saved_model_needs_nothing_else(encoder, tmp_path, monkeypatch):
    model, images = build(encoder, residual_channels=4), pictures()
    model.fit_statistics([images])
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    import transformers

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a saved autoencoder asked for the pretrained encoder")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    loaded = load_autoencoder(tmp_path)
    assert fingerprint(loaded) == fingerprint(model)
    model.eval().to(memory_format=torch.channels_last)  # as loaded: layouts may round differently
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))
    assert int(loaded.statistics_positions) == 2 * 4 * 3
    by_diffusers = AutoencoderFrozenEncoder.from_pretrained(tmp_path)  # parameters are made on the meta device first
    by_diffusers.to(memory_format=torch.channels_last)
    assert torch.equal(by_diffusers.reconstruct(images), loaded.reconstruct(images))
    half = load_autoencoder(tmp_path, dtype=torch.bfloat16)
    assert half.reconstruct(images).isfinite().all()


def test_the_transformer_stays_frozen_and_in_inference_mode(encoder):
    model, images = build(encoder, residual_channels=4), pictures()
    model.train().requires_grad_(True)
    model.enable_gradient_checkpointing()
    assert not any(module.training for module in model.vision.modules())
    assert not any(parameter.requires_grad for parameter in model.vision.parameters())
    assert model.decoder.training
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())
    before = {name: tensor.clone() for name, tensor in model.vision.state_dict().items()}
    # DINOv3 in training mode would rescale its positions at random
    assert torch.equal(model.encode_moments(images)[0], model.encode_moments(images)[0])
    average = Ema(model, 0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images).sample.square().mean().backward()
    assert model.residual is not None
    assert float(model.residual.stages[0].resample.weight.grad.norm()) > 0
    assert float(model.decoder.head.weight.grad.norm()) > 0
    assert all(parameter.grad is None for parameter in model.vision.parameters())
    optimizer.step()
    average.update(0)
    for vision in (model.vision, average.module.vision):
        for name, tensor in vision.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    assert not average.module.training


def test_statistics_standardise_the_features_in_float64(dinov2):
    model = build(dinov2)
    batches = [pictures(3), pictures(2, 32, 96) ** 3]
    raw = torch.cat([model.features(batch).double().transpose(0, 1).flatten(1) for batch in batches], dim=1)
    model.fit_statistics(batches)
    torch.testing.assert_close(model.feature_mean, raw.mean(dim=1).float())
    torch.testing.assert_close(model.feature_std, raw.std(dim=1, correction=0).float())
    assert int(model.statistics_positions) == raw.shape[1] == 3 * 12 + 2 * 12
    latents = torch.cat([model.encode_moments(batch)[0].transpose(0, 1).flatten(1) for batch in batches], dim=1)
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(24), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.std(dim=1, correction=0), torch.ones(24), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no images"):
        model.fit_statistics([])


def test_statistics_do_not_depend_on_autocast_or_the_order_of_batches(dinov2):
    first, second = build(dinov2), build(dinov2)
    images = pictures(4)
    first.fit_statistics([images])
    with torch.autocast("cpu", torch.bfloat16):
        second.fit_statistics(images.flip(0).split(2))
    torch.testing.assert_close(first.feature_std, second.feature_std, rtol=1e-5, atol=1e-6)


def test_residual_channels_are_learnt_bounded_and_leave_the_features_alone(dinov2):
    plain, with_residual, images = build(dinov2), build(dinov2, residual_channels=4), pictures()
    with torch.no_grad():
        assert with_residual.residual is not None
        with_residual.residual.head.weight.mul_(1e4)
    latents = with_residual.encode_moments(images)[0]
    assert torch.equal(latents[:, :24], plain.encode_moments(images)[0])
    residual = latents[:, 24:]
    assert float(residual.abs().max()) <= RESIDUAL_BOUND
    assert float(residual.abs().max()) > 0.9 * RESIDUAL_BOUND


def test_encoders_that_cannot_be_used_are_refused_with_advice(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        AutoencoderFrozenEncoder.from_encoder(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="cannot be loaded"):
        AutoencoderFrozenEncoder.from_encoder(str(tmp_path))
    OtherModel(ViTConfig(intermediate_size=32, **SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model type 'vit' is not supported; use one of dinov2, "):
        AutoencoderFrozenEncoder.from_encoder(str(tmp_path))


def test_weights_that_are_not_safetensors_are_refused(dinov2, tmp_path):
    (tmp_path / "config.json").write_bytes((dinov2 / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(UserError, match="cannot be loaded"):
        AutoencoderFrozenEncoder.from_encoder(str(tmp_path))
