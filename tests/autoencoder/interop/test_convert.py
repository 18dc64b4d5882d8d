"""`ldm-vae convert`: what is written, what is refused, what is said."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from ldm_vae import cli
from ldm_vae.autoencoder.interop.convert import Conversion, convert_autoencoder
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents.format import Manifest, write_manifest
from ldm_vae.storage import open_folder


@pytest.fixture(scope="module")
def wavelet_run(tmp_path_factory):
    """A run directory as `train-vae` leaves it."""
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig("wavelet", "pico")).eval()
    run = tmp_path_factory.mktemp("wavelet") / "run"
    model.save_pretrained(run / "autoencoder")
    (run / "autoencoder" / "training.json").write_text(json.dumps({"fingerprint": fingerprint(model)}))
    return run


def test_a_wavelet_run_becomes_a_directory_that_loads_and_the_class_is_pointed_out(wavelet_run, tmp_path, capsys):
    target = tmp_path / "model"
    assert cli.main(["convert", str(wavelet_run), str(target), "--to", "diffusers"]) == 0
    assert "stock diffusers cannot load it" in capsys.readouterr().out
    assert fingerprint(load_autoencoder(target)) == fingerprint(load_autoencoder(wavelet_run))
    assert json.loads((target / "training.json").read_text())["fingerprint"] == fingerprint(load_autoencoder(target))


def test_half_precision_halves_the_file_and_the_new_identity_is_said(wavelet_run, tmp_path, capsys):
    target = tmp_path / "model"
    assert cli.main(["convert", str(wavelet_run), str(target), "--to", "diffusers", "--dtype", "fp16"]) == 0
    assert "changed the weights and so the fingerprint" in capsys.readouterr().out
    weights = load_file(target / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    record = json.loads((target / "conversion.json").read_text())
    assert record["fingerprint"] == fingerprint(load_autoencoder(target))
    assert record["fingerprint"] != record["source"]["fingerprint"]
    assert not (target / "training.json").exists()  # it states the fingerprint of other weights


def test_nothing_is_replaced_unasked_and_nothing_foreign_ever(wavelet_run, tmp_path):
    source, target = str(wavelet_run), tmp_path / "model"
    convert_autoencoder(Conversion(source, str(target), "diffusers"))
    with pytest.raises(UserError, match="exists; give another target, or --overwrite"):
        convert_autoencoder(Conversion(source, str(target), "diffusers"))
    convert_autoencoder(Conversion(source, str(target), "diffusers", overwrite=True))
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="did not write"):
        convert_autoencoder(Conversion(source, str(foreign), "diffusers", overwrite=True))
    assert (foreign / "letter.txt").read_text() == "dear"
    with pytest.raises(UserError, match="is the source as well"):
        convert_autoencoder(Conversion(str(target), str(target), "diffusers", overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "compvis", "target": "x.ckpt"}, "never as a pickle"),
        ({"to": "compvis", "target": "x.safetensors"}, "AutoencoderWavelet: the CompVis layout holds"),
        ({"to": "compvis", "target": "x.safetensors", "prefix": "vae"}, "does not end with a dot; use 'vae.'"),
        ({"to": "diffusers", "target": "x", "prefix": "vae."}, "prefix: has an effect with to=compvis only"),
        ({"to": "diffusers", "target": "x", "config": "a.yaml"}, "states its own settings"),
    ],
)
def test_what_cannot_be_done_is_refused(settings, message, wavelet_run, tmp_path):
    settings["target"] = str(tmp_path / settings["target"])
    with pytest.raises(UserError, match=message):
        convert_autoencoder(Conversion(str(wavelet_run), **settings))
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_other_groups_than_compvis_has_is_refused(tmp_path):
    build_autoencoder(AutoencoderConfig("sd", "tiny")).save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match=r"AutoencoderKL.norm_num_groups: 8 cannot be expressed .*32 there"):
        convert_autoencoder(Conversion(str(tmp_path / "tiny"), str(tmp_path / "x.safetensors"), "compvis"))


def test_a_settings_file_of_the_same_name_is_not_replaced_unasked(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(32,), norm_num_groups=32).save_pretrained(tmp_path / "kl")
    (tmp_path / "mine.yaml").write_text("mine: 1")
    with pytest.raises(UserError, match=r"mine\.yaml: exists and would be replaced"):
        convert_autoencoder(Conversion(str(tmp_path / "kl"), str(tmp_path / "mine.safetensors"), "compvis"))
    assert (tmp_path / "mine.yaml").read_text() == "mine: 1"
    assert not (tmp_path / "mine.safetensors").exists()


def test_the_commands_of_the_documentation_parse():
    page = Path(__file__).parents[3] / "docs" / "how-to" / "interop.md"
    lines = [
        line
        for line in page.read_text().splitlines()
        if line.startswith(("ldm-vae model convert", "ldm-vae model card"))
    ]
    assert len(lines) == 8
    for line in lines:
        name, arguments, advice = cli.find_command(shlex.split(line)[1:])
        assert cli.ArgumentReader(name).read(arguments).advice == advice == []


def test_statistics_go_along_with_the_autoencoder_that_made_the_latents_and_no_other(wavelet_run, tmp_path, capsys):
    def latents(name: str, made_by: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        manifest = Manifest(
            autoencoder={"fingerprint": made_by, "encoder_fingerprint": made_by},
            preprocessing={}, content="moments", dtype="float16", latent_shape=(4, 4, 4), flipped=False,
            encoding={"batch": 1, "shard_size": 1}, datasets=(), label_names=(), count=3, shards=0, index=(),
            rejected=0, where=open_folder(folder),
            statistics={"mean": [0.5] * 4, "std": [2.0] * 4, "count": 3},
        )  # fmt: skip
        write_manifest(open_folder(folder), manifest)
        return folder

    ours = latents("ours", load_autoencoder(wavelet_run).encoder_fingerprint())
    arguments = ["convert", str(wavelet_run), str(tmp_path / "out"), "--to", "torchscript", "--size", "32", "--latents"]
    assert cli.main([*arguments, str(latents("theirs", "sha256:" + "0" * 64))]) == EXIT_USER_ERROR
    assert "the latents were made by sha256:000000000000..." in capsys.readouterr().err
    assert cli.main([*arguments, str(tmp_path / "none")]) == EXIT_USER_ERROR
    assert "none: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*arguments, str(ours)]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["latent_statistics"]["std"] == [2.0] * 4
    arguments[4] = "diffusers"
    arguments[2] = str(tmp_path / "other")
    assert cli.main([*arguments, str(ours)]) == EXIT_USER_ERROR
    assert "latents: statistics fold into the 1x1 convolutions" in capsys.readouterr().err
    compvis = Conversion(str(wavelet_run), str(tmp_path / "x.safetensors"), "compvis")
    with pytest.raises(UserError, match="latents: has no effect with to=compvis"):
        convert_autoencoder(compvis, lambda _: {"mean": [0.5] * 4, "std": [2.0] * 4})


def test_statistics_are_folded_into_a_stock_directory(tmp_path):
    torch.manual_seed(0)
    build_autoencoder(AutoencoderConfig("sd", "tiny")).save_pretrained(tmp_path / "kl")
    conversion = Conversion(str(tmp_path / "kl"), str(tmp_path / "out"), "diffusers")
    record, notes = convert_autoencoder(conversion, lambda _: {"mean": [0.5] * 4, "std": [2.0] * 4})
    assert "its latents have mean 0 and std 1" in notes[0]
    assert "folding changed the weights and so the fingerprint" in notes[1]
    folded, model = AutoencoderKL.from_pretrained(tmp_path / "out"), load_autoencoder(tmp_path / "kl")
    assert record["fingerprint"] == fingerprint(folded) != record["source"]["fingerprint"] == fingerprint(model)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    mean = model.encode(images).latent_dist.mean
    torch.testing.assert_close(folded.encode(images).latent_dist.mean, (mean - 0.5) / 2)


def test_the_first_channels_are_cut_out_exactly(wavelet_run, tmp_path, capsys):
    target = tmp_path / "narrow"
    assert cli.main(["convert", str(wavelet_run), str(target), "--to", "diffusers", "--channels", "2"]) == 0
    assert "first 2 latent channels" in capsys.readouterr().out
    narrow, full = load_autoencoder(target), load_autoencoder(wavelet_run)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(narrow.encode(images).latent_dist.mean, full.encode(images).latent_dist.mean[:, :2])
    assert not (target / "training.json").exists()  # it states the fingerprint of other weights
    with pytest.raises(UserError, match="not between 1 and the 4 channels"):
        convert_autoencoder(Conversion(str(wavelet_run), str(tmp_path / "x"), "diffusers", channels=5))
