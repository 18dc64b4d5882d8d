"""Nothing grows: memory and file handles stay level over many epochs, steps and images; a large set opens at once."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.index import write_set
from ldm_vae import config as configuration
from ldm_vae.data.folder import FolderSource
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.training.loader import Plan, Span
from ldm_vae.training.run_directory import RunDirectory
from ldm_vae.training.trainer import fit, make_accelerator
from tests.diffusion.conftest import make_pipeline
from tests.latents.conftest import autoencoder_directory, encode, latents, settings  # noqa: F401
from tests.training.toy import ToyConfig, ToyModel, ToySamples

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")

LIBC = ctypes.CDLL(None)
MEASUREMENTS = 24
"""Of which the first half warms up: caches fill, the allocator finds its size."""
STEPS_OF_EIGHT_HOURS = 28_800
"""At one step a second."""


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What is there before is not looked through again at every measurement."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def resident_megabytes() -> float:
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):  # else what is free but kept counts, and comes and goes
        LIBC.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@dataclass(frozen=True)
class Growth:
    """How much more there was at the end of the second half of the measurements than at its beginning."""

    megabytes: float
    handles: int

    def check(self, most_megabytes: float) -> str:
        assert self.handles <= 0, f"{self.handles} more file handles"
        assert self.megabytes < most_megabytes, f"{self.megabytes:.1f} MB more"
        return f"{max(0.0, self.megabytes):.1f} MB and {max(0, self.handles)} file handles more after a warm-up"


def growth_of(memory: list[float], handles: list[int]) -> Growth:
    """From a straight line through the second half, so that one odd measurement does not decide.

    The slope is the median of those between all pairs (Theil and Sen).
    """
    half = np.array(memory[len(memory) // 2 :])
    slopes = [(half[j] - half[i]) / (j - i) for i, j in itertools.combinations(range(len(half)), 2)]
    return Growth(float(np.median(slopes)) * (len(half) - 1), handles[-1] - handles[len(handles) // 2])


def grown(work: Callable[[int], object], measurements: int = MEASUREMENTS) -> Growth:
    """Call `work(number)` again and again, and measure after each call."""
    memory, handles = [], []
    for number in range(measurements):
        work(number)
        memory.append(resident_megabytes())
        handles.append(open_files())
    return growth_of(memory, handles)


def test_growth_is_seen():
    kept, files = [], []

    def leak(number: int) -> None:
        kept.append(bytearray(os.urandom(1 << 20)))
        for block in kept:
            block[::4096]  # in use, so that the system keeps every page in memory
        files.append(open(os.devnull))  # noqa: SIM115 - never closed, on purpose

    found = grown(leak)
    assert 8 < found.megabytes < 16  # of 11
    assert found.handles == MEASUREMENTS // 2 - 1
    with pytest.raises(AssertionError, match="more file handles"):
        found.check(100)
    with pytest.raises(AssertionError, match="MB more"):
        Growth(found.megabytes, 0).check(4)
    assert Growth(-1.0, 0).check(1) == "0.0 MB and 0 file handles more after a warm-up"
    for file in files:
        file.close()


@pytest.mark.promise(10)
def test_a_set_of_a_million_samples_opens_in_under_a_second(tmp_path, record_property):
    write_set(tmp_path, 1_000_000, 256)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        dataset = LatentDataset(tmp_path)
        seconds.append(time.perf_counter() - started)
    assert len(dataset) == 1_000_000
    assert dataset.locate(999_999) == (3906, 63)
    assert min(seconds) < 1
    record_property("figure", f"a set of 1,000,000 samples in 3,907 shards opens in {1000 * min(seconds):.0f} ms")


@pytest.mark.promise(10)
@pytest.mark.parametrize("epochs", [48, pytest.param(1000, marks=pytest.mark.slow)])
def test_reading_for_many_epochs_takes_no_more(latents, epochs, monkeypatch, record_property):  # noqa: F811
    """With two shards open at most, so that each epoch opens and closes all six."""
    dataset = LatentDataset(latents)
    dataset._most_open = 2
    each, total = -(-epochs // MEASUREMENTS), 0

    def read(number: int) -> None:
        nonlocal total
        for epoch in range(number * each, (number + 1) * each):
            dataset.set_epoch(epoch)
            for batch in DataLoader(dataset, batch_size=6, shuffle=True):
                total += len(batch["latent"])

    said = grown(read).check(4)
    assert total == each * MEASUREMENTS * len(dataset)
    record_property("figure", f"{each * MEASUREMENTS} epochs of reading a set: {said}")


@pytest.mark.promise(10)
@pytest.mark.slow
def test_loading_processes_that_come_and_go_leave_nothing(latents, image_folder, record_property):  # noqa: F811
    source = FolderSource(image_folder)

    def read(number: int) -> None:
        for _ in DataLoader(LatentDataset(latents), batch_size=6, num_workers=2):
            pass
        for index in range(len(source)):
            source.read(index)

    said = grown(read).check(4)
    record_property("figure", f"{MEASUREMENTS} epochs with two loading processes, and images decoded: {said}")


class Measured(ToyModel):
    """The toy, which measures this process from time to time as it trains."""

    def __init__(self, config: ToyConfig, every: int) -> None:
        super().__init__(config)
        self.every, self.memory, self.handles = every, [], []

    def update(self, step, batch, engine):
        if step % self.every == 0:
            self.memory.append(resident_megabytes())
            self.handles.append(open_files())
        return super().update(step, batch, engine)

    def validate(self, engine):
        return {"held_out/nothing": 0.0}


@pytest.mark.promise(10)
@pytest.mark.parametrize("steps", [240, pytest.param(STEPS_OF_EIGHT_HOURS, marks=pytest.mark.slow)])
def test_a_long_training_takes_no_more(tmp_path, steps, record_property):
    """With everything that a training does now and then: logs, TensorBoard, validation, checkpoints."""
    often = steps // MEASUREMENTS
    words = [
        f"output={tmp_path / 'run'}",
        f"steps={steps}",
        "training.tracker=tensorboard",
        f"training.log_every={often // 10}",
    ]
    words += [f"training.{name}={often}" for name in ("save_every", "validate_every", "preview_every")]
    config = configuration.load(ToyConfig, None, words)
    accelerator = make_accelerator(config.training, tmp_path / "run")
    model = Measured(config, often)
    plan = Plan((Span(config.steps, config.batch, config.micro),))
    assert fit(model, ToySamples(), plan, config.training, RunDirectory(config.output, config), accelerator) == 0
    assert len(model.memory) == MEASUREMENTS
    said = growth_of(model.memory, model.handles).check(4)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == steps
    record_property("figure", f"{steps:,} training steps with {MEASUREMENTS} checkpoints: {said}")


@pytest.mark.promise(10)
@pytest.mark.parametrize("images", [48, pytest.param(240, marks=pytest.mark.slow)])
def test_generating_images_of_many_sizes_takes_no_more(images, record_property):
    pipeline = make_pipeline(["cat", "dog"])
    sizes = [(64, 64), (96, 64), (128, 128), (32, 160), (104, 72), (64, 128)]
    each = images // MEASUREMENTS

    def generate(number: int) -> None:
        for image in range(number * each, (number + 1) * each):
            height, width = sizes[image % len(sizes)]
            (made,) = pipeline(
                ["cat"], height=height, width=width, num_inference_steps=1, seed=image, return_dict=False
            )
            assert made[0].size == (width, height)

    torch.manual_seed(0)
    said = grown(generate).check(8)
    record_property("figure", f"{images} images of {len(sizes)} sizes generated: {said}")
