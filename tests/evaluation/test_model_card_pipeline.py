"""The card of a pipeline: what the run recorded, what its author saw, and what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from ldm_vae import cli
from ldm_vae.errors import EXIT_USER_ERROR
from ldm_vae.files import write_checksums
from tests.diffusion.conftest import saved as saved  # a fixture

RUN = {
    "command": ["ldm-vae", "train-diffusion", "latents=latents"],
    "started": "2026-01-02T03:04:05+00:00",
    "seconds": 3600.0,
    "versions": {"ldm_vae": "0.1.0", "commit": "0123456789ab", "machine": "Abacus 1, 2 cores"},
    "finished": True,
    "steps": 120,
    "metrics": {"held_out/flow": 0.75, "samples/copy_rate": 0.0},
    "processes": 1,
    "device": "cpu",
    "precision": "bf16",
}


@pytest.fixture
def given(saved: Path, tmp_path: Path) -> Path:
    """A pipeline as `convert --to checkpoint` leaves it."""
    folder = tmp_path / "animals"
    shutil.copytree(saved, folder)
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "config.yaml").write_text("latents: latents\nunet: {preset: tiny}\nbatch: 4\nheld_out: 0.1\n")
    lines = [{"step": step, "loss/flow": 1 / step, "held_out/flow": 1 / step} for step in range(1, 20)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    write_checksums(folder)
    return folder


def test_a_complete_card(given, tmp_path, capsys):
    samples = tmp_path / "samples"
    samples.mkdir()
    Image.new("RGB", (2000, 1000)).save(samples / "sheet.png")
    parameters = {"seed": 3, "steps": 20, "sampler": "euler", "guidance": 3.0}
    (samples / "run.json").write_text(json.dumps({"parameters": parameters, "images": 16}))
    (tmp_path / "seen.md").write_text("Cats have two ears in 14 of 16.")
    (tmp_path / "credits.yaml").write_text("- {name: cats, images: 5, licence: CC0, credits: A. Person}")
    words = [
        "card",
        str(given),
        "--pictures",
        str(samples),
        "--seen",
        str(tmp_path / "seen.md"),
        "--license",
        "cc0-1.0",
    ]
    words += ["--data-credits", str(tmp_path / "credits.yaml"), "--intended-use", "To look at.", "--not-for", "Proof."]
    assert cli.main(words) == 0
    assert "not recorded" not in capsys.readouterr().out
    text = (given / "README.md").read_text()
    for expected in (
        "# animals\n",
        "64x64 images from noise, without text; 3 classes",
        'image = pipeline("cat", seed=0).images[0]\n```',
        "| cats | 5 | CC0 | A. Person |",
        "| commit | 0123456789ab |",
        "ldm-vae train-diffusion latents=latents",
        "1.00 hours x 2 cores x 10 W = 0.020 kWh",
        "![Training curves: Flow loss](curves.svg)",
        "| held_out/flow | 0.75 |",
        "on the 10% of the latents that training never sees",
        "16 samples, none chosen: seed 3, 20 steps of euler, guidance 3.",
        "Cats have two ears in 14 of 16.",
        "Not good for: Proof.",
    ):
        assert expected in text, expected
    assert ModelCard(text).data.license == "cc0-1.0"
    with Image.open(given / "samples.webp") as sheet:
        assert sheet.size == (1600, 800)
    assert ' width="403" height="288"' in (given / "curves.svg").read_text()  # one panel does not fill the page
    assert cli.main(words) == 0  # its own card it writes anew
    assert cli.main(["card", str(given), "--license", "cc0-1.0"]) == EXIT_USER_ERROR
    assert "README.md: states the intended use, credits of the data, pictures, what was " in capsys.readouterr().err
    other = {"parameters": parameters | {"unet": ["xxh3_128:0"]}, "images": 16}
    (samples / "run.json").write_text(json.dumps(other))
    assert cli.main(words) == EXIT_USER_ERROR
    assert "was made with another unet" in capsys.readouterr().err


def test_what_is_missing_is_said_and_what_is_for_autoencoders_refused(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "bare")
    assert cli.main(["card", str(tmp_path / "bare")]) == 0  # replaces the card that saving wrote
    assert "not recorded: the intended use, credits of the data, how it was trained" in capsys.readouterr().out
    text = (tmp_path / "bare" / "README.md").read_text()
    assert "## Training\n\nNot recorded.\n\n## Figures\n\nNot measured.\n\n## Samples\n\nNone shown." in text
    assert cli.main(["card", str(tmp_path / "bare"), "--health", "docs"]) == EXIT_USER_ERROR
    assert "--health: is about autoencoders" in capsys.readouterr().err
    assert cli.main(["card", str(tmp_path / "bare"), "--pictures", str(tmp_path)]) == EXIT_USER_ERROR
    assert "holds no sheet of `ldm-vae generate`" in capsys.readouterr().err
    (tmp_path / "bare" / "README.md").write_bytes(b"mine, \xe9t\xe9")
    assert cli.main(["card", str(tmp_path / "bare")]) == EXIT_USER_ERROR
    assert "was not written by this command" in capsys.readouterr().err
