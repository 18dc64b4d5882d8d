"""A folder of generated images: complete, repeatable, resumable, never overwritten unasked; sheets; the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae import cli
from ldm_vae.diffusion import generation
from ldm_vae.diffusion.generation import PNG_KEY, GenerateConfig, GenerationResult, generate
from ldm_vae.errors import UserError
from ldm_vae.utils.image_grid import label_cycle, labeled_sheet
from tests.diffusion import late
from tests.diffusion.conftest import make_pipeline


def config(saved: Path, **changes: object) -> GenerateConfig:
    return GenerateConfig(**({"model": str(saved), "count": 4, "steps": 2} | changes))  # type: ignore[arg-type]


def make(config: GenerateConfig, output: Path, *, overwrite: bool = False, **changes: Any) -> GenerationResult:
    return generate(replace(config, output=str(output), **changes), overwrite=overwrite)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob("[0-9]*.png")}


def test_every_class_in_turn(saved: Path, tmp_path: Path) -> None:
    result = make(config(saved), tmp_path / "out", batch=3)
    assert (result.made, result.images, result.copies) == (4, 4, None)
    assert result.images_per_second > 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000_cat.png", "0001_dog.png", "0002_red-ball.png", "0003_cat.png", "run.json", "sheet.png"]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert list(record["parameters"]) == [  # records of every version have this order
        "labels", "count", "seed", "steps", "sampler", "guidance", "guidance_interval", "guidance_rescale",
        "autoguidance", "grid", "interpolate", "init", "strength", "mask", "height", "width", "precision",
        "evaluations", "unet", "autoencoder",
    ]  # fmt: skip
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


def test_class_names_longer_than_file_names(tmp_path: Path) -> None:
    labels = ["a" * 300, "a" * 299 + "b", "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 100]
    make_pipeline(labels).save_pretrained(tmp_path / "long" / "pipeline")
    settings = config(tmp_path / "long", count=3)
    assert make(settings, tmp_path / "out").made == 3
    names = sorted(path.name for path in (tmp_path / "out").glob("0*.png"))
    assert len(names) == 3
    found = [json.loads(Image.open(tmp_path / "out" / name).text[PNG_KEY])["label"] for name in names]  # type: ignore[attr-defined]
    assert found == labels
    assert make(settings, tmp_path / "out").made == 0  # they are found again


def test_the_same_call_completes_a_folder(saved: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make(config(saved), whole)
    make(config(saved), broken, batch=1)
    assert make(config(saved), broken).made == 0
    (broken / "0001_dog.png").unlink()
    kept = (broken / "0000_cat.png").stat().st_mtime_ns
    assert make(config(saved), broken).made == 1
    assert (broken / "0000_cat.png").stat().st_mtime_ns == kept
    expected, found = pixels(whole), pixels(broken)
    assert expected.keys() == found.keys()
    for name, image in expected.items():
        assert np.array_equal(image, found[name]), name


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_the_batch_changes_no_bit(saved: Path, tmp_path: Path, sampler: str) -> None:
    folders = [tmp_path / str(batch) for batch in (1, 2, 3, 7)]
    for folder, batch in zip(folders, (1, 2, 3, 7)):
        make(config(saved, count=7, sampler=sampler), folder, batch=batch)
    first, *others = map(pixels, folders)
    assert len(first) == 7
    for other in others:
        assert first.keys() == other.keys()
        assert all(np.array_equal(image, other[name]) for name, image in first.items())


def test_chosen_labels_size_and_precision(saved: Path, tmp_path: Path) -> None:
    chosen = config(saved, labels=("Cat", "2"), size="48x80", guidance=1.0, precision="bf16", count=3)
    make(chosen, tmp_path)
    assert sorted(pixels(tmp_path)) == ["0000_cat.png", "0001_red-ball.png", "0002_cat.png"]
    assert pixels(tmp_path)["0000_cat.png"].shape == (48, 80, 3)


def test_other_results_are_not_overwritten_unasked(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(config(saved), out)
    with pytest.raises(UserError, match=r"holds other images.*seed 0 -> 1"):
        make(config(saved, seed=1), out)
    before = pixels(out)
    make(config(saved, seed=1, count=2), out, overwrite=True)
    assert len(pixels(out)) == 2
    assert np.abs(pixels(out)["0000_cat.png"] - before["0000_cat.png"]).max() > 1
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not a result of `generate`"):
        make(config(saved), foreign)


def test_wrong_settings_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'dog'"):
        make(config(saved, labels=("dg",)), tmp_path)
    with pytest.raises(UserError, match="height: 60"):
        make(config(saved, size="60"), tmp_path)
    with pytest.raises(UserError, match="1 image for 2 labels"):
        config(saved, labels=("cat", "dog"), count=1)
    with pytest.raises(UserError, match="no such folder"):
        make(config(saved, model="nowhere"), tmp_path)
    with pytest.raises(UserError, match="is empty; give a finished run"):
        make(config(tmp_path), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_devices_and_folders_that_are_not_there_are_refused(saved: Path, tmp_path: Path) -> None:
    for name in ("foo", "meta:x") + (() if torch.cuda.is_available() else ("cuda", "cuda:1")):
        with pytest.raises(UserError, match=f"device: '{name}' is not available"):
            make(config(saved), tmp_path / "out", device=name)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; give a folder"):
        make(config(saved), tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        make(config(saved, count=1), tmp_path / "file" / "out")
    with pytest.raises(UserError, match="count: 0 is not positive"):
        config(saved, count=0)


def parameters(path: Path) -> dict[str, Any]:
    return json.loads(Image.open(path).text[PNG_KEY])  # type: ignore[attr-defined]


def test_a_grid_of_labels_from_equal_noise(saved: Path, tmp_path: Path) -> None:
    make(config(saved, grid=True, count=2, labels=("cat", "dog")), tmp_path / "grid")
    found = pixels(tmp_path / "grid")
    assert sorted(found) == ["0000_cat.png", "0001_dog.png", "0002_cat.png", "0003_dog.png"]
    make(config(saved, count=2, labels=("dog",)), tmp_path / "dogs")
    dogs = pixels(tmp_path / "dogs")
    assert np.array_equal(found["0001_dog.png"], dogs["0000_dog.png"])
    assert np.array_equal(found["0003_dog.png"], dogs["0001_dog.png"])
    assert parameters(tmp_path / "grid" / "0003_dog.png")["noise"] == {
        "seed": 0, "number": 1, "towards": None, "share": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match="give two labels or more"):
        make(config(saved, grid=True, labels=("cat",)), tmp_path / "one")


def test_interpolation_of_seeds_and_labels(saved: Path, tmp_path: Path) -> None:
    seeds, labels = tmp_path / "seeds", tmp_path / "labels"
    make(config(saved, interpolate=("3", "5"), labels=("dog",), count=3), seeds)
    between = pixels(seeds)
    for seed, name in ((3, "0000_dog.png"), (5, "0002_dog.png")):
        make(config(saved, labels=("dog",), count=1, seed=seed), tmp_path / str(seed))
        assert np.array_equal(between[name], pixels(tmp_path / str(seed))["0000_dog.png"])
    assert not np.array_equal(between["0001_dog.png"], between["0000_dog.png"])
    make(config(saved, interpolate=("cat", "dog"), count=3), labels)
    assert sorted(pixels(labels)) == ["0000_cat-100.png", "0001_cat-50.png", "0002_cat-0.png"]
    assert parameters(labels / "0001_cat-50.png")["classes"] == {"cat": 0.5, "dog": 0.5}
    make(config(saved, labels=("cat",), count=1), tmp_path / "cat")
    assert np.array_equal(pixels(labels)["0000_cat-100.png"], pixels(tmp_path / "cat")["0000_cat.png"])


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of 128 x 64 pixels."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8))
    smooth.resize((128, 64), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_variations_of_an_image(saved: Path, photo: Path, tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    given = {"init": str(photo), "labels": ("cat",), "count": 2, "steps": 8}
    make(config(saved, **given, strength=0.1), near)
    make(config(saved, **given), far)
    assert parameters(near / "0000_cat.png")["evaluations"] == 1
    assert parameters(far / "0000_cat.png")["evaluations"] == 5
    assert parameters(far / "0000_cat.png")["strength"] == 0.6
    assert "photo" not in json.dumps(parameters(far / "0000_cat.png"))
    found = pixels(near)
    assert not np.array_equal(found["0000_cat.png"], found["0001_cat.png"])
    assert make(config(saved, **given), far).made == 0
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photo)
    with pytest.raises(UserError, match=r"holds other images .*init"):
        make(config(saved, **given), far)


@pytest.mark.parametrize("kind", ["0 and 255", "0 and 1", "white on transparent"])
def test_painting_where_a_mask_is_white(saved: Path, photo: Path, tmp_path: Path, kind: str) -> None:
    mask = np.zeros((64, 128), dtype=np.uint8)
    mask[16:48, 40:80] = 1 if kind == "0 and 1" else 255
    on_white = np.dstack([np.full((64, 128), 255, np.uint8), mask])
    Image.fromarray(on_white if kind == "white on transparent" else mask).save(tmp_path / "mask.png")
    given = {"init": str(photo), "mask": str(tmp_path / "mask.png"), "labels": ("cat",), "count": 1}
    make(config(saved, **given), tmp_path / "out")
    found = pixels(tmp_path / "out")["0000_cat.png"]
    original = np.asarray(Image.open(photo))[:, 32:96]  # the centre, 64 x 64
    kept = mask[:, 32:96] == 0
    assert np.array_equal(found[kept], original[kept])
    assert not np.array_equal(found[~kept], original[~kept])


def test_a_mask_of_nothing_is_reported_once(saved: Path, photo: Path, tmp_path: Path, caplog: Any) -> None:
    Image.new("L", (128, 64)).save(tmp_path / "mask.png")
    make(config(saved, init=str(photo), mask=str(tmp_path / "mask.png"), count=2, batch=1), tmp_path / "out")
    assert [one.getMessage() for one in caplog.records].count("mask: marks nothing, so that nothing changes") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "ddim"}, "choose one of euler, heun"),
        ({"guidance_interval": (1.0, 0.5)}, "give the lower time first"),
        ({"autoguidance": 2.0}, "needs a second U-Net"),
        ({"interpolate": ("1", "2")}, "give one label"),
        ({"interpolate": ("cat", "Cat")}, "'cat' twice"),
        ({"interpolate": ("cat", "dog"), "labels": ("cat",)}, "leave labels out"),
        ({"init": "nowhere.png"}, r"init: nowhere\.png: no such file"),
        ({"init": __file__}, "cannot be read"),
        ({"guidance": float("nan")}, "guidance_scale: nan is not a finite number"),
        ({"guidance": 1.0, "guidance_rescale": 0.7}, "guidance_rescale: 0.7 has no effect without guidance"),
        ({"guidance_rescale": 1.5}, "guidance_rescale: 1.5 is not between 0 and 1"),
    ],
)
def test_impossible_wishes_leave_no_folder(saved: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(config(saved, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 0.5}, "strength: has no effect without an image"),
        ({"mask": "m.png"}, "mask: has no effect without an image"),
        ({"grid": True, "interpolate": ("1", "2")}, "give one of them"),
    ],
)
def test_settings_that_contradict_each_other(saved: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(saved, **changes)


@pytest.mark.parametrize(
    ("guidance", "words"), [(0.0, "at 0 the label is not used,"), (-1.0, "at -1 the label is avoided,")]
)
def test_a_label_without_effect_in_the_names_is_said(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, guidance: float, words: str
) -> None:
    make(config(saved, guidance=guidance, count=1, steps=1), tmp_path / "out")
    assert f"guidance: {words} though the images are named after it; 1 is the label alone" in caplog.text
    caplog.clear()
    make(config(saved, guidance=0.5, count=1, steps=1), tmp_path / "other")
    assert not caplog.text


def test_a_run_directory_stands_for_its_pipeline(saved: Path, tmp_path: Path) -> None:
    make(config(saved.parent, count=1), tmp_path)
    assert (tmp_path / "0000_cat.png").exists()


def test_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    words = ["generate", str(saved), "--out", out, "--label", "dog", "--count", "2", "--steps", "1", "--size", "32x64"]
    assert cli.main(words) == 0
    assert " s each)" in capsys.readouterr().out
    assert sorted(pixels(tmp_path / "out")) == ["0000_dog.png", "0001_dog.png"]
    assert pixels(tmp_path / "out")["0000_dog.png"].shape == (32, 64, 3)
    assert cli.main(words) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert cli.main([*words[:-1], "big"]) == 2
    assert "resolution: 'big' is not a size" in capsys.readouterr().err


def test_command_with_everything(saved: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, words = tmp_path / "out", ["generate", str(saved), "--steps", "2", "--device", "cpu"]
    sampling = ["--sampler", "heun", "--guidance", "2", "--guidance-interval", "0.1", "0.8"]
    assert cli.main([*words, *sampling, "--grid", "--count", "1", "--out", str(out)]) == 0
    found = parameters(out / "0000_cat.png")
    assert (found["sampler"], found["evaluations"], found["guidance_interval"]) == ("heun", 4, [0.1, 0.8])
    start = ["--init", str(photo), "--strength", "0.5", "--label", "cat", "--count", "1"]
    assert cli.main([*words, *start, "--out", str(tmp_path / "edited")]) == 0
    assert cli.main([*words, "--interpolate", "cat", "dog", "--count", "2", "--out", str(tmp_path / "between")]) == 0
    assert capsys.readouterr().out.count("images/s") == 3
    assert cli.main([*words, "--mask", str(photo), "--out", str(tmp_path / "none")]) == 2


def test_the_nearest_training_latents_beside_a_sheet(
    saved: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's own pictures, encoded by its own autoencoder, are the training set; one more is new."""
    out, encoded = tmp_path / "out", tmp_path / "encoded"
    make(config(saved, count=6), out)
    source = tmp_path / "source"
    source.mkdir()
    for path in sorted(out.glob("000[0-4]*.png")):
        (source / path.name).write_bytes(path.read_bytes())
    words = [f"autoencoder={saved / 'autoencoder'}", f"output={encoded}", "data.source=folder", f"data.path={source}"]
    assert cli.main(["encode", *words, "resolution=64", "workers=0", "precision=fp32"]) == 0
    capsys.readouterr()
    assert make(config(saved, count=6), out, neighbours=str(encoded)).made == 0
    assert "neighbours.png: 5 of 6 images are copies of one of 5 training latents" in capsys.readouterr().out
    record = json.loads((out / "run.json").read_text())
    assert (record["copies"], record["compared_images"], record["compared_latents"]) == (5, 6, 5)
    assert Image.open(out / "neighbours.png").height > Image.open(out / "sheet.png").height
    with pytest.raises(UserError, match="the encoder sha256"):
        make(config(saved, count=6), out, neighbours=str(latents))
    with pytest.raises(UserError, match="latents of 4 x 4 cannot be compared with 8 x 8; leave out the size"):
        make(config(saved, count=1, size="32x32"), tmp_path / "small", neighbours=str(encoded))


