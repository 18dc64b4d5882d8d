"""CompVis checkpoints: a converted model computes what the published architecture does, and comes back bit-equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_vae.autoencoder.interop.compvis import (
    CompVisSettings,
    load_compvis,
    model_from_tensors,
    open_autoencoder,
    read_foreign,
    read_settings,
    tensors_from_model,
)
from ldm_vae.autoencoder.interop.convert import Conversion, convert_autoencoder
from ldm_vae.errors import UserError
from tests.autoencoder.interop.reference import CompVisKL, CompVisVQ, config, randomized

KL_MODELS = {  # the published models with small widths: multipliers and attention as in their configurations
    "kl-f4": (3, config((1, 2, 4), z_channels=3)),
    "kl-f8": (4, config((1, 2, 4, 4), num_res_blocks=2)),
    "kl-f16": (16, config((1, 1, 2, 2, 4), [4], z_channels=16)),
    "kl-f32": (8, config((1, 1, 2, 2, 4, 4), [4, 2], z_channels=8)),
}
VQ_MODELS = {
    "vq-f4": (3, 64, config((1, 2, 4), z_channels=3)),
    "vq-f4-noattn": (3, 64, config((1, 2, 4), z_channels=3, attn_type="none")),
    "vq-f8": (4, 32, config((1, 2, 2, 4), [8])),
    "vq-f16": (8, 32, config((1, 1, 2, 2, 4), [4], z_channels=8)),
    "vq, codebook of other width than z": (2, 32, config((1, 2), z_channels=6)),
}


def kl_model(name: str = "kl-f4") -> CompVisKL:
    embed_dim, settings = KL_MODELS[name]
    return randomized(CompVisKL(embed_dim, **settings))


@pytest.mark.parametrize("name", KL_MODELS)
def test_a_kl_model_computes_the_same_and_comes_back_bit_equal(name):
    reference = kl_model(name)
    tensors = reference.state_dict()
    model = model_from_tensors(dict(tensors))
    assert type(model).__name__ == "AutoencoderKL"
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = reference.moments(images)
    torch.testing.assert_close(model.encode(images).latent_dist.parameters, moments, rtol=1e-4, atol=1e-4)
    latents = moments.chunk(2, dim=1)[0]
    torch.testing.assert_close(model.decode(latents).sample, reference.decode(latents), rtol=1e-4, atol=1e-4)
    back = tensors_from_model(model)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", VQ_MODELS)
def test_a_vq_model_computes_the_same_and_comes_back_bit_equal(name):
    embed_dim, entries, settings = VQ_MODELS[name]
    reference = randomized(CompVisVQ(embed_dim, entries, **settings))
    tensors = reference.state_dict()
    model = model_from_tensors(dict(tensors))
    assert type(model).__name__ == "VQModel"
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = reference.latents(images)
    torch.testing.assert_close(model.encode(images).latent_dist.mean, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.decode(latents).sample, reference.decode(latents), rtol=1e-4, atol=1e-4)
    back = tensors_from_model(model)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_a_swapped_tensor_would_be_seen():
    """The comparison has teeth: the same conversion with two resolutions' weights exchanged gives another output."""
    reference = kl_model()
    tensors = dict(reference.state_dict())
    model = model_from_tensors(tensors)
    first, second = "decoder.up.2.block.0.conv1.bias", "decoder.up.2.block.1.conv1.bias"
    tensors[first], tensors[second] = tensors[second], tensors[first]
    latents = torch.randn(1, 3, 8, 8)
    difference = model_from_tensors(tensors).decode(latents).sample - model.decode(latents).sample
    assert difference.abs().max() > 0.01


