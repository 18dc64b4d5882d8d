"""A folder of generated images: complete, repeatable, resumable, never overwritten unasked; sheets; the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_vae import cli
from ldm_vae.data.sheets import label_cycle, labelled_sheet
from ldm_vae.diffusion.generation import PNG_KEY, GenerationConfig, generate
from ldm_vae.errors import UserError


def config(saved: Path, **changes: object) -> GenerationConfig:
    return GenerationConfig(**({"model": str(saved), "count": 4, "steps": 2} | changes))  # type: ignore[arg-type]


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob("[0-9]*.png")}


def test_every_class_in_turn(saved: Path, tmp_path: Path) -> None:
    made, speed = generate(config(saved), tmp_path / "out", batch=3)
    assert made == 4
    assert speed > 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000_cat.png", "0001_dog.png", "0002_red-ball.png", "0003_cat.png", "run.json", "sheet.png"]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"]
    assert record["images"] == 4
    image = Image.open(tmp_path / "out" / "0002_red-ball.png")
    assert image.size == (64, 64)
    parameters = json.loads(image.text[PNG_KEY])  # type: ignore[attr-defined]
    assert parameters["label"] == "red ball"
    assert parameters["index"] == 2
    assert {key: parameters[key] for key in ("seed", "steps", "guidance", "height")} == {
        "seed": 0, "steps": 2, "guidance": 3.0, "height": 64,
    }  # fmt: skip
    assert str(saved) not in image.text[PNG_KEY]  # type: ignore[attr-defined]


def test_the_same_call_completes_a_folder(saved: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    generate(config(saved), whole)
    generate(config(saved), broken, batch=1)
    assert generate(config(saved), broken)[0] == 0
    (broken / "0001_dog.png").unlink()
    kept = (broken / "0000_cat.png").stat().st_mtime_ns
    assert generate(config(saved), broken)[0] == 1
    assert (broken / "0000_cat.png").stat().st_mtime_ns == kept
    expected, found = pixels(whole), pixels(broken)
    assert expected.keys() == found.keys()
    for name, image in expected.items():
        assert np.abs(image - found[name]).max() <= 1, name


def test_chosen_labels_size_and_precision(saved: Path, tmp_path: Path) -> None:
    chosen = config(saved, labels=("Cat", "2"), height=48, width=80, guidance=1.0, precision="bf16", count=3)
    generate(chosen, tmp_path)
    assert sorted(pixels(tmp_path)) == ["0000_cat.png", "0001_red-ball.png", "0002_cat.png"]
    assert pixels(tmp_path)["0000_cat.png"].shape == (48, 80, 3)


def test_other_results_are_not_overwritten_unasked(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(config(saved), out)
    with pytest.raises(UserError, match=r"holds other images.*seed 0 -> 1"):
        generate(config(saved, seed=1), out)
    before = pixels(out)
    generate(config(saved, seed=1, count=2), out, overwrite=True)
    assert len(pixels(out)) == 2
    assert np.abs(pixels(out)["0000_cat.png"] - before["0000_cat.png"]).max() > 1
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="no result of `generate`"):
        generate(config(saved), foreign)


def test_wrong_settings_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'dog'"):
        generate(config(saved, labels=("dg",)), tmp_path)
    with pytest.raises(UserError, match="height: 60"):
        generate(config(saved, height=60), tmp_path)
    with pytest.raises(UserError, match="1 images for 2 labels"):
        config(saved, labels=("cat", "dog"), count=1)
    with pytest.raises(UserError, match="no such directory"):
        generate(config(saved, model="nowhere"), tmp_path)
    with pytest.raises(UserError, match=r"holds no model_index\.json"):
        generate(config(tmp_path), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_run_directory_stands_for_its_pipeline(saved: Path, tmp_path: Path) -> None:
    generate(config(saved.parent, count=1), tmp_path)
    assert (tmp_path / "0000_cat.png").exists()


def test_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    words = ["generate", str(saved), "--out", out, "--label", "dog", "--count", "2", "--steps", "1", "--size", "32x64"]
    assert cli.main(words) == 0
    assert "images/s" in capsys.readouterr().out
    assert sorted(pixels(tmp_path / "out")) == ["0000_dog.png", "0001_dog.png"]
    assert pixels(tmp_path / "out")["0000_dog.png"].shape == (32, 64, 3)
    assert cli.main(words) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert cli.main([*words[:-1], "big"]) == 2
    assert "--size: 'big' is no size" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_the_same_images(saved: Path, tmp_path: Path) -> None:
    generate(config(saved), tmp_path / "one", device="cpu")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ldm_vae.cli"]
    words = ["generate", str(saved), "--out", str(tmp_path / "two"), "--count", "4", "--steps", "2", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *words], check=True, timeout=240, env=environment)
    one, two = pixels(tmp_path / "one"), pixels(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(np.abs(one[name] - two[name]).max() <= 1 for name in one)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["finished"]


def test_sheets() -> None:
    pictures = [Image.new("RGB", (40, 20), (index * 20, 0, 0)) for index in range(6)]
    columns = labelled_sheet(pictures, ["a", "b", "c"] * 2)
    named = labelled_sheet(pictures, ["a", "a", "b", "b", "c", "c"])
    plain = labelled_sheet(pictures)
    assert plain.width == named.width == columns.width
    assert plain.height < columns.height < named.height
    assert labelled_sheet(pictures, side=20).width < plain.width


@pytest.mark.parametrize(
    ("labels", "cycle"),
    [("abcabca", 3), ("aabb", 0), ("aaaa", 0), ("abcdefghijkl", 0), ("ab", 2), ("abcba", 0), ("", 0)],
)
def test_label_cycle(labels: str, cycle: int) -> None:
    assert label_cycle(list(labels), longest=10) == cycle
