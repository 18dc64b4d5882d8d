"""diffusers' other autoencoders: those of RGB images are taken, those of video, sound or other channels are named."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from ldm_vae import cli
from ldm_vae.autoencoder.models import adapted, load_autoencoder
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.samplers import flow_scheduler
from ldm_vae.errors import UserError
from ldm_vae.latents.normalizer import LatentNormalizer


def small_kl(model_class=diffusers.AutoencoderKL, **settings):
    plain = {"block_out_channels": (16, 16, 16), "norm_num_groups": 8, "latent_channels": 5}
    plain |= {
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    }  # fmt: skip
    return model_class(**(plain | settings))


def asymmetric():
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, down_block_out_channels=(16, 16, 16), latent_channels=6,
        up_block_types=("UpDecoderBlock2D",) * 3, up_block_out_channels=(16, 16, 16), norm_num_groups=8,
    )  # fmt: skip


STILLS = {
    "AutoencoderKLFlux2": (lambda: small_kl(diffusers.AutoencoderKLFlux2), 5, 4),
    "AsymmetricAutoencoderKL": (asymmetric, 6, 4),
}
VIDEO = {
    "AutoencoderKLWan": lambda: diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1),
    "AutoencoderKLCogVideoX": lambda: diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1
    ),
    "AutoencoderKLTemporalDecoder": lambda: diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32,)),
    "AutoencoderKLQwenImage": lambda: diffusers.AutoencoderKLQwenImage(base_dim=4, z_dim=4, num_res_blocks=1),
}
SOUND = {
    "AutoencoderOobleck": lambda: diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, decoder_channels=4, decoder_input_channels=4, channel_multiples=[1, 1], audio_channels=3,
        downsampling_ratios=[2, 2],
    ),
}  # fmt: skip
REFUSED = {name: (make, "is for video") for name, make in VIDEO.items()}
REFUSED |= {name: (make, "is for sound") for name, make in SOUND.items()}
REFUSED |= {
    "gray": (lambda: small_kl(in_channels=1, out_channels=1), "AutoencoderKL: has 1 image channels (in_channels)"),
    "with a mask": (lambda: small_kl(in_channels=4), "AutoencoderKL: has 4 image channels (in_channels)"),
    "with transparency": (lambda: small_kl(out_channels=4), "AutoencoderKL: has 4 image channels (out_channels)"),
    "gray VQ": (lambda: diffusers.VQModel(in_channels=1, out_channels=1), "VQModel: has 1 image channels"),
    "gray tiny": (lambda: diffusers.AutoencoderTiny(in_channels=1), "AutoencoderTiny: has 1 image channels"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """name -> the folder of such an autoencoder."""
    torch.manual_seed(0)
    folder, made = tmp_path_factory.mktemp("others"), {}
    for name, (make, _) in REFUSED.items():
        make().save_pretrained(made.setdefault(name, folder / name))
    return made


@pytest.mark.parametrize("name", STILLS)
def test_other_autoencoders_of_images_are_taken_as_they_are(name, tmp_path):
    make, channels, factor = STILLS[name]
    torch.manual_seed(0)
    original = make().eval()
    original.save_pretrained(tmp_path / "original")
    model = load_autoencoder(tmp_path / "original")
    assert (model.latent_channels, model.downsampling, model.deterministic) == (channels, factor, False)
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        expected = original.encode(images).latent_dist
        decoded = original.decode(expected.mode()).sample
    mean, logvar = model.encode_moments(images)
    torch.testing.assert_close(mean, expected.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logvar, expected.logvar, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.decode_images(mean), decoded.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["_class_name"] == name
    assert fingerprint(load_autoencoder(tmp_path / "again")) == fingerprint(original)


@pytest.mark.parametrize("name", REFUSED)
def test_autoencoders_of_other_data_are_named_before_their_weights_are_read(name, refused, monkeypatch):
    from ldm_vae.autoencoder import models

    monkeypatch.setattr(models, "load_weights", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError) as failure:
        load_autoencoder(refused[name])
    assert str(failure.value).startswith(f"{refused[name]}: ")
    assert REFUSED[name][1] in str(failure.value)
    assert str(failure.value).endswith("give an autoencoder of RGB images, for example AutoencoderKL")


@pytest.mark.parametrize("name", REFUSED)
def test_they_are_named_in_memory_too(name):
    with pytest.raises(UserError) as failure:
        adapted(REFUSED[name][0]())
    assert REFUSED[name][1] in str(failure.value)


def test_a_pipeline_does_not_take_them():
    from ldm_vae.diffusion.unet import UNetConfig, build_unet

    unet = build_unet(UNetConfig(preset="tiny", widths=(32, 64)), 4, 2).eval()
    normalizer = LatentNormalizer([0.0] * 4, [1.0] * 4).to_dict()
    with pytest.raises(UserError, match="AutoencoderKLWan: is for video"):
        LatentDiffusionPipeline(VIDEO["AutoencoderKLWan"](), unet, flow_scheduler(1.0), normalizer, (4, 4), ["a", "b"])


def test_a_class_whose_name_says_nothing_is_asked_with_an_image(tmp_path):
    class Vectors(diffusers.AutoencoderKL):
        """Two-dimensional convolutions, and latents that are no map."""

        def encode(self, x, return_dict=True):
            posterior = super().encode(x).latent_dist
            posterior.mean = posterior.mean.mean(-1, keepdim=True)
            return type("Output", (), {"latent_dist": posterior})

    class Rotations(diffusers.AutoencoderKL):
        def encode(self, x, return_dict=True):
            raise IndexError("not enough rotations")

    for model_class, match in ((Vectors, "makes latents"), (Rotations, "does not encode .*not enough rotations")):
        with pytest.raises(UserError, match=f"{model_class.__name__}: {match}"):
            adapted(small_kl(model_class))


DATA = ["data={images}", "output={new}"]
COMMANDS = {
    "evaluate": ["autoencoder={model}", *DATA, "resolution=64"],
    "diagnose": ["autoencoder={model}", *DATA, "resolution=64"],
    "reconstruct": ["autoencoder={model}", "images=[{images}]", "output={new}"],
    "encode": ["autoencoder={model}", *DATA, "resolution=64"],
    "interpolate": ["autoencoder={model}", "images=[{images}/a/000.png,{images}/a/002.png]", "output={new}", "size=64"],
    "codec bench": ["autoencoder={model}", *DATA, "resolution=64"],
    "anomaly fit": ["autoencoder={model}", *DATA, "resolution=64"],
    "directions fit": ["autoencoder={model}", *DATA, "resolution=64"],
    "compress": ["images=[{images}]", "autoencoder={model}", "output={new}"],
    "explore": ["autoencoder={model}", "data={images}", "size=64", "export={new}.html"],
    "train-vae": ["initial={model}", *DATA],
    "model convert": ["model={model}", "output={new}", "to=onnx"],
    "model card": ["model={model}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_an_autoencoder_of_video_in_one_sentence(command, refused, image_folder, tmp_path, capsys):
    places = {"model": refused["AutoencoderKLWan"], "images": image_folder, "new": tmp_path / "new"}
    words = [word.format(**places) for word in COMMANDS[command]]
    assert cli.main([*command.split(), *words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"ldm-vae {command}: ")
    assert "AutoencoderKLWan: is for video (it has Conv3d layers); give an autoencoder of RGB images" in last
    assert not list(tmp_path.rglob("*.json")) + list(tmp_path.rglob("*.png"))