@pytest.mark.slow
def test_two_processes_make_the_same_images(saved: Path, tmp_path: Path) -> None:
    make(config(saved), tmp_path / "one", device="cpu")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ldm_vae.cli"]
    words = ["generate", str(saved), "--out", str(tmp_path / "two"), "--count", "4", "--steps", "2", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *words], check=True, timeout=240, env=environment)
    one, two = pixels(tmp_path / "one"), pixels(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["finished"]


@pytest.mark.slow
def test_shares_do_not_depend_on_when_a_process_looks(saved: Path, tmp_path: Path) -> None:
    """Where each process listed the folder itself, the late one left out what the other had made meanwhile."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", late.__file__]
    out, answers = tmp_path / "out", tmp_path / "answers"
    answers.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(late.__file__).parents[2])}
    subprocess.run([*launch, str(saved), str(out), str(answers)], check=True, timeout=240, env=environment)
    assert len(pixels(out)) == 6
    assert [path.read_text() for path in sorted(answers.iterdir())] == ["True 3", "True 3"]
    assert json.loads((out / "run.json").read_text())["finished"]


def test_an_image_that_is_not_there_is_not_called_finished(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = generation.save_png
    monkeypatch.setattr(generation, "save_png", lambda *words: write(*words) if words[1].index != 2 else None)
    with pytest.raises(UserError, match=r"1 of the 4 images is missing, 0002_\S+ among them; run the same command"):
        make(config(saved, count=4), tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "run.json").read_text())["finished"]
    monkeypatch.undo()
    assert make(config(saved, count=4), tmp_path / "out").made == 1


def test_sheets() -> None:
    pictures = [Image.new("RGB", (40, 20), (index * 20, 0, 0)) for index in range(6)]
    columns = labeled_sheet(pictures, ["a", "b", "c"] * 2)
    named = labeled_sheet(pictures, ["a", "a", "b", "b", "c", "c"])
    plain = labeled_sheet(pictures)
    assert plain.width == named.width == columns.width
    assert plain.height < columns.height < named.height
    assert labeled_sheet(pictures, side=20).width < plain.width


@pytest.mark.parametrize(
    ("labels", "cycle"),
    [("abcabca", 3), ("aabb", 0), ("aaaa", 0), ("abcdefghijkl", 0), ("ab", 2), ("abcba", 0), ("", 0)],
)
def test_label_cycle(labels: str, cycle: int) -> None:
    assert label_cycle(list(labels), longest=10) == cycle
