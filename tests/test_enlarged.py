"""Images that are smaller than their crop are enlarged: every command counts them, says it, and records it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm_vae import cli
from ldm_vae.applications.explorer.explored import ModelPlace, choose_images, read_image_set
from ldm_vae.data import open_source
from ldm_vae.data.samples import enlarged_record, enlarged_sentences
from ldm_vae.data.sources import DataConfig
from ldm_vae.diffusion.fid import KID_ENLARGED, KidConfig, SampleKid
from ldm_vae.diffusion.posthoc_ema import EmaMeasurement
from tests.diffusion.conftest import autoencoder_directory as autoencoder_directory  # a fixture
from tests.diffusion.conftest import encode as encode  # a fixture
from tests.diffusion.conftest import saved as saved  # a fixture
from tests.diffusion.conftest import settings as settings  # a fixture

SIDE = 96
"""Of the crops, in pixels; the short side of the images of `image_folder` is 80."""

COMMANDS = {
    "reconstruct": ("{vae} {first} resolution=96", "run.json", 1),
    "evaluate": ("{vae} {data} resolution=96 count=3 baseline_images=4 part=all", "results.json", 3),
    "diagnose": ("{vae} {data} resolution=96 count=8 part=all", "health.json", 8),
    "interpolate": ("{first} {second} autoencoder={vae} resolution=96 frames=3", "results.json", 2),
    "demo": ("{first} autoencoder={vae} model={pipeline} resolution=96 count=1 steps=1", "results.json", 1),
    "generate": ("{pipeline} init={first} resolution=96 count=1 steps=2", "run.json", 1),
    "codec bench": ("{vae} {data} resolution=96 count=2 part=all codecs=[JPEG]", "results.json", 2),
    "directions fit": ("{vae} {data} resolution=96 count=20 part=all", "directions/directions.json", 20),
    "directions apply": (
        "{directions} brightness {first} autoencoder={vae} resolution=96 strengths=[0.0]", "run.json", 1,
    ),
    "directions evaluate": (
        "{directions} autoencoder={vae} {data} resolution=96 count=20 part=all names=[brightness]", "results.json", 20,
    ),
}  # fmt: skip
"""Command -> its words, the file with the record, and how many of its images are enlarged."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, saved: Path) -> dict[str, str]:
    """What the words of a command stand for."""
    vae, fitted = saved / "autoencoder", tmp_path_factory.mktemp("directions") / "fit"
    data = f"data.source=folder data.path={image_folder} device=cpu"
    words = ["directions", "fit", f"autoencoder={vae}", *data.split(), "part=all", "resolution=64"]
    assert cli.main([*words, f"output={fitted}"]) == 0
    first, second = (str(image_folder / folder / name) for folder, name in (("a", "000.png"), ("b", "001.png")))
    return {
        "vae": str(vae), "pipeline": str(saved), "directions": str(fitted), "data": data, "first": first,
        "second": second,
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_counts_says_and_records_enlarged_images(
    command: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, file, count = COMMANDS[command]
    assert cli.main([*command.split(), *words.format(**places).split(), f"output={tmp_path / 'out'}"]) == 0
    assert f"{enlarged_sentences([80] * count, count)[0]}\n" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / file).read_text())
    found = record["images"] if command == "directions fit" else record
    assert [image["short_side"] for image in found["enlarged"]] == [80] * count
    page = tmp_path / "out" / "index.html"
    assert not page.exists() or "smaller than the crop and enlarged" in page.read_text()
    assert str(tmp_path) not in json.dumps(found["enlarged"])


def test_images_of_the_right_size_are_not_reported(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reconstruct", places["vae"], places["first"], "resolution=80", f"output={tmp_path / 'out'}"]
    assert cli.main(words) == 0
    assert "enlarged" not in capsys.readouterr().out
    assert "enlarged" not in json.loads((tmp_path / "out" / "run.json").read_text())
    assert (enlarged_sentences([], 3), enlarged_record([])) == ([], {})
    assert enlarged_sentences([80], 2)[0].startswith(
        "1 of 2 images is smaller than the crop and enlarged, which blurs it"
    )


def test_the_explorer_says_it(image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_image_set(choose_images(str(image_folder), [ModelPlace(None, None)], 4, SIDE), 4, SIDE)
    assert "data: 4 of 4 images are smaller than the crop and enlarged" in caplog.text


def test_a_set_of_latents_says_it(encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(tmp_path / "set", "resolution=96") == 0
    words = ["latents", "stats", str(tmp_path / "set"), f"output={tmp_path / 'page'}"]
    assert cli.main(words) == 0
    assert "24 images smaller than the crop" in capsys.readouterr().out
    assert "24 images smaller than the crop" in (tmp_path / "page" / "index.html").read_text()
    assert json.loads((tmp_path / "page" / "stats.json").read_text())["images_enlarged"] == 24


class Samples:
    """A pipeline of gray images."""

    device = torch.device("cpu")
    labels = ()

    def image_size(self) -> tuple[int, int]:
        return 16, 24

    def __call__(self, labels: None, num_images: int, **_: object) -> tuple[Tensor]:
        return (torch.rand(num_images, 3, 16, 24, generator=torch.Generator().manual_seed(0)),)


class Means(nn.Module):
    """The mean of each channel, in the place of Inception's features."""

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (images.float().mean(dim=(2, 3)) / 255,)


def test_the_kid_of_samples_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(100):
        side = 12 if number < 30 else 24
        Image.new("RGB", (side, side), (2 * number, 0, 0)).save(tmp_path / f"{number:03d}.png")
    config = KidConfig(samples=100, data=DataConfig(source="folder", path=str(tmp_path)))
    with caplog.at_level(logging.WARNING):
        metrics = SampleKid(config, open_source(config.data), Means())(Samples())  # type: ignore[arg-type]
    assert metrics[KID_ENLARGED] == 30
    assert "held-out images: 30 of 100 images are smaller than the crop" in caplog.text
    assert "enlarged" not in EmaMeasurement(None, None, metrics | {"held_out/flow": 1.0}).sentence()