def test_the_names_agree_with_diffusers_own_conversion():
    """An independent witness: diffusers' loader of single files maps the same tensors to the same names (kl-f8)."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    tensors = kl_model("kl-f8").state_dict()
    model = model_from_tensors(dict(tensors))
    theirs = convert_ldm_vae_checkpoint(dict(tensors), model.config)
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_autoencoder_is_found_in_a_whole_model_and_the_rest_is_named(tmp_path):
    tensors = kl_model().state_dict()
    rest = {"model.diffusion_model.out.weight": torch.zeros(3), "cond_stage_model.x": torch.zeros(1)}
    training = {"first_stage_model.loss.logvar": torch.zeros(1), "first_stage_model.model_ema.decay": torch.zeros(1)}
    save_file({f"first_stage_model.{k}": v for k, v in tensors.items()} | rest | training, tmp_path / "sd.safetensors")
    foreign = read_foreign(tmp_path / "sd.safetensors")
    assert foreign.prefix == "first_stage_model."
    assert foreign.dropped == {"model": 1, "cond_stage_model": 1, "loss": 1, "model_ema": 1}
    assert all(torch.equal(foreign.tensors[key], tensors[key]) for key in tensors)
    model, notes = load_compvis(tmp_path / "sd.safetensors")
    back = tensors_from_model(model, "first_stage_model.")
    assert all(torch.equal(back[f"first_stage_model.{key}"], tensors[key]) for key in tensors)
    assert any("model_ema.* (1)" in note for note in notes)


def test_attention_stored_as_linear_layers_is_accepted(tmp_path):
    tensors = kl_model().state_dict()
    linear = {k: v.flatten(1) if ".attn_1." in k and v.ndim == 4 else v for k, v in tensors.items()}
    assert linear["encoder.mid.attn_1.q.weight"].ndim == 2
    back = tensors_from_model(model_from_tensors(linear))
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_a_model_without_quant_conv_is_accepted_and_has_none_afterwards():
    tensors = {key: value for key, value in kl_model().state_dict().items() if "quant_conv" not in key}
    model = model_from_tensors(tensors)
    assert model.quant_conv is None
    assert model.post_quant_conv is None
    assert tensors_from_model(model).keys() == tensors.keys()


def test_a_ckpt_with_tensors_only_is_read_and_one_with_code_is_refused_without_running_it(tmp_path):
    reference = kl_model()
    state = {"state_dict": reference.state_dict() | {"loss.logvar": torch.zeros(1)}, "global_step": 3, "epoch": 1}
    torch.save(state, tmp_path / "good.ckpt")
    model, _ = load_compvis(tmp_path / "good.ckpt")
    back = tensors_from_model(model)
    assert all(torch.equal(value, back[key]) for key, value in reference.state_dict().items())

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save(state | {"callbacks": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"pickle with more than tensors in it \(.*mkdir.*safetensors version"):
        load_compvis(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.mid.block_1.norm1.bias"), "missing decoder.mid.block_1.norm1.bias, unknown nothing"),
        (lambda t: t.update({"encoder.extra.weight": torch.zeros(1)}), "unknown encoder.extra.weight"),
        (lambda t: t.pop("decoder.conv_in.weight"), "has no tensor 'decoder.conv_in.weight'"),
        (lambda t: t.update({"encoder.conv_out.weight": torch.zeros(5, 128, 3, 3)}), "gives 5 channels"),
        (lambda t: t.update({"encoder.norm_out.bias": torch.zeros(7)}), "shapes do not fit"),
        (
            lambda t: t.update({"post_quant_conv.weight": torch.zeros(3, 5, 1, 1)}),
            "z_channels 3 and embed_dim 5 differ",
        ),
        (lambda t: t.update({"encoder.conv_in.weight": torch.zeros(64, 3, 3, 3)}), "ch_mult must begin with 1"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_name(change, message, tmp_path):
    tensors = dict(kl_model().state_dict())
    change(tensors)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=message):
        load_compvis(tmp_path / "odd.safetensors")


def test_files_that_are_no_compvis_autoencoder_are_refused(tmp_path):
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    save_file({"unet.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    save_file(model_from_tensors(dict(kl_model().state_dict())).state_dict(), tmp_path / "diffusers.safetensors")
    torch.save([1, 2], tmp_path / "list.ckpt")
    for name, message in {
        "none.ckpt": "no such file",
        "text.ckpt": "not a readable checkpoint|pickle",
        "text.safetensors": "cannot be read as a safetensors file",
        "unet.safetensors": "holds no CompVis autoencoder",
        "diffusers.safetensors": "names of a diffusers model; give its directory",
        "list.ckpt": "does not hold named tensors",
    }.items():
        with pytest.raises(UserError, match=message):
            load_compvis(tmp_path / name)


def test_the_scaling_factor_comes_from_a_configuration_that_states_it_and_from_nowhere_else(tmp_path):
    save_file(kl_model().state_dict(), tmp_path / "model.safetensors")
    model, notes = load_compvis(tmp_path / "model.safetensors")
    assert model.config.scaling_factor == 1.0
    assert any("scaling_factor is 1.0" in note for note in notes)
    (tmp_path / "v1.yaml").write_text(
        "model: {params: {scale_factor: 0.18215, first_stage_config: {params: {ddconfig: {resolution: 512}}}}}"
    )
    assert read_settings(tmp_path / "v1.yaml") == CompVisSettings(0.18215, 512)
    model, notes = load_compvis(tmp_path / "model.safetensors", tmp_path / "v1.yaml")
    assert (model.config.scaling_factor, model.config.sample_size) == (0.18215, 512)
    assert not notes
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="not an LDM configuration"):
        load_compvis(tmp_path / "model.safetensors", tmp_path / "other.yaml")


@pytest.mark.parametrize("name", ["kl-f4", "kl-f16"])
def test_checkpoint_to_directory_and_back_through_files(name, tmp_path):
    tensors = kl_model(name).state_dict()
    save_file(tensors, tmp_path / "in.safetensors")
    convert_autoencoder(Conversion(str(tmp_path / "in.safetensors"), str(tmp_path / "model"), "diffusers"))
    convert_autoencoder(Conversion(str(tmp_path / "model"), str(tmp_path / "out.safetensors"), "compvis"))
    back = load_file(tmp_path / "out.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    settings = read_settings(tmp_path / "out.yaml")
    assert settings == CompVisSettings(1.0, 256)
    if name == "kl-f16":
        from omegaconf import OmegaConf

        written = OmegaConf.load(tmp_path / "out.yaml").model.params.ddconfig
        assert written.attn_resolutions == [16]  # 256 / 16: that of the published kl-f16
        assert (written.ch, list(written.ch_mult)) == (32, [1, 1, 2, 2, 4])


def test_a_quantized_model_goes_through_files_too(tmp_path):
    embed_dim, entries, settings = VQ_MODELS["vq-f4"]
    tensors = randomized(CompVisVQ(embed_dim, entries, **settings)).state_dict()
    save_file(tensors, tmp_path / "in.safetensors")
    convert_autoencoder(Conversion(str(tmp_path / "in.safetensors"), str(tmp_path / "model"), "diffusers"))
    assert type(open_autoencoder(tmp_path / "model").model).__name__ == "VQModel"
    convert_autoencoder(
        Conversion(str(tmp_path / "model"), str(tmp_path / "out.safetensors"), "compvis", prefix="first_stage_model.")
    )
    back = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(back[f"first_stage_model.{key}"], tensors[key]) for key in tensors)


def test_stock_diffusers_loads_the_directory_where_this_package_is_absent(tmp_path):
    reference = kl_model("kl-f8")
    save_file(reference.state_dict(), tmp_path / "in.safetensors")
    record, notes = convert_autoencoder(
        Conversion(str(tmp_path / "in.safetensors"), str(tmp_path / "model"), "diffusers")
    )
    assert not any("class of this package" in note for note in notes)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    save_file({"images": images, "moments": reference.moments(images)}, tmp_path / "expected.safetensors")
    code = (
        "import sys\n"
        "from ldm_vae import runtime\n"
        "runtime.repair_torchvision()\n"  # some installations of torchvision are broken for diffusers itself
        "for name in [name for name in sys.modules if name.startswith('ldm_vae')]:\n"
        "    del sys.modules[name]\n"
        "sys.modules['ldm_vae'] = None\n"  # importing it raises ImportError from here on
        "from diffusers import AutoencoderKL\n"
        "from safetensors.torch import load_file\n"
        "expected = load_file('expected.safetensors')\n"
        "model = AutoencoderKL.from_pretrained('model').eval()\n"
        "moments = model.encode(expected['images']).latent_dist.parameters\n"
        "print(float((moments - expected['moments']).abs().max()), 'ldm_vae.cli' in sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False, env=environment
    )
    assert process.returncode == 0, process.stderr[-2000:]
    error, imported = process.stdout.split()
    assert float(error) < 1e-4
    assert imported == "False"
    assert json.loads((tmp_path / "model" / "conversion.json").read_text())["fingerprint"] == record["fingerprint"]
