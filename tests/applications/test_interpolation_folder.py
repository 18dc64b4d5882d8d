"""`ldm-vae interpolate`: the folder, and one sentence for what cannot be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm_vae import cli
from ldm_vae.applications.interpolation import animated, find_pairs, read_pairs
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.errors import EXIT_USER_ERROR
from tests.diffusion.conftest import saved as saved  # a fixture
from tests.latents.conftest import autoencoder_directory as autoencoder_directory  # a fixture


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another autoencoder."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("plain")
    build_autoencoder(AutoencoderConfig(preset="pico", latent_channels=2, kind="ae")).save_pretrained(path)
    return path


def pictures(folder: Path, numbers: list[int]) -> list[str]:
    return [str(folder / "ab"[number % 2] / f"{number:03d}.png") for number in numbers]


def test_a_folder_of_pairs_beside_another_autoencoder(
    autoencoder_directory: Path, plain: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["interpolate", str(image_folder), "--pairs", "3", "--autoencoder", str(autoencoder_directory)]
    words += ["--compare", str(plain), "--frames", "5", "--prior", "2", "--device", "cpu", "--out", str(out)]
    assert cli.main(words) == 0
    assert "latents of the other" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert list(results["config"]) == [  # records of every version have this order
        "autoencoder", "images", "pipeline", "compare", "frames", "size", "steps", "strength", "prior", "seed",
        "animation",
    ]  # fmt: skip
    assert [way["key"] for way in results["ways"]] == ["pixels", "latents", "other"]
    assert (results["protocol"]["pairs"], len(results["pairs"]), len(results["prior"])) == (3, 3, 6)
    assert results["other"]["deterministic"]
    assert results["differences"]["end_psnr_db"]["mean"] != 0
    name = results["pairs"][0]["name"]
    assert len(list((out / "frames" / name).glob("latents_*.png"))) == 5
    with Image.open(out / f"{name}_other.webp") as animation:
        assert getattr(animation, "n_frames", 1) > 1  # equal frames are joined
        assert animation.size == (80, 96)
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width == 2 * 16 + 5 * (80 + 8) - 8  # a row for each way, its five frames
    assert (out / "prior.png").exists()
    page = (out / "index.html").read_text()
    assert page.count("data:image/webp") == 2 + 3  # two sheets, an animation for each pair
    assert "two autoencoders" in page
    before = (out / "results.json").stat().st_mtime_ns
    assert cli.main(words) == 0  # finished: read, not redone
    assert (out / "results.json").stat().st_mtime_ns == before
    assert cli.main([*words[:-1], str(out), "--frames", "7"]) == EXIT_USER_ERROR
    assert "holds the result of frames" in capsys.readouterr().err
    assert cli.main([*words, "--frames", "3", "--overwrite"]) == 0
    assert len(list((out / "frames" / name).glob("latents_*.png"))) == 3
    words += ["--frames", "3"]
    torch.manual_seed(2)
    build_autoencoder(AutoencoderConfig(preset="pico", latent_channels=2, kind="ae")).save_pretrained(plain)
    assert cli.main(words) == EXIT_USER_ERROR
    assert "holds the result of another compare; give another output, or --overwrite" in capsys.readouterr().err


def test_long_names_and_names_that_are_no_utf_8(tmp_path: Path) -> None:
    for letter in (b"a", b"b"):
        Image.new("RGB", (16, 16)).save(tmp_path / os.fsdecode(b"\xff" + 100 * letter + b".png"))
    (pair,) = read_pairs(find_pairs([str(tmp_path)], None), None, [])
    assert pair.name == "00_\\xff" + 36 * "a" + "_\\xff" + 36 * "b"


def test_through_a_diffusion_model(saved: Path, image_folder: Path, tmp_path: Path) -> None:
    words = ["--pipeline", str(saved), "--frames", "3", "--steps", "2", "--size", "64", "--prior", "1"]
    words += ["--animation", "gif", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main(["interpolate", *pictures(image_folder, [0, 1]), *words]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [way["key"] for way in results["ways"]] == ["pixels", "latents", "inverted", "noised"]
    assert results["prior"][-1]["title"] == "diffusion model"
    assert len(list((tmp_path / "out").glob("*.gif"))) == 5
    assert "diffusion, 60% noised" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("numbers", "words", "said"),
    [
        ([0], [], "one image; give two, or a folder"),
        ([0, 1, 2], [], "3 images make no pairs; give an even number, or a folder"),
        ([0, 1], ["--pairs", "2"], "2 pairs of 2 images; give at most 1"),
        ([0, 1], ["--frames", "4"], "frames: 4 is not odd"),
        (
            [0, 1],
            ["--strength", "0", "--pipeline", "checkpoints/ldm-emoji-512"],
            "strength: 0.0 is not a share above 0",
        ),
        ([0, 1], ["--compare", "none"], "compare: none: no such folder"),
        ([0, 1], ["--size", "8"], "resolution: 8 is below 16 pixels"),
        ([0, 1], ["--prior", "-1"], "prior: -1 is negative"),
    ],
)
def test_what_it_refuses(
    numbers: list[int], words: list[str], said: str, autoencoder_directory: Path, image_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    place = ["--autoencoder", str(autoencoder_directory), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main(["interpolate", *pictures(image_folder, numbers), *place, *words]) == EXIT_USER_ERROR
    assert said in capsys.readouterr().err


def test_images_of_two_sizes_and_no_autoencoder_and_another_one_are_refused(
    autoencoder_directory: Path, saved: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    images = [*pictures(image_folder, [0]), str(tmp_path / "small.png")]
    place = ["--device", "cpu", "--out", str(tmp_path / "out")]
    words = ["interpolate", *images, *place]
    assert cli.main([*words, "--autoencoder", str(autoencoder_directory)]) == EXIT_USER_ERROR
    assert "64 x 64 pixels, " in (said := capsys.readouterr().err)
    assert "bring all to one size with size" in said
    assert cli.main(words) == EXIT_USER_ERROR
    assert "give autoencoder, or a pipeline with its own" in capsys.readouterr().err
    both = ["--autoencoder", str(autoencoder_directory), "--pipeline", str(saved)]
    assert cli.main([*words, *both, "--size", "64"]) == EXIT_USER_ERROR
    assert "is not the one of the pipeline" in capsys.readouterr().err


def test_pairs_of_a_folder_are_not_neighbors(image_folder: Path) -> None:
    """Folders of classes would give pairs of one class."""
    found = find_pairs([str(image_folder)], 12)
    assert len(set(found)) == 24
    assert all((first.parent.name, second.parent.name) == ("a", "b") for first, second in zip(found[::2], found[1::2]))
    assert find_pairs([str(image_folder)], None) == found


def test_an_animation_goes_there_and_back_and_rests(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), (80 * k, 0, 0)) for k in range(3)]
    (tmp_path / "a.webp").write_bytes(animated(frames, "webp"))
    with Image.open(tmp_path / "a.webp") as animation:
        assert animation.info["loop"] == 0
        reds = []
        for number in range(getattr(animation, "n_frames", 1)):
            animation.seek(number)
            reds.append(animation.convert("RGB").getpixel((8, 8))[0])  # type: ignore[index]
    rounded = [round(red / 80) for red in reds]
    assert [red for red, before in zip(rounded, [None, *rounded]) if red != before] == [0, 1, 2, 1]
