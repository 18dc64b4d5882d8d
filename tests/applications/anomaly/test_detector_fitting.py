"""Fitting: which images teach and which set thresholds, what is refused, and that a finished detector is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from ldm_vae import cli
from ldm_vae import config as configuration
from ldm_vae.applications.anomaly.detector import FitDetectorConfig, check_detector_folder, fit_detector, load_detector
from ldm_vae.data.split import part_of
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from tests.applications.anomaly.conftest import SYNTHETIC


@pytest.fixture
def plain(autoencoder_directory: Path, tmp_path: Path) -> list[str]:
    """Words of a quick fit."""
    return [f"autoencoder={autoencoder_directory}", "resolution=64", "false_positive_rate=0.1", *SYNTHETIC,
            f"output={tmp_path / 'detector'}"]  # fmt: skip


def run(words: list[str], overwrite: bool = False):
    return fit_detector(configuration.load(FitDetectorConfig, None, words), overwrite=overwrite)


def test_thresholds_come_from_images_that_nothing_was_learnt_from(plain):
    detector = run(plain)
    held_out = sum(part_of(f"synthetic-{i:06d}", 0.4) == "held_out" for i in range(40))
    assert detector.description["counts"] == {"learnt_from": 40 - held_out, "held_out": held_out}
    assert all(len(values) == held_out for values in detector.normal.values())
    assert detector.description["smallest_false_positive_rate"] == 1 / (held_out + 1)
    assert detector.by == "l1_peak"


def test_a_finished_detector_is_read_and_another_one_refused(plain, tmp_path, capsys):
    run(plain)
    before = (tmp_path / "detector" / "detector.safetensors").stat().st_mtime_ns
    run(plain)
    assert (tmp_path / "detector" / "detector.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds the result of count \(null -> 18\)"):
        run([*plain, "count=18"])
    assert run([*plain, "count=18"], overwrite=True).description["counts"]["learnt_from"] == 18
    assert load_detector(tmp_path / "detector").description["counts"]["learnt_from"] == 18
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detector"]  # nothing temporary is left


def test_what_lies_beside_a_detector_is_in_the_way(tmp_path):
    (tmp_path / "detector.json").write_text("{}")
    check_detector_folder(tmp_path)
    (tmp_path / "scores").mkdir()
    with pytest.raises(UserError, match="holds something else; give a new folder"):
        check_detector_folder(tmp_path)


def test_the_command_says_what_so_few_images_support(plain, capsys):
    assert cli.main(["anomaly", "fit", *plain]) == 0
    said = capsys.readouterr().out
    assert "scores with thresholds from" in said
    assert "the verdict is by l1_peak" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.synthetic.count=20"], "normal images to learn from, fewer than 16"),
        (["data.synthetic.defects=0.5"], "a share of 0.5 would have a defect"),
        (["count=5"], "5 normal images to learn from, fewer than 16"),
        (["false_positive_rate=0.01"], "needs 99 held-out normal images, here are"),
        (["held_out_count=4"], "needs 9 held-out normal images, here are 4"),
        (["data.held_out=0"], "is in the held_out part"),
        (["false_positive_rate=1.5"], "is not between 0 and 1"),
        (["by=l1_peek"], "'l1_peek' is not a score here; did you mean l1_peak?"),
        (["by=flow_t0.3"], "it needs pipeline when a detector is fitted"),
        (["resolution=100"], "resolution: 100 is not a multiple of 8; use 96"),
        (["resolution=32"], "resolution: 32 is under 64"),
        (["resolution=128"], "has a short side of 64 pixels, fewer than 128"),
        (["perceptual_weights=pyproject.toml"], "has no effect without perceptual_net"),
        (["regret_steps=-1"], "regret_steps: -1 is not from 0 to 1000"),
        (["output=/proc/version"], "output: /proc/version: is a file; give a folder"),
    ],
)
def test_bad_settings_and_too_few_images_are_one_sentence(plain, words, message, capsys):
    assert cli.main(["anomaly", "fit", *plain, *words]) == EXIT_USER_ERROR
    said = capsys.readouterr().err.strip().replace("\r", "\n").splitlines()[-1]
    assert said.startswith("ldm-vae anomaly fit: ")
    assert message in said


def test_images_of_mixed_size_are_refused_where_some_would_be_enlarged(image_folder, plain, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, path in enumerate(sorted(image_folder.rglob("*.png"))):
        for copy in range(2):
            image = Image.open(path).rotate(180 * copy)
            image.resize((48, 40) if number == 20 else image.size).save(folder / f"{number}-{copy}.png")
    words = [*plain, "data.source=folder", f"data.path={folder}"]
    with pytest.raises(UserError, match=r"20-\d.png has a short side of 40 pixels, fewer than 64"):
        run(words)
    for path in folder.glob("20-*.png"):
        path.unlink()
    assert run(words).description["counts"]["learnt_from"] >= 16


def test_what_cannot_be_read_is_named_and_does_not_count(image_folder, plain, tmp_path):
    folder = tmp_path / "images"
    for angle, copy in enumerate("xyz"):
        shutil.copytree(image_folder, folder / copy)
        for path in (folder / copy).rglob("*.png"):
            Image.open(path).rotate(90 * angle).save(path)
    (folder / "x" / "broken.png").write_bytes(b"no picture")
    detector = run([*plain, "data.source=folder", f"data.path={folder}"])
    assert [entry["id"] for entry in detector.description["rejected"]] == ["x/broken.png"]
    assert sum(detector.description["counts"].values()) == 72


def test_copies_of_what_was_learnt_from_set_no_threshold(image_folder, plain, tmp_path):
    for copy in "xyz":
        shutil.copytree(image_folder, tmp_path / "images" / copy)
    with pytest.raises(UserError, match="held-out normal images, here are"):
        run([*plain, "data.source=folder", f"data.path={tmp_path / 'images'}"])
