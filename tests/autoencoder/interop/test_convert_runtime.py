"""ONNX and TorchScript: the files compute what the model computes, at sizes they were not made with."""

from __future__ import annotations

import builtins
import json

import pytest
import torch

from ldm_vae.autoencoder.interop import convert as convert_module
from ldm_vae.autoencoder.interop.compvis import model_from_tensors
from ldm_vae.autoencoder.interop.convert import Conversion, convert_autoencoder
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.autoencoder.wavelet import AutoencoderWavelet
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.errors import UserError
from tests.autoencoder.interop.reference import CompVisVQ, config, randomized

SIZES = [(1, 64, 64), (3, 40, 88)]  # the example is 2 x 48 x 48


def tiny(architecture: str):
    torch.manual_seed(0)
    if architecture == "sd":
        model = build_autoencoder(AutoencoderConfig("sd", "tiny"))
    else:
        model = AutoencoderWavelet(4, (8, 16), (0, 1), (16, 8, 8, 8), (1, 0, 0, 0))
    return model.eval().requires_grad_(False)


def outputs(directory, half: str, values: torch.Tensor) -> list[torch.Tensor]:
    """What a user of the files gets, without this package's code."""
    said = json.loads((directory / "config.json").read_text())
    path = str(directory / said["files"][half])
    if said["format"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (name,) = said[half]["inputs"]
        assert [output.name for output in session.get_outputs()] == list(said[half]["outputs"])
        return [torch.from_numpy(output) for output in session.run(None, {name: values.numpy()})]
    return list(torch.jit.load(path)(values))


def check_parity(directory, model) -> None:
    for count, height, width in SIZES:
        images = torch.rand(count, 3, height, width) * 2 - 1
        posterior = model.encode(images).latent_dist
        mean, logvar = outputs(directory, "encoder", images)
        torch.testing.assert_close(mean, posterior.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(logvar, posterior.logvar, rtol=0, atol=1e-4)
        (decoded,) = outputs(directory, "decoder", mean)
        torch.testing.assert_close(decoded, model.decode(mean).sample, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_a_stock_model_with_a_codebook_is_exported_with_its_codebook(format, tmp_path):
    """Latents before quantization; the decoder's graph holds the codebook."""
    settings = config((1, 2), z_channels=4)
    model = model_from_tensors(randomized(CompVisVQ(4, 16, **settings)).state_dict())
    model.save_pretrained(tmp_path / "model")
    convert_autoencoder(Conversion(str(tmp_path / "model"), str(tmp_path / "out"), format, size=32))
    check_parity(tmp_path / "out", model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ae", "fsq"])
def test_deterministic_kinds_are_exported(kind, tmp_path):
    model = build_autoencoder(AutoencoderConfig("wavelet", "pico", kind=kind)).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "model")
    convert_autoencoder(Conversion(str(tmp_path / "model"), str(tmp_path / "out"), "onnx", size=48))
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    posterior = model.encode(images).latent_dist
    torch.testing.assert_close(outputs(tmp_path / "out", "encoder", images)[0], posterior.mean, rtol=0, atol=1e-4)


def test_a_learnt_codebook_of_ours_is_refused_rather_than_exported_for_one_size(tmp_path):
    model = build_autoencoder(AutoencoderConfig("wavelet", "pico", kind="vq", codebook_size=16))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="codebook search of kind=vq depends on the image's size"):
        convert_autoencoder(Conversion(str(tmp_path / "model"), str(tmp_path / "out"), "torchscript"))


@pytest.mark.parametrize("architecture", ["wavelet", "sd"])
def test_torchscript_equals_the_model_at_other_sizes(architecture, tmp_path):
    model = tiny(architecture)
    model.save_pretrained(tmp_path / "model")
    convert_autoencoder(Conversion(str(tmp_path / "model"), str(tmp_path / "out"), "torchscript", size=48))
    check_parity(tmp_path / "out", model)


@pytest.mark.parametrize("architecture", ["wavelet", pytest.param("sd", marks=pytest.mark.slow)])
def test_onnx_equals_the_model_at_other_sizes_and_says_what_it_is(architecture, tmp_path):
    model = tiny(architecture)
    model.save_pretrained(tmp_path / "model")
    statistics = {"mean": [0.0] * 4, "std": [1.0] * 4, "count": 7}
    known = {model.encoder_fingerprint(): statistics}
    convert_autoencoder(Conversion(str(tmp_path / "model"), str(tmp_path / "out"), "onnx", size=48), known.__getitem__)
    check_parity(tmp_path / "out", model)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["opset"] == 18
    assert said["autoencoder"]["fingerprint"] == fingerprint(model)
    assert said["latent_statistics"] == statistics
    assert said["encoder"]["inputs"]["images"]["shape"] == ["n", 3, "8h", "8w"]
    assert said["decoder"]["inputs"]["latents"]["shape"] == ["n", 4, "h", "w"]
    for half in ("encoder", "decoder"):
        assert len(said[half]["largest_error"]) == 2
        assert max(said[half]["largest_error"].values()) < 1e-4
    import onnx

    file = onnx.load(tmp_path / "out" / "encoder.onnx")
    assert {entry.version for entry in file.opset_import if entry.domain == ""} == {18}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "conversion.json", "decoder.onnx", "encoder.onnx",
    ]  # fmt: skip


def test_half_precision_inside_keeps_float32_outside(tmp_path):
    model = tiny("wavelet")
    model.save_pretrained(tmp_path / "model")
    convert_autoencoder(Conversion(str(tmp_path / "model"), str(tmp_path / "out"), "torchscript", "bf16", size=48))
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, _ = outputs(tmp_path / "out", "encoder", images)
    assert mean.dtype == torch.float32
    error = (mean - model.encode(images).latent_dist.mean).abs().max()
    assert 1e-6 < error < 0.05  # bf16 it is, and the same network


def test_a_graph_that_differs_is_not_published(tmp_path, monkeypatch):
    """The check of the written file has teeth: a file of another model is found, and nothing stays behind."""
    tiny("wavelet").save_pretrained(tmp_path / "model")
    original = convert_module._torchscript_graph

    def shifted(path):
        run = original(path)
        return lambda values: tuple(output + 0.1 for output in run(values))

    monkeypatch.setattr(convert_module, "_torchscript_graph", shifted)
    with pytest.raises(UserError, match=r"encoder: the exported graph differs by 0\.1"):
        convert_autoencoder(Conversion(str(tmp_path / "model"), str(tmp_path / "out"), "torchscript", size=48))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_missing_packages_and_unsuitable_settings_are_one_sentence(tmp_path, monkeypatch):
    tiny("wavelet").save_pretrained(tmp_path / "model")
    source, target = str(tmp_path / "model"), str(tmp_path / "out")
    with pytest.raises(UserError, match=r"resolution: 50 is not a multiple of 8 from 16 on; use 48"):
        convert_autoencoder(Conversion(source, target, "torchscript", size=50))
    with pytest.raises(UserError, match="bf16 on few devices"):
        convert_autoencoder(Conversion(source, target, "onnx", "bf16"))
    real = builtins.__import__

    def without_onnx(name, *args, **kwargs):
        if name == "onnxscript":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(UserError, match=r'onnxscript is not installed; run pip install "ldm_vae\[export\]"'):
        convert_autoencoder(Conversion(source, target, "onnx"))
    assert not (tmp_path / "out").exists()
