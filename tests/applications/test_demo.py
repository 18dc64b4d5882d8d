"""`ldm-vae demo`: one page with everything in it, made once, and one sentence where the models are not there."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm_vae import cli
from ldm_vae.applications import demo
from ldm_vae.applications.codec.compression import open_codec
from ldm_vae.applications.demo import demo_sentences
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.errors import EXIT_USER_ERROR
from tests.diffusion.conftest import saved as saved  # a fixture


@pytest.fixture
def checkpoints(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both models under the names that are looked for; the current folder is the one above."""
    folder = tmp_path / "checkpoints"
    torch.manual_seed(0)
    build_autoencoder(AutoencoderConfig(preset="pico")).save_pretrained(folder / demo.AUTOENCODER)
    shutil.copytree(saved, folder / demo.PIPELINE)
    monkeypatch.chdir(tmp_path)
    return folder


def test_images_and_samples_on_one_page_made_once(checkpoints, image_folder, tmp_path, capsys):
    words = ["demo", str(image_folder / "a"), "--size", "64", "--count", "4", "--steps", "2", "--device", "cpu"]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    out = tmp_path / "demo"
    results = json.loads((out / "results.json").read_text())
    keys = ["autoencoder", "pipeline", "images", "count", "size", "steps", "seed", "precision"]
    assert list(results["config"]) == keys  # records of every version have this order
    assert len(results["images"]) == 12
    first = results["images"][0]
    assert (first["raw_bytes"], first["latent_bytes"]) == (64 * 64 * 3, 2 * 4 * 8 * 8)
    (file,) = out.glob("compressed/00_*")
    assert first["file_bytes"] == file.stat().st_size
    decoded = open_codec(str(checkpoints / demo.AUTOENCODER)).decompress_file(file)
    with Image.open(next(out.glob("reconstructions/00_*.png"))) as picture:
        assert picture.tobytes() == decoded.tobytes()
    assert first["rate_bits_per_pixel"] > 0
    assert first["jpeg_psnr_db"] is None  # no JPEG of 64 pixels has so few bytes
    page = (out / "index.html").read_text()
    assert page.count("data:image/webp;base64,") == 2 * 12 + 4
    assert not re.search(r"""(src|href)=["'](https?:|//|/)|url\(""", page)
    assert 'href="../checkpoints/ldm-emoji-512/README.md"' in page  # saving wrote one; the autoencoder has none
    assert page.count("README.md") == 1
    assert str(tmp_path) not in page
    with Image.open(out / "demo.webp") as sheet:
        assert sheet.width == 2 * 16 + 8 * (64 + 8) - 8  # two rows of eight originals, two of what they decode to, one
    assert "demo/index.html" in told
    assert "images/s" in told
    before = (out / "results.json").stat().st_mtime_ns
    assert cli.main(words) == 0  # finished: read, not redone
    assert (out / "results.json").stat().st_mtime_ns == before
    assert cli.main([*words, "--steps", "3"]) == EXIT_USER_ERROR
    assert "holds the result of steps (2 -> 3)" in capsys.readouterr().err
    assert cli.main(["demo", *words[2:]]) == EXIT_USER_ERROR
    assert re.search(r"images \(12 files, xxh3_128:[0-9a-f]{32} -> synthetic\); give", capsys.readouterr().err)


def test_interrupted_it_continues_and_another_pipeline_is_no_result_of_it(checkpoints, tmp_path, capsys):
    words = ["demo", "--size", "32", "--count", "3", "--steps", "1", "--device", "cpu", "--precision", "fp32"]
    assert cli.main(words) == 0
    out = tmp_path / "demo"
    results = json.loads((out / "results.json").read_text())
    assert (results["bundled"], results["rejected"], len(results["images"])) == (True, [], demo.BUNDLED)
    shown = [results["images"][0] | {"jpeg_psnr_db": number} for number in (20.0, 30.0, None)]
    told = " ".join(demo_sentences(results | {"images": shown[:2]}))
    assert "JPEG files of as many bytes: 25.0 dB." in told
    assert "(1 step, fp32)" in told
    assert "JPEG can be as small for 2 of the 3 images only." in " ".join(demo_sentences(results | {"images": shown}))
    kept, lost = out / "samples" / "0000_cat.png", out / "samples" / "0002_red-ball.png"
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    for path in (out / "run.json", out / "results.json", lost):
        path.unlink()
    assert cli.main(words) == 0
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == content
    weights = next((checkpoints / demo.PIPELINE / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    assert cli.main(words) == EXIT_USER_ERROR
    assert "holds the result of another pipeline; give another output, or --overwrite" in capsys.readouterr().err


def test_without_the_models_it_says_where_they_are_looked_for(tmp_path, monkeypatch, capsys, image_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm_vae.__file__", str(tmp_path / "site" / "ldm_vae" / "__init__.py"))
    assert cli.main(["demo", str(image_folder)]) == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert "checkpoints/vae-f8c4-nano: is neither in this folder nor in " in told
    assert "autoencoder=DIR" in told
    assert not (tmp_path / "demo").exists()


def test_images_that_cannot_be_read_are_left_out_and_said(checkpoints, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "torn.png").write_bytes(b"\x89PNG")
    words = ["demo", "in", "--size", "32", "--count", "1", "--steps", "1", "--device", "cpu"]
    assert cli.main(words) == EXIT_USER_ERROR
    assert "torn.png: cannot be read" in capsys.readouterr().err
    Image.new("RGB", (40, 40), "red").save(tmp_path / "in" / "whole.png")
    os.mkfifo(tmp_path / "in" / "pipe.png")  # nobody writes into it: reading would wait for ever
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "Left out: 2 images that could not be read: " in told
    page = (tmp_path / "demo" / "index.html").read_text()
    assert "1 image from noise" in page
    for said in ("pipe.png (is no regular file", "torn.png (none of JPEG, PNG, "):  # name and reason
        assert said in told
        assert said in page
    Image.new("RGB", (40, 40), "red").save(tmp_path / (250 * "x" + ".png"))
    words[1] = 250 * "x" + ".png"
    assert cli.main([*words, "--overwrite", "--output", "demo"]) == 0  # as `compress` calls it
    assert [path.name for path in (tmp_path / "demo").glob("reconstructions/*")] == [f"00_{50 * 'x'}.png"]
    capsys.readouterr()
    assert cli.main([*words, "--size", "5000"]) == EXIT_USER_ERROR
    assert "resolution: 5000 is not between 16 and 4096 pixels" in capsys.readouterr().err
    assert cli.main([*words, "--count", "0"]) == EXIT_USER_ERROR
    assert "count: 0 is not positive" in capsys.readouterr().err


def test_of_many_images_some_are_taken_from_all_over(tmp_path):
    for number in range(30):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number:02d}.png")
    names = [name for name, _ in demo.find_images([str(tmp_path)])]
    assert len(names) == demo.MOST_IMAGES
    assert names[0] == "00"
    assert names[-1] == "29"
