"""`ldm-vae convert --to checkpoint`: what is given away loads everywhere, knows where it came from, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm_vae import cli
from ldm_vae.autoencoder.lineage import OF_AUTOENCODER, earlier_runs, read_record, read_runs
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.diffusion import export
from ldm_vae.diffusion.export import METRIC_LINES, pack
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.metrics import psnr


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as `train-vae` leaves it, on a machine with folders of its own."""
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig("wavelet", "pico"))
    folder = tmp_path / "run"
    model.save_pretrained(folder / "autoencoder")
    identities = {"fingerprint": fingerprint(model), "encoder_fingerprint": model.encoder_fingerprint()}
    record = {**identities, "kind": "kl", "initial": {"path": "/srv/people/mine/runs/first"}}
    (folder / "autoencoder" / "training.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(
        "data:\n  path: /srv/people/mine/images\n  weights: ../shared/net.safetensors\n"
    )
    command = ["train-vae", "data.path=/srv/people/mine/images", "output=runs/mine"]
    (folder / "run.json").write_text(json.dumps({"command": command, "seconds": 5}))
    lines = [{"step": step, "loss/l1": 0.1} for step in range(1000)]
    lines += [{"step": 999, "held_out/psnr": 20.0}, {"step": 999, "alarm": "a sentence", "verdict": "grid"}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_a_run_becomes_half_precision_with_its_records_and_none_of_the_machine(run, tmp_path, capsys):
    target = tmp_path / "checkpoints" / "mine"
    assert cli.main(["convert", str(run), str(target), "--to", "checkpoint"]) == 0
    assert "measure this copy" in capsys.readouterr().out
    weights = load_file(target / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    copy, original = load_autoencoder(target), load_autoencoder(run)
    record = read_record(target)
    assert (record["fingerprint"], record["encoder_fingerprint"]) == (fingerprint(copy), copy.encoder_fingerprint())
    assert record["rounded_from"] == {
        "precision": "fp16",
        "fingerprint": fingerprint(original),
        "encoder_fingerprint": original.encoder_fingerprint(),
    }
    assert fingerprint(copy) != fingerprint(original)
    assert record["initial"] == {"path": "first"}
    assert json.loads((target / "run.json").read_text())["command"][1:] == ["data.path=images", "output=runs/mine"]
    for path in target.iterdir():
        if path.suffix != ".safetensors":
            assert "/srv" not in path.read_text()
            assert "shared" not in path.read_text()
    metrics = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) <= METRIC_LINES + 2
    assert [line["step"] for line in metrics] == sorted(line["step"] for line in metrics)
    assert metrics[0]["step"] == 0
    assert metrics[-2:] == [
        {"step": 999, "held_out/psnr": 20.0},
        {"step": 999, "alarm": "a sentence", "verdict": "grid"},
    ]
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    assert float(psnr(copy.reconstruct(image), original.reconstruct(image))) > 50


def test_the_runs_that_it_started_from_travel_along_without_their_folders(run, tmp_path):
    first = tmp_path / "first"
    (first / "autoencoder").mkdir(parents=True)
    (first / "autoencoder" / "training.json").write_text('{"fingerprint": "sha256:1"}')
    (first / "run.json").write_text(json.dumps({"command": ["train-vae", "data.path=/srv/images"], "seconds": 7}))
    record = json.loads((run / "autoencoder" / "training.json").read_text())
    record["initial"] = {"path": str(first), "fingerprint": "sha256:1"}
    (run / "autoencoder" / "training.json").write_text(json.dumps(record))
    assert cli.main(["convert", str(run), str(tmp_path / "given"), "--to", "checkpoint"]) == 0
    expected = [{"name": "first", "command": ["train-vae", "data.path=images"], "seconds": 7}]
    assert earlier_runs(tmp_path / "given") == expected
    assert "earlier_runs.json" in json.loads((tmp_path / "given" / "MANIFEST.json").read_text())["files"]


def test_records_of_another_run_around_a_model_are_not_its_own(run, tmp_path):
    load_autoencoder(run).save_pretrained(run / "exported")
    pack(str(run / "exported"), tmp_path / "given")
    assert not (tmp_path / "given" / "run.json").exists()


def test_a_copy_of_the_copy_is_the_copy(run, tmp_path):
    pack(str(run), tmp_path / "one")
    _, notes = pack(str(tmp_path / "one"), tmp_path / "two")
    assert notes == []
    first, second = read_record(tmp_path / "one"), read_record(tmp_path / "two")
    assert first == second  # it still names the run that it was rounded from
    assert (tmp_path / "one" / "metrics.jsonl").read_text() == (tmp_path / "two" / "metrics.jsonl").read_text()


def test_larger_weights_are_several_files_and_a_lost_one_is_missed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_SIZE", "200KB")
    pack(str(run), tmp_path / "parts")
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3
    pack(str(run), tmp_path / "whole", precision="fp16")
    assert fingerprint(load_autoencoder(tmp_path / "parts")) == read_record(tmp_path / "whole")["fingerprint"]
    files[1].unlink()
    with pytest.raises(UserError, match=rf"{files[1].name} is missing"):
        load_autoencoder(tmp_path / "parts")
    monkeypatch.setattr(export, "LARGEST_FILE_BYTES", 1000)
    with pytest.raises(UserError, match="cannot be divided into files"):
        pack(str(run), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_weights_beyond_half_precision_are_refused(run, tmp_path):
    model = load_autoencoder(run)
    with torch.no_grad():
        next(model.parameters()).mul_(1e9)
    model.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"in fp16: the tensor .* is not finite"):
        pack(str(tmp_path / "wide"), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_pipeline_accepts_its_rounded_autoencoder_and_the_latents_of_the_original(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_SIZE", "1MB")
    pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"command": ["train-diffusion", "latents=/srv/latents"]}))
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "given"), "--to", "checkpoint"]) == 0
    assert len(list((tmp_path / "given" / "unet").glob("*.safetensors"))) > 1
    copy = LatentDiffusionPipeline.from_pretrained(tmp_path / "given", use_safetensors=True)
    record = json.loads((tmp_path / "given" / "conversion.json").read_text())
    assert record["encoder_fingerprint"] == copy.autoencoder.encoder_fingerprint()
    assert copy.config["encoder_fingerprint"] == record["source"]["encoder_fingerprint"]
    assert record["encoder_fingerprint"] == copy.config["rounded_encoders"]["float16"]
    assert json.loads((tmp_path / "given" / "run.json").read_text())["command"] == [
        "train-diffusion",
        "latents=latents",
    ]
    settings = {"labels": ["cat"], "seed": 0, "num_inference_steps": 4, "output_type": "pt"}
    one, other = (each(**settings).images for each in (pipeline, copy))
    assert float(psnr(2 * one - 1, 2 * other - 1)) > 35


