"""The autoencoder of one vector an image: shapes, refusals, saving, and the layer order that its docstring tells."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm_vae import cli
from ldm_vae.autoencoder.base import DETERMINISTIC_LOGVAR
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.autoencoder.train_config import LatentConfig, Phase, TrainVaeConfig
from ldm_vae.autoencoder.training import VaeModel
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.synthetic.source import SyntheticConfig
from ldm_vae.errors import UserError
from ldm_vae.evaluation.diagnosis import DiagnoseConfig, diagnose
from ldm_vae.evaluation.reconstruction import EvaluateConfig, evaluate
from ldm_vae.latents.format import read_manifest

KL = AutoencoderConfig(architecture="vector", preset="digits", latent_channels=2)
AE = AutoencoderConfig(architecture="vector", preset="digits", latent_channels=2, kind="ae")


@pytest.fixture(params=[KL, AE], ids=["kl", "ae"])
def autoencoder(request):
    torch.manual_seed(0)
    return build_autoencoder(request.param).eval().requires_grad_(False)


def test_an_image_becomes_one_vector_and_a_vector_one_grey_image(autoencoder):
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    mean, logvar = autoencoder.encode_moments(images)
    assert mean.shape == logvar.shape == (5, 2, 1, 1)
    assert mean.dtype == logvar.dtype == torch.float32
    decoded = autoencoder.decode_images(100 * mean)
    assert decoded.shape == images.shape
    assert torch.equal(decoded[:, 0], decoded[:, 1])
    assert torch.equal(decoded[:, 0], decoded[:, 2])
    assert float(decoded.std()) > 0
    assert (autoencoder.downsampling, autoencoder.latent_channels, autoencoder.only_side) == (32, 2, 32)
    gray = images.mean(1, keepdim=True).expand_as(images)
    torch.testing.assert_close(autoencoder.encode_moments(gray)[0], mean)


def test_it_is_small():
    model = build_autoencoder(KL)
    assert sum(p.numel() for p in model.decoder.parameters()) == 74_521
    assert sum(p.numel() for p in model.encoder.parameters()) < 120_000


def test_the_kinds_differ_in_the_spread_of_the_posterior():
    images = torch.rand(2, 3, 32, 32)
    plain, variational = build_autoencoder(AE), build_autoencoder(KL, logvar_floor=-3.0)
    assert plain.deterministic
    assert not variational.deterministic
    assert torch.equal(plain.encode_moments(images)[1], torch.full((2, 2, 1, 1), DETERMINISTIC_LOGVAR))
    with torch.no_grad():
        variational.encoder.head.bias[2:] = -60.0
    assert float(variational.encode_moments(images)[1].min()) >= -3.0
    with torch.no_grad():
        variational.encoder.head.bias[2:] = 60.0
    assert float(variational.encode_moments(images)[1].max()) <= 2.01


@pytest.mark.parametrize("size", [(28, 28), (32, 64), (64, 64)])
def test_images_of_another_size_are_refused(autoencoder, size):
    with pytest.raises(UserError, match=rf"{size[0]} x {size[1]} pixels; it knows 32 x 32 only"):
        autoencoder.reconstruct(torch.zeros(1, 3, *size))


def test_latents_of_more_than_one_position_are_refused(autoencoder):
    with pytest.raises(UserError, match="latents of 2 x 1 positions"):
        autoencoder.decode_images(torch.zeros(1, 2, 2, 1))


def test_save_and_load_is_exact(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert fingerprint(loaded) == fingerprint(autoencoder)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.reconstruct(images), autoencoder.reconstruct(images))


def test_half_precision_on_disk_decodes_alike(autoencoder, tmp_path):
    images = torch.rand(2, 3, 32, 32)
    expected = autoencoder.reconstruct(images)
    torch.nn.Module.half(autoencoder).save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size < 400_000
    torch.testing.assert_close(load_autoencoder(tmp_path).reconstruct(images), expected, rtol=0, atol=5e-3)


def test_the_vector_is_not_rounded_by_autocast(autoencoder):
    with torch.autocast("cpu", torch.bfloat16):
        mean = autoencoder.encode(torch.rand(2, 3, 32, 32)).latent_dist.mean
        once, again = (autoencoder.decode(mean * factor).sample for factor in (1.0, 1.0 + 2**-10))
    assert not torch.equal(mean, mean.bfloat16().float())
    assert not torch.equal(once, again)


def test_the_decoder_is_what_its_docstring_tells_a_web_page(autoencoder, tmp_path):
    """Every layer by hand in numpy, from the tensors of the file by the names in the docstring."""
    autoencoder.save_pretrained(tmp_path)
    file = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    tensors = {name: tensor.double().numpy() for name, tensor in file.items() if name.startswith("decoder.")}

    def layer(name):
        return tensors.pop(f"decoder.{name}.weight"), tensors.pop(f"decoder.{name}.bias")

    def silu(x):
        return x / (1 + np.exp(-x))

    def convolved(x, weight, bias):
        rows, columns = x.shape[1:]
        around = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        total = np.repeat(bias, rows * columns).reshape(-1, rows, columns)
        for row in range(3):
            for column in range(3):
                shifted = around[:, row : row + rows, column : column + columns]
                total += np.einsum("oi,ihw->ohw", weight[:, :, row, column], shifted)
        return total

    vector = np.array([0.7, -1.3])
    x = vector
    for name in ("first", "second"):
        weight, bias = layer(name)
        x = silu(weight @ x + bias)
    x = x.reshape(-1, 4, 4)
    for number in range(3):
        x = silu(convolved(x.repeat(2, axis=1).repeat(2, axis=2), *layer(f"convolutions.{number}")))
    x = convolved(x, *layer("head"))
    assert not tensors
    expected = autoencoder.decode_images(torch.tensor(vector, dtype=torch.float32).view(1, 2, 1, 1))[0, :1]
    np.testing.assert_allclose(np.clip(x, -1, 1), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "vector", "preset": "nano"}, "not a preset of architecture 'vector'; choose one of digits"),
        (
            {"architecture": "vector", "preset": "digits", "kind": "vq"},
            "built with autoencoder.architecture=wavelet only",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        AutoencoderConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "phases: crop 64: this autoencoder supports one image size; use 32"),
        ({"phases": [Phase(crop=32)]}, "held_out_resolution: 256: .* use 32"),
        (
            {"phases": [Phase(crop=32)], "held_out_resolution": 32, "latents": LatentConfig(scale_equivariance=0.5)},
            r"latents\.scale_equivariance: .* one vector",
        ),
    ],
)
def test_a_training_that_it_cannot_do_is_refused_before_it_starts(settings, message):
    with pytest.raises(UserError, match=message):
        VaeModel(TrainVaeConfig(autoencoder=KL, **settings), held_out=None)


@pytest.mark.parametrize("changed", [{"encoder_channels": [16, 32]}, {"decoder_channels": [], "encoder_channels": []}])
def test_a_damaged_description_is_refused(changed, tmp_path):
    build_autoencoder(KL).save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(description | changed))
    with pytest.raises(UserError, match=r"cannot be loaded as AutoencoderVector|config\.json: asks"):
        load_autoencoder(tmp_path)


def test_other_commands_use_it_at_its_size_or_say_why_not(tmp_path):
    torch.manual_seed(0)
    build_autoencoder(KL).save_pretrained(tmp_path / "model")
    paths = {"autoencoder": str(tmp_path / "model"), "output": str(tmp_path / "result")}
    with pytest.raises(UserError, match="resolution: 512: this autoencoder supports one image size; use 32"):
        evaluate(EvaluateConfig(**paths))
    with pytest.raises(UserError, match="resolution: 256: this autoencoder supports one image size; use 32"):
        diagnose(DiagnoseConfig(**paths))
    assert not (tmp_path / "result").exists()
    data = DataConfig(synthetic=SyntheticConfig(count=12, resolution=32))
    report = diagnose(DiagnoseConfig(**paths, data=data, part="all", resolution=32))
    judged = {verdict["name"] for verdict in report["verdicts"]}
    assert not judged & {"grid", "smuggling"}  # which are about positions
    assert report["decoder"]["flat_std"] is None


def test_a_training_run_resumes_and_gives_an_autoencoder(tmp_path):
    settings = [
        "autoencoder.architecture=vector", "autoencoder.preset=digits", "autoencoder.latent_channels=2",
        "data.synthetic.count=40", "data.synthetic.resolution=32", "held_out_resolution=32", "held_out_images=2",
        "rate.target_nats=3", "crop.short_side_min=32", "training.tracker=none", "training.workers=0",
        "training.device=cpu", f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    for steps in (2, 4):
        assert cli.main(["train-vae", *settings, f"phases=[{{steps: {steps}, crop: 32, batch: 4}}]"]) == 0
    model = load_autoencoder(tmp_path / "run")
    assert type(model).__name__ == "AutoencoderVector"
    assert model.config.logvar_floor == -9.0
    record = json.loads((tmp_path / "run" / "autoencoder" / "training.json").read_text())
    assert record["kind"] == "kl"
    assert record["held_out"]["held_out/nats_per_dim"] > 0


def test_its_latents_can_be_stored_and_are_no_maps_to_diffuse(tmp_path, capsys):
    torch.manual_seed(0)
    build_autoencoder(KL).save_pretrained(tmp_path / "model")
    model, latents = f"autoencoder={tmp_path / 'model'}", tmp_path / "latents"
    data = ["data.synthetic.count=12", "data.synthetic.resolution=32", "workers=0", "device=cpu"]
    assert cli.main(["encode", model, f"output={latents}", "resolution=64", *data]) == 2
    assert "resolution: 64: this autoencoder supports one image size; use 32" in capsys.readouterr().err
    assert cli.main(["encode", model, f"output={latents}", "resolution=32", *data]) == 0
    assert read_manifest(latents).latent_shape == (2, 1, 1)
    capsys.readouterr()
    words = ["train-diffusion", model, f"latents={latents}", f"output={tmp_path / 'run'}", "held_out=0"]
    assert cli.main([*words, "training.precision=fp32", "training.device=cpu"]) == 2  # as `encode` before it
    assert "its latents are one vector" in capsys.readouterr().err
