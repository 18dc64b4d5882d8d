"""The whole chain through the command line, tiny: train, encode, train, generate, reconstruct, evaluate, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm_vae import cli
from ldm_vae.errors import EXIT_USER_ERROR

DATA = ["data.source=synthetic", "data.synthetic.count=60", "data.synthetic.resolution=64"]
TRAINING = [
    "training.precision=fp32", "training.workers=0", "training.log_every=2", "training.warmup_steps=1",
    "training.device=cpu", "training.tracker=none",
]  # fmt: skip
UNET = ["unet.preset=tiny", "unet.widths=[32,64]", "steps=4", "batch=4"]


def run(*words: str) -> None:
    """A command in this process, under its own name: the records quote `sys.argv`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ldm-vae", *words])
        assert cli.main(list(words)) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run root with every stage finished, as the quickstart leaves it."""
    root = tmp_path_factory.mktemp("chain")
    phases = "phases=[{steps: 4, crop: 32, batch: 4}]"
    run("train-vae", *DATA, *TRAINING, phases, "autoencoder.preset=pico", "held_out_resolution=64",
        f"output={root / 'vae'}")  # fmt: skip
    autoencoder = f"autoencoder={root / 'vae'}"
    run("encode", *DATA, autoencoder, f"output={root / 'latents'}", "resolution=64", "workers=0", "shard_size=16")
    words = [autoencoder, f"latents={root / 'latents'}", *UNET, f"output={root / 'diffusion'}"]
    run("train-diffusion", *TRAINING, *words)
    run("generate", str(root / "diffusion"), "--count", "10", "--steps", "2", "--out", str(root / "samples"))
    run("evaluate", *DATA, autoencoder, "resolution=64", "count=4", f"output={root / 'evaluation'}")
    run("report", str(root))
    return root


def test_every_stage_leaves_its_record(root):
    for stage in ("vae", "latents", "diffusion", "samples", "evaluation"):
        record = json.loads((root / stage / "run.json").read_text())
        assert record["finished"], stage
        assert record["seconds"] > 0


def test_the_pipeline_generates_one_image_of_each_class(root):
    names = sorted(path.name for path in (root / "samples").glob("0*.png"))
    assert names[0] == "0000_ball.png"
    assert len(names) == 10
    assert Image.open(root / "samples" / names[0]).size == (64, 64)


def test_diffusion_logs_its_loss_and_a_preview(root):
    lines = [json.loads(line) for line in (root / "diffusion" / "metrics.jsonl").read_text().splitlines()]
    assert "loss/flow" in lines[0]
    assert "held_out/flow" in lines[-1]
    assert list((root / "diffusion" / "previews").glob("*.webp"))


def test_the_report_is_one_self_contained_page(root):
    page = (root / "report.html").read_text()
    for word in ("train-vae", "encode", "train-diffusion", "generate", "evaluate", "ball", "data:image/"):
        assert word in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="/' not in page


def test_a_finished_chain_is_left_alone(root, capsys):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    words = [f"autoencoder={root / 'vae'}", f"latents={root / 'latents'}", *UNET, f"output={root / 'diffusion'}"]
    run("train-diffusion", *TRAINING, *words)
    assert "this run is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before


def test_another_autoencoder_than_that_of_the_latents_is_refused(root, tmp_path, capsys):
    phases = "phases=[{steps: 1, crop: 16, batch: 1}]"
    run("train-vae", *DATA, *TRAINING, phases, "autoencoder.preset=pico", "autoencoder.latent_channels=8",
        "held_out_resolution=64", f"output={tmp_path / 'other'}")  # fmt: skip
    words = [f"autoencoder={tmp_path / 'other'}", f"latents={root / 'latents'}", f"output={tmp_path / 'diffusion'}"]
    capsys.readouterr()
    assert cli.main(["train-diffusion", *TRAINING, *words]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "its encoder has the fingerprint sha256:" in error
    assert "encode again with this one" in error
    assert not (tmp_path / "diffusion").exists()


def test_reconstruct_keeps_the_size_of_any_image(root, tmp_path):
    Image.new("RGB", (61, 45), (200, 30, 30)).save(tmp_path / "odd.png")
    run("reconstruct", str(root / "vae"), str(tmp_path / "odd.png"), "--out", str(tmp_path / "out"))
    made = [path for path in (tmp_path / "out").rglob("*.png") if "odd" in path.name]
    assert made
    assert any(Image.open(path).size == (61, 45) for path in made)