def test_a_pipeline_is_given_away_with_a_decoder_that_was_trained_further(pipeline, run, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "pipeline")
    further = load_autoencoder(tmp_path / "pipeline" / "autoencoder")
    with torch.no_grad():
        further.decoder.head.bias.add_(0.25)
    further.save_pretrained(tmp_path / "further")
    words = ["convert", str(tmp_path / "pipeline"), str(tmp_path / "given"), "--to", "checkpoint", "--autoencoder"]
    assert cli.main([*words, str(tmp_path / "further")]) == 0
    given = load_file(tmp_path / "given" / "autoencoder" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(given["decoder.head.bias"], further.decoder.head.bias.half())
    with torch.no_grad():
        further.encoder.head.bias.add_(0.25)
    further.save_pretrained(tmp_path / "foreign")
    words[2] = str(tmp_path / "refused")
    capsys.readouterr()
    assert cli.main([*words, str(tmp_path / "foreign")]) == EXIT_USER_ERROR
    assert "the latents came from sha256:" in capsys.readouterr().err
    assert cli.main(["convert", str(run), str(tmp_path / "no"), *words[3:], str(run)]) == EXIT_USER_ERROR
    assert "not a pipeline" in capsys.readouterr().err


def test_the_runs_of_that_decoder_travel_along_and_the_card_tells_them(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    further = load_autoencoder(tmp_path / "run" / "pipeline" / "autoencoder")
    with torch.no_grad():
        further.decoder.head.bias.add_(0.25)
    folder = tmp_path / "polished"
    further.save_pretrained(folder / "autoencoder")
    (folder / "autoencoder" / "training.json").write_text(json.dumps({"fingerprint": fingerprint(further)}))
    command = ["train-vae", "decoder.yaml", "data.path=/srv/images"]
    (folder / "run.json").write_text(json.dumps({"command": command, "steps": 7}))
    (folder / "config.yaml").write_text("data: {path: /srv/images}\nloss: {mse: 3.0, l1: 1.0}\n")
    source, given = str(tmp_path / "run"), tmp_path / "given"
    pack(source, tmp_path / "plain")
    assert not (tmp_path / "plain" / OF_AUTOENCODER).exists()
    pack(source, given, autoencoder=str(folder))
    (run,) = read_runs(given / OF_AUTOENCODER)
    assert run == {
        "name": "polished",
        "command": ["train-vae", "decoder.yaml", "data.path=images"],
        "steps": 7,
        "settings": {"data.path": "images", "loss.mse": 3.0},
    }
    assert OF_AUTOENCODER in json.loads((given / "MANIFEST.json").read_text())["files"]
    pack(str(given), tmp_path / "copy")
    assert read_runs(tmp_path / "copy" / OF_AUTOENCODER) == [run]
    assert cli.main(["card", str(given)]) == 0
    text = (given / "README.md").read_text()
    assert "trained further. It is what\nthese runs had learned, in this order:\n\n**polished**, " in text
    assert "train-vae decoder.yaml data.path=images\n# not named above, and no defaults: loss.mse=3.0\n```" in text
    assert cli.main(["card", str(tmp_path / "plain")]) == 0
    assert "trained further" not in (tmp_path / "plain" / "README.md").read_text()


def test_options_without_effect_are_refused(run, tmp_path, capsys):
    words = ["convert", str(run), str(tmp_path / "out"), "--to", "checkpoint", "--channels", "2"]
    assert cli.main(words) == EXIT_USER_ERROR
    assert "channels: has no effect with to=checkpoint" in capsys.readouterr().err
