"""A training whose disk is full, or goes away: one sentence, nothing lost, and the same command completes the run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_vae import config as configuration
from ldm_vae.errors import EXIT_USER_ERROR
from ldm_vae.files import verify_checksums, write_bytes
from ldm_vae.training.loader import Plan, Span
from ldm_vae.training.run_directory import RunDirectory
from ldm_vae.training.trainer import fit, make_accelerator
from tests.training import faults, toy
from tests.training.test_kills import assert_identical, state_of

SETTINGS = ("steps=6", "training.save_every=2", "training.preview_every=3", "training.log_every=1")


class DrawingModel(toy.ToyModel):
    """Also makes pictures, and at a step lets the disk go away or fills it."""

    vanishing: Path | None = None
    filling: Path | None = None

    def preview(self, engine):
        return Image.linear_gradient("L")

    def update(self, step, batch, engine):
        if step == 4 and self.vanishing is not None:
            subprocess.run(["umount", "--lazy", self.vanishing], check=True)
        if step == 4 and self.filling is not None:
            subprocess.run(["dd", "if=/dev/zero", f"of={self.filling / 'fill'}"], stderr=subprocess.DEVNULL)
        return super().update(step, batch, engine)

    def export(self, engine, directory, metrics):
        super().export(engine, directory, metrics)
        write_bytes(directory / "large", bytes(2**16))  # so that there is room for the checkpoints and none for this


def train(output: Path, *overrides: str, **disk: Path) -> None:
    config = configuration.load(toy.ToyConfig, None, [f"output={output}", *SETTINGS, *overrides])
    accelerator = make_accelerator(config.training, output)
    model = DrawingModel(config)
    vars(model).update(disk)
    run = RunDirectory(config.output, config)
    plan = Plan((Span(config.steps, config.batch, config.micro),))
    assert fit(model, toy.ToySamples(), plan, config.training, run, accelerator) == 0


@pytest.fixture(scope="module", autouse=True)
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run with room; in this process, so that its forks have imported everything."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run)
    return state_of(run)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a filesystem here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=False)


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)


def assert_refused(outcome: tuple[int, str], *words: str) -> None:
    code, told = outcome
    assert code == EXIT_USER_ERROR, told
    assert "\n" not in told
    for word in words:
        assert word in told


def place(run: Path, told: str) -> str:
    """What could not be written, as the folder shows it."""
    if not (run / "config.yaml").exists():
        return "the settings"
    if told.startswith(str(run / "checkpoints")):
        return "a checkpoint"
    if (run / "checkpoints" / "step-000000006").exists():
        return "the finished model"
    lines = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    return "a picture" if lines.endswith("\n") and lines.count("\n") % 3 == 0 else "a metrics line"


@pytest.mark.promise(5)
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_a_full_disk_is_named_and_the_same_command_completes_the_run(whole, disk, tmp_path, every, record_property):
    """From no space at all, in steps of the page of a filesystem in memory, to enough of it."""
    told, run = tmp_path / "told", disk / "run"
    places = []
    for kilobytes in range(4, 4000, 4 * every):
        subprocess.run(["rm", "-rf", run], check=True)
        resize(disk, kilobytes)
        outcome = faults.outcome(lambda: train(run), told)
        if outcome[0] == 0:
            break
        assert_refused(outcome, "cannot be written (no space left on the device)")
        places.append(place(run, outcome[1]))
        assert not list(run.rglob(".tmp-*"))
        for path in run.glob("checkpoints/step-*"):
            verify_checksums(path)
        resize(disk, 4096)
        assert faults.outcome(lambda: train(run), told) == (0, "")
        assert_identical(state_of(run), whole)
    assert len(places) >= 3
    counts = ", ".join(f"{places.count(name)} x {name}" for name in dict.fromkeys(places))
    record_property("figure", f"a training on {len(places)} disks too small ({counts}): one sentence each, earlier "
                    "checkpoints whole, the same command ends bit-identical")  # fmt: skip


@pytest.mark.promise(5)
def test_a_disk_that_fills_between_two_metrics_is_one_sentence_with_tensorboard_too(disk, tmp_path):
    """Its writer is a thread that reports an error later, also when it is closed."""
    overrides = ("training.tracker=tensorboard", "steps=60", "training.save_every=60", "training.preview_every=60")
    outcome = faults.outcome(lambda: train(disk / "run", *overrides, filling=disk), tmp_path / "told")
    assert_refused(outcome, f"{disk}/run: cannot be written (no space left on the device)")


@pytest.mark.promise(5)
def test_a_disk_that_goes_away_is_named_and_nothing_is_written_below_it(disk, tmp_path, record_property):
    told = tmp_path / "told"
    outcome = faults.outcome(lambda: train(disk / "run", vanishing=disk), told)
    assert_refused(outcome, f"{disk}/run: cannot be written (No such file or directory)")
    assert list(disk.iterdir()) == []
    record_property("figure", "a disk that was taken away while training: one sentence, nothing written in its place")


@pytest.mark.promise(5)
def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    outcome = faults.outcome(lambda: train(tmp_path / "file" / "run"), tmp_path / "told")
    assert_refused(outcome, "cannot be written (Not a directory); give another output")
