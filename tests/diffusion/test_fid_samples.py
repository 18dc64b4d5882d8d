"""KID of samples: lower for a right model than for a wrong one, refused where it would be noise, logged in training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm_vae import cli
from ldm_vae.data import open_source
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.split import part_of, subset
from ldm_vae.diffusion.fid import KidConfig, SampleKid, make_sample_kid
from ldm_vae.diffusion.posthoc_ema import PosthocEmaConfig, sample_kid_of
from ldm_vae.diffusion.training import DiffusionModel, TrainDiffusionConfig
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.training.watchdog import Watchdog

HELD_OUT = 0.5


class Colours(nn.Module):
    """Mean and spread of each channel of 8-bit images: features in the place of Inception's."""

    def forward(self, images: Tensor) -> tuple[Tensor]:
        assert images.dtype == torch.uint8
        values = images.float().flatten(2) / 255
        return (torch.cat([values.mean(-1), values.std(-1)], dim=1),)


class Uniform:
    """A pipeline whose images have one colour each, around `shade`."""

    device = torch.device("cpu")
    labels = ("dark", "light")

    def __init__(self, shade: float) -> None:
        self.shade = shade
        self.asked: list[str] = []

    def image_size(self) -> tuple[int, int]:
        return 8, 12

    def __call__(self, labels: list[str], generator: list[torch.Generator], **_: Any) -> Any:
        self.asked += labels
        shades = [self.shade + 0.1 * torch.randn((), generator=one) for one in generator]
        images = torch.stack([torch.full((3, 8, 12), float(shade)).clamp(0, 1) for shade in shades])
        return (images,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 pictures of one colour each, around 0.5."""
    folder = tmp_path_factory.mktemp("images")
    for number, shade in enumerate(np.random.default_rng(0).normal(0.5, 0.1, 240).clip(0, 1)):
        Image.new("RGB", (12, 8), (round(255 * shade),) * 3).save(folder / f"{number:03d}.png")
    return folder


def data(folder: Path) -> DataConfig:
    return DataConfig(source="folder", path=str(folder))


def test_the_right_distribution_is_nearer_than_a_wrong_one(folder: Path) -> None:
    config = KidConfig(samples=120, data=data(folder))
    images = subset(open_source(config.data), "held_out", HELD_OUT)
    judge = SampleKid(config, images, Colours())
    right, wrong = Uniform(0.5), Uniform(0.8)
    found, far = judge(right), judge(wrong)
    assert found.keys() == {"samples/kid@120", "samples/kid@120_std", "samples/kid_floor"}
    assert right.asked == ["dark", "light"] * 60
    assert abs(found["samples/kid@120"]) < 0.05 < far["samples/kid@120"]
    assert abs(found["samples/kid_floor"]) < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as around a validation
        assert judge(right) == found
    assert {part_of(images.id(number), HELD_OUT) for number in range(len(images))} == {"held_out"}
    assert judge.real is not None
    assert len(judge.real) == len(images) < 240


def test_a_long_measurement_is_no_standstill(folder: Path) -> None:
    """Every few images count as a sign of life: the whole may take hours, more than a process has alone."""
    config = KidConfig(samples=100, data=data(folder))
    judge = SampleKid(config, subset(open_source(config.data), "held_out", HELD_OUT), Colours())

    class Slow(Uniform):
        def __call__(self, labels: list[str], generator: list[torch.Generator], **named: Any) -> Any:
            stood.append(dog._still_seconds)
            dog._still_seconds = 1000.0
            return super().__call__(labels, generator, **named)

    stood: list[float] = []
    with Watchdog(SimpleNamespace(process_index=0, num_processes=1), timeout_seconds=1000) as dog:
        judge(Slow(0.5))
    assert len(stood) == 7
    assert max(stood) < 500


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kid.samples=50"], "KID of 50 images would be noise; give 100 or more"),
        (["kid.samples=100", "held_out=0"], "needs held-out images"),
        (["kid.samples=100", "kid.every=70"], "kid.every: 70 is not a multiple of training.validate_every=500"),
        (["kid.every=0"], "kid.every: 0 is below 1"),
        (["kid.subset=1"], "kid.subset: 1 is too few"),
    ],
)
def test_a_kid_that_says_nothing_is_refused(overrides: list[str], message: str) -> None:
    from ldm_vae import config as configuration

    with pytest.raises(UserError, match=message):
        configuration.load(TrainDiffusionConfig, None, ["output=x", "latents=x", "autoencoder=x", *overrides])


def test_few_images_and_missing_weights_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"kid: \d+ images are held out, too few for a KID, which needs 100"):
        make_sample_kid(KidConfig(samples=100, data=data(folder)), held_out=0.1)
    missing = KidConfig(samples=100, data=data(folder), inception_weights=str(folder / "none.pth"))
    with pytest.raises(UserError, match="no such file"):
        make_sample_kid(missing, held_out=HELD_OUT)


def test_it_is_due_at_the_end_and_when_asked_for() -> None:
    assert [step for step in range(1, 11) if KidConfig(samples=100).due(step, 10)] == [10]
    assert [step for step in range(1, 11) if KidConfig(samples=100, every=4).due(step, 10)] == [4, 8, 10]


def test_training_measures_when_it_is_due(
    latents: Path, autoencoder_directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the command hands in is called with a pipeline of the EMA weights, and its figures are logged."""
    from ldm_vae import config as configuration
    from ldm_vae.diffusion.training import open_latents, ordered_samples
    from ldm_vae.training.run_directory import RunDirectory
    from ldm_vae.training.trainer import fit, make_accelerator

    words = [
        f"output={tmp_path}", f"latents={latents}", f"autoencoder={autoencoder_directory}", "unet.preset=tiny",
        "unet.widths=[32]", "steps=5", "batch=4", "held_out=0.3", "neighbours=0", "kid.samples=100", "kid.every=2",
        "training.validate_every=1", "training.precision=fp32", "training.workers=0", "training.device=cpu",
        "training.tracker=none", "training.log_every=1", "ema.snapshots=0",
    ]  # fmt: skip
    config = configuration.load(TrainDiffusionConfig, None, words)
    seen: list[Any] = []
    samples, held_out = open_latents(config)
    model = DiffusionModel(
        config, samples, held_out, None, lambda pipeline: seen.append(pipeline) or {"samples/kid@100": 0.25}
    )
    accelerator = make_accelerator(config.training)
    run = RunDirectory(config.output, config, main_process=True)
    assert fit(model, ordered_samples(config, samples), config.plan(1), config.training, run, accelerator) == 0
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "samples/kid@100" in line] == [2, 4, 5]
    assert seen[0].labels == list(samples.manifest.label_names)
    last = next(line for line in logged if line["step"] == 5 and "train/epochs" in line)
    assert last["train/epochs"] == pytest.approx(20 / len(samples))
    assert "samples/kid@100 0.25" in (tmp_path / "pipeline" / "README.md").read_text()
    assert f"epochs of {len(samples)} latents; the held-out loss was best at" in capsys.readouterr().out
    compare = PosthocEmaConfig(str(tmp_path), [0.1], kid=100, images=str(folder), device="cpu")
    with pytest.raises(UserError, match="kid: "):  # the run holds other ids out than the 100 that a KID needs
        sample_kid_of(compare)
    words = [*words[1:], f"output={tmp_path / 'other'}", "kid.data.source=folder", f"kid.data.path={folder}"]
    assert cli.main(["train-diffusion", *words]) == EXIT_USER_ERROR
    assert "images are held out, too few for a KID, which needs 100" in capsys.readouterr().err


def test_averages_are_compared_by_it_after_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert cli.main(["ema", str(tmp_path), "--length", "0.1", "--images", str(tmp_path)]) == EXIT_USER_ERROR
    assert "have no effect with" in capsys.readouterr().err
