"""`ldm-vae directions`: fit, apply and evaluate on a tiny autoencoder, and one sentence for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae import cli
from ldm_vae.applications.directions.fitting import check_continuous, pool
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from tests.latents.conftest import autoencoder_directory as autoencoder_directory  # a fixture
from tests.latents.conftest import encode as encode  # a fixture
from tests.latents.conftest import latents as latents  # a fixture
from tests.latents.conftest import settings as settings  # a fixture

Words = list[str]


@pytest.fixture(scope="module")
def source(autoencoder_directory: Path, image_folder: Path) -> Words:
    images = ["data.source=folder", f"data.path={image_folder}", "part=all", "resolution=32", "device=cpu"]
    return [f"autoencoder={autoencoder_directory}", *images]


@pytest.fixture(scope="module")
def fitted(source: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("directions") / "fit"
    assert cli.main(["directions", "fit", *source, "attributes_from=[pixels,labels]", f"output={output}"]) == 0
    return output


def refusal(words: Words, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["directions", *words]) == EXIT_USER_ERROR
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("ldm-vae directions ")
    return said


def test_fit_writes_every_method_and_a_table(fitted: Path) -> None:
    described = json.loads((fitted / "directions" / "directions.json").read_text())
    names = [row["name"] for row in described["directions"]]
    assert {"brightness/difference", "brightness/probe", "a/probe", "b/difference", "pca/1", "sefa/3"} <= set(names)
    assert described["images"]["count"] == 24
    assert "| brightness/probe | brightness | R2 " in (fitted / "results.md").read_text()
    assert json.loads((fitted / "run.json").read_text())["finished"]


def test_a_fit_is_not_overwritten_unasked(fitted: Path, source: Words, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds another result" in refusal(["fit", *source, f"output={fitted}"], capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.include=[a/*]", "count=24"], "12 images left, 20 are the least for a direction"),
        (["attributes_from=[scene]"], "scene needs the images of data.source=synthetic"),
        (["attributes_from=[pixels,pixels]"], "'brightness' comes from two places"),
        (["attributes=[age]"], "'age' is unknown; there are: brightness"),
        (["methods=[magic]"], "'magic' is not a method"),
        (["attributes_from=[]", "methods=[probe]"], "add pixels, or the method pca"),
        (["resolution=30"], "use 32"),
    ],
)
def test_what_fit_refuses(
    words: Words, said: str, source: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(["fit", *source, *words, f"output={tmp_path / 'out'}"], capsys)
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_constant_attribute_and_one_class_are_refused(
    source: Words, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(path.relative_to(image_folder).as_posix() for path in image_folder.rglob("*.png"))
    table = tmp_path / "table.csv"
    table.write_text("file,age\n" + "".join(f"{file},7\n" for file in files))
    words = ["fit", *source, f"attributes_from=[{table}]", f"output={tmp_path / 'out'}"]
    assert "'age' is the same in all 24 images (7)" in refusal(words, capsys)
    table.write_text("file,label\n" + "".join(f"{file},cat\n" for file in files))
    assert "'cat' is the same in all 24 images (1)" in refusal(words, capsys)


def test_latents_that_are_not_finite_are_refused() -> None:
    latent = torch.zeros(1, 3, 4, 4)
    latent[0, 1, 2, 2] = torch.nan
    with pytest.raises(UserError, match=r"a\.png: its latent has values that are not finite"):
        pool(latent, "a.png")


def test_an_autoencoder_of_codes_is_refused() -> None:
    coded = build_autoencoder(AutoencoderConfig(preset="pico", kind="fsq"))
    with pytest.raises(UserError, match="autoencoder x: rounds its latents to codes"):
        check_continuous(coded, "autoencoder x")


def test_fit_from_a_set_of_latents(
    latents: Path, autoencoder_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"autoencoder={autoencoder_directory}", f"latents={latents}", "device=cpu", f"output={tmp_path / 'out'}"]
    assert cli.main(["directions", "fit", *words, "attributes_from=[labels,pixels]"]) == 0
    assert "| a/probe | a | AUROC" in capsys.readouterr().out
    said = refusal(["fit", *words, "attributes_from=[scene]", "--overwrite"], capsys)
    assert "scene needs the images" in said
    out = ["--autoencoder", str(autoencoder_directory), "--out", str(tmp_path / "edited"), "--device", "cpu"]
    words = [str(tmp_path / "out"), "pca/1", "--latents", str(latents), "--samples", "3,5", *out]
    assert cli.main(["directions", "apply", *words]) == 0
    assert (tmp_path / "edited" / "000003_+1.00.png").exists()


def test_apply_keeps_sizes_and_names_and_a_strength_of_0_is_the_reconstruction(
    fitted: Path, autoencoder_directory: Path, tmp_path: Path
) -> None:
    for name, size in (("wide", (40, 20)), ("tall", (20, 40))):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    images = [str(tmp_path / "wide.png"), str(tmp_path / "tall.png")]
    words = ["--autoencoder", str(autoencoder_directory), "--device", "cpu"]
    edit = ["brightness", *images, "--strengths=0,4", *words, "--out", str(tmp_path / "edited")]
    assert cli.main(["directions", "apply", str(fitted), *edit]) == 0
    assert cli.main(["reconstruct", str(autoencoder_directory), *images, "--out", str(tmp_path / "plain")]) == 0
    for name, size in (("wide", (40, 20)), ("tall", (20, 40))):
        same = Image.open(tmp_path / "edited" / f"{name}_+0.00.png")
        plain = Image.open(tmp_path / "plain" / f"{name}.png")
        assert same.size == size
        assert np.array_equal(np.array(same), np.array(plain))
        assert not np.array_equal(np.array(Image.open(tmp_path / "edited" / f"{name}_+4.00.png")), np.array(plain))
    assert (tmp_path / "edited" / "sheet.png").exists()
    assert Image.open(tmp_path / "edited" / "wide_strip.png").size == (88, 20)


def test_a_box_changes_its_surroundings_only(fitted: Path, autoencoder_directory: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((128, 128, 3), 90, np.uint8)).save(tmp_path / "gray.png")
    words = ["--autoencoder", str(autoencoder_directory), "--device", "cpu", "--out", str(tmp_path / "edited")]
    words += ["--box", "0,0,32,128", "--feather", "0", "--strengths=0,6"]
    assert cli.main(["directions", "apply", str(fitted), "brightness", str(tmp_path / "gray.png"), *words]) == 0
    plain, moved = (np.array(Image.open(tmp_path / "edited" / f"gray_{s}.png")) for s in ("+0.00", "+6.00"))
    assert np.array_equal(plain[:, 96:], moved[:, 96:])
    assert not np.array_equal(plain[:, :32], moved[:, :32])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "'nonsense' is unknown"),
        (["brightness", "--strengths=one"], "strengths: 'one' is not a number"),
        (["brightness", "--strengths=nan"], "are not numbers up to 20"),
        (["brightness", "--strengths=1,1.001"], "are the same in two digits; leave one out"),
        (["brightness", "--out", "/proc/version"], "output: /proc/version: is a file; give a folder"),
        (["brightness", "--mask", "missing.png"], "mask: missing.png: no such file; give the file of an image"),
        (["brightness", "--box", "1,2,3"], "give left,top,right,bottom"),
        (["brightness", "--box", "0,0,99,9"], "is not a box inside an image of 80 x 96 pixels"),
        (["brightness", "--feather", "1"], "has no effect without a mask or a box"),
        (["brightness", "--mask", "MASK"], "mask: 16 x 16 pixels (height x width) for an image of 96 x 80"),
        (["brightness", "--mask", "MASK", "--box", "0,0,8,8"], "give one of them"),
        (["brightness", "--latents", "docs"], "latents: and images say both what is moved; give one of them"),
        (["brightness", "--samples", "3"], "samples: has no effect without latents"),
    ],
)
def test_what_apply_refuses(
    words: Words, said: str, fitted: Path, autoencoder_directory: Path, image_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    words = [str(tmp_path / "mask.png") if word == "MASK" else word for word in words]
    name, *options = words
    image = str(image_folder / "a" / "000.png")
    place = ["--autoencoder", str(autoencoder_directory), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert said in refusal(["apply", str(fitted), name, image, *place, *options], capsys)


def test_another_autoencoder_is_refused(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    build_autoencoder(AutoencoderConfig(preset="pico", latent_channels=3)).save_pretrained(tmp_path / "other")
    words = ["--autoencoder", str(tmp_path / "other"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    said = refusal(["apply", str(fitted), "brightness", str(tmp_path), *words], capsys)
    assert "but the directions were fitted to" in said
