"""Files of every format as an earlier release wrote them must open, and those of a newer one be refused with advice.

The set of latents has its own test beside its golden files (`tests/latents/test_golden.py`). `make_golden.py` made
these; `FIGURES` was noted down on that day.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_vae import config as configuration
from ldm_vae.autoencoder.lineage import read_record
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.posthoc_ema import stored_averages, synthesize_ema
from ldm_vae.diffusion.training import TrainDiffusionConfig
from ldm_vae.errors import UserError
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.encode import EncodeConfig
from ldm_vae.training.checkpoint import newest, read_checkpoint
from tests.training import toy

GOLDEN = Path(__file__).parent / "golden"
LATENTS = Path(__file__).parent / "latents" / "golden"
MOST_BYTES = 200_000

FIGURES = {
    "latent": [-0.02386529, 0.15388367, 0.07027744, -0.13641742],
    "image": [0.37671795, 0.48254779, 1.0, 0.0],
    "average": [1.83829479, 0.08006275, 1.76420462, 1.87461114],
    "weight": [-0.01057136, 0.11505121, 0.04453869, 0.07066631],
}


def unpacked(name: str, folder: Path) -> Path:
    """A golden folder, copied to a place where it may be changed."""
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder / name


def picture() -> torch.Tensor:
    """(1, 3, 32, 32) in [-1, 1]."""
    ramp = torch.linspace(-1, 1, 32)
    return torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), 0.5 * (ramp[:, None] * ramp)])[None]


def figures_of(tensor: torch.Tensor) -> list[float]:
    """Four numbers of it."""
    flat = tensor.detach().double().flatten()
    return [float(flat.mean()), float(flat.std()), float(flat[0]), float(flat[-1])]


def near(found: torch.Tensor, name: str) -> bool:
    return figures_of(found) == pytest.approx(FIGURES[name], abs=2e-3)


@pytest.mark.promise(12)
def test_an_old_autoencoder_opens(tmp_path, record_property):
    folder = unpacked("autoencoder", tmp_path)
    model = load_autoencoder(folder)
    assert fingerprint(model) == read_record(folder)["fingerprint"]
    assert near(model.encode_moments(picture())[0], "latent")
    record_property("figure", "an autoencoder of format 1: the same fingerprint and latents")


@pytest.mark.promise(12)
def test_an_old_pipeline_opens_and_generates(tmp_path, record_property):
    pipeline = LatentDiffusionPipeline.from_pretrained(unpacked("pipeline", tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.labels == ["cat", "dog"]
    images = pipeline("dog", seed=0, num_inference_steps=4, output_type="pt").images
    assert near(images, "image")
    record_property("figure", "a pipeline of format 1: the same image for a seed")


@pytest.mark.promise(12)
def test_an_old_run_continues(tmp_path, capsys, record_property):
    run = unpacked("run", tmp_path)
    saved = read_checkpoint(newest(run / "checkpoints")[0])
    assert (saved.step, sorted(saved.tensors)) == (10, ["net", "net-ema", "net-optimizer"])
    assert near(saved.tensors["net-ema"]["0.weight"], "weight")
    assert toy.main(str(run), "steps=12") == 0
    assert "continuing from step 10" in capsys.readouterr().out
    assert newest(run / "checkpoints")[0].name == "step-000000012"
    record_property("figure", "a run of format 1 continues from its checkpoint")


@pytest.mark.promise(12)
def test_old_averages_open(tmp_path, record_property):
    unpacked("snapshots", tmp_path)
    assert list(stored_averages(tmp_path / "snapshots")) == [
        (step, rel) for step in (2, 4, 6, 8) for rel in (0.05, 0.1)
    ]
    assert near(synthesize_ema(tmp_path, 0.07).weights["weight"], "average")
    record_property("figure", "averages of format 1: the same weights")


@pytest.mark.promise(12)
@pytest.mark.parametrize(
    ("name", "schema", "expected"),
    [
        ("train-vae", TrainVaeConfig, {"output": "runs/golden", "training.learning_rate": 3e-4, "steps": None}),
        ("encode", EncodeConfig, {"output": "latents", "resolution": "96"}),
        ("train-diffusion", TrainDiffusionConfig, {"latents": "latents", "unet.preset": "small"}),
    ],
)
def test_old_settings_load(name, schema, expected, record_property):
    text = (GOLDEN / f"{name}.yaml").read_text()
    assert text.startswith("format_version: 1\n")
    config = configuration.to_dict(configuration.load(schema, GOLDEN / f"{name}.yaml"))
    for key, value in expected.items():
        found = config
        for part in key.split("."):
            found = found.get(part, None)
        assert value is None or found == value, key
    record_property("figure", f"settings of {name} of format 1 load")


def as_newer(path: Path) -> None:
    """The same file with another format version."""
    text = path.read_text()
    changed = re.sub(r"(\"?format_version\"?: )\d+", r"\g<1>99", text, count=1)
    assert changed != text
    path.write_text(changed)


def newer_latents(folder: Path) -> Callable[[], object]:
    copy = shutil.copytree(LATENTS, folder / "set")
    as_newer(copy / "manifest.json")
    return lambda: LatentDataset(copy)


def newer_autoencoder(folder: Path) -> Callable[[], object]:
    copy = unpacked("autoencoder", folder)
    as_newer(copy / "MANIFEST.json")
    return lambda: load_autoencoder(copy)


def newer_pipeline(folder: Path) -> Callable[[], object]:
    copy = unpacked("pipeline", folder)
    as_newer(copy / "MANIFEST.json")
    return lambda: LatentDiffusionPipeline.from_pretrained(copy)


def newer_checkpoint(folder: Path) -> Callable[[], object]:
    copy = unpacked("run", folder)
    as_newer(copy / "checkpoints" / "step-000000010" / "MANIFEST.json")
    return lambda: toy.main(str(copy))


def newer_averages(folder: Path) -> Callable[[], object]:
    path = unpacked("snapshots", folder) / "step-000000004.safetensors"
    record = {"format_version": 99, "what": "nobody knows"}
    save_file(load_file(path), path, {"snapshot": json.dumps(record)})
    return lambda: synthesize_ema(folder, 0.07)


def newer_settings(folder: Path) -> Callable[[], object]:
    copy = Path(shutil.copy(GOLDEN / "encode.yaml", folder))
    as_newer(copy)
    return lambda: configuration.load(EncodeConfig, copy)


@pytest.mark.promise(12)
@pytest.mark.parametrize(
    "make", [newer_latents, newer_autoencoder, newer_pipeline, newer_checkpoint, newer_averages, newer_settings]
)
def test_a_newer_format_is_refused_with_advice(make, tmp_path, record_property):
    use = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"has format version 99, this program reads \d.*update ldm_vae"):
        use()
    assert [path for path in before if not path.exists()] == []  # nothing of the newer one was touched
    record_property("figure", f"{make.__name__.replace('_', ' ')} refused")


def test_the_golden_files_stay_small():
    files = [path for folder in (GOLDEN, LATENTS) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
