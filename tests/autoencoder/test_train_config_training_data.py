"""What is measured before a training comes from the images that can be read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from ldm_vae import cli
from ldm_vae.autoencoder.train_config import TrainVaeConfig, held_out_part, measured_batches
from ldm_vae.config import load
from ldm_vae.errors import EXIT_USER_ERROR

BROKEN = b"\x89PNG\r\n\x1a\n but no more"


def settings_for(folder: Path, *words: str) -> list[str]:
    return [
        "data.source=folder", f"data.path={folder}", "data.held_out=0.3", "crop.short_side_min=32", *words,
        "phases=[{steps: 2, crop: 32, batch: 2}]", "held_out_resolution=64", f"output={folder.parent / 'run'}",
    ]  # fmt: skip


def test_unreadable_images_are_left_out_of_what_is_measured(image_folder, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    config = load(TrainVaeConfig, None, settings_for(folder))
    all_of_them = len(list(measured_batches(config)))
    for path in sorted((folder / "a").iterdir()):
        path.write_bytes(BROKEN)
    assert 0 < len(list(measured_batches(config))) < all_of_them


def test_enlarged_held_out_images_are_said_and_recorded(image_folder, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    small = load(TrainVaeConfig, None, settings_for(folder, "held_out_images=3"))
    assert held_out_part(small).enlarged == ()
    words = [
        "autoencoder.preset=pico", "training.device=cpu", "training.workers=0", "training.tracker=none",
        "training.preview_every=1000",
    ]  # fmt: skip
    assert cli.main(["train-vae", *settings_for(folder, *words, "held_out_images=3"), "held_out_resolution=96"]) == 0
    assert "held out: 3 of 3 images are smaller than the crop and enlarged" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "autoencoder" / "training.json").read_text())
    assert record["held_out_enlarged"] == 3
    assert "training_crops_enlarged" not in record


def test_enlarged_training_crops_are_said_and_recorded(image_folder, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    words = [
        "autoencoder.preset=pico", "training.device=cpu", "training.workers=0", "training.tracker=none",
        "training.preview_every=1000",
    ]  # fmt: skip
    phases = "phases=[{steps: 2, crop: 88, batch: 2}]"
    assert cli.main(["train-vae", *settings_for(folder, *words), phases]) == 0
    said = re.search(r"training crops, by the held-out images: (\d+) of (\d+) images are", capsys.readouterr().out)
    assert said
    record = json.loads((tmp_path / "run" / "autoencoder" / "training.json").read_text())
    assert record["training_crops_enlarged"] == int(said[1]) == int(said[2]) > 0
    assert "held_out_enlarged" not in record


def test_a_folder_without_a_readable_image_is_refused_in_the_sentence_of_training(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(BROKEN)
    words = ["autoencoder.preset=pico", "autoencoder.linear_path=true", "training.device=cpu", "training.workers=0"]
    assert cli.main(["train-vae", *settings_for(folder, *words)]) == EXIT_USER_ERROR
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "images in a row cannot be read, the last is" in error
    assert "_" not in error.split("the last is")[1].split("(")[1].split(")")[0], "a code, not words"
    assert error.endswith("check that the disk is mounted and the files are images")
