"""SIGKILL at random moments of both trainings, with all that they can do: nothing is different at the end.

Every attempt is a process of its own that runs the whole command; it is forked from a server that has imported the
libraries already, so that thirty attempts cost minutes. Two processes find each other as under torchrun.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm_vae import cli
from ldm_vae.training.checkpoint import newest
from tests.latents.conftest import autoencoder_directory, encode, latents, settings  # noqa: F401
from tests.training.mishap import keep_port

TRAINING = [
    "training.precision=fp32", "training.device=cpu", "training.workers=1", "training.tracker=none",
    "training.warmup_steps=2", "training.log_every=3", "training.save_every=2", "training.validate_every=5",
    "training.preview_every=8",
]  # fmt: skip
VAE = [
    "data.source=synthetic", "data.synthetic.count=40", "data.synthetic.resolution=64", "autoencoder.preset=pico",
    "autoencoder.latent_channels=2", "held_out_images=1", "held_out_resolution=64", "crop.short_side_min=32",
    "latents.nested=[1]", "latents.scale_equivariance=0.4", "latents.scales=[0.75]", "adversarial.loss=hinge",
    "adversarial.start=3", "adversarial.warmup=2", "adversarial.ramp=2", "adversarial.width=8",
    "adversarial.r1_every=2", "adversarial.learning_rate=1e-3",
]  # fmt: skip
DIFFUSION = [
    "unet.preset=tiny", "unet.widths=[32,32]", "unet.patch=1", "unet.coordinates=true", "crops.size=2",
    "crops.share=0.5", "batch=4", "held_out=0.3", "ema.snapshots=6",
]  # fmt: skip

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ldm_vae.autoencoder.training", "ldm_vae.diffusion.training", __name__])

Words = Callable[[int], list[str]]


def command(words: list[str], log: str, variables: dict[str, str]) -> None:
    """In the new process: `ldm-vae WORDS`, its words in `log`."""
    with open(log, "a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in any command
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.exit(cli.main(words))


@contextmanager
def attempt(words: list[str], log: Path, processes: int) -> Iterator[list[Any]]:
    """The running processes of one launch; SIGKILL for all of them at the end."""
    with socket.socket() as place_kept:
        port = keep_port(place_kept)
        group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        jobs = []
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "MASTER_PORT": port}
            variables = {name: str(value) for name, value in (place | group if processes > 1 else {}).items()}
            jobs.append(SERVER.Process(target=command, args=(words, str(log), variables)))
        for job in jobs:
            job.start()
        try:
            yield jobs
        finally:
            for job in jobs:
                job.kill()
            for job in jobs:
                job.join()


def to_the_end(words: list[str], log: Path, processes: int) -> None:
    with attempt(words, log, processes) as jobs:
        for job in jobs:
            job.join(600)
        assert [job.exitcode for job in jobs] == [0] * processes, log.read_text()[-2000:]


def killed(
    words: list[str], log: Path, processes: int, output: Path, choose: random.Random, step_seconds: float
) -> bool | None:
    """One attempt that is killed, every second time inside the write of a checkpoint. None: it ended before.

    `step_seconds`: on a fast machine a run must not end within a few delays.
    """
    inside, delay = choose.random() < 0.5, choose.uniform(0, min(0.4, 2.5 * step_seconds))
    further = choose.randrange(3)
    before, halves = names(output, "checkpoints/step-*"), names(output, "checkpoints/.tmp-*")

    def come() -> bool:
        enough = max(names(output, "checkpoints/step-*"), default="") >= nth_next(before, further)
        return enough and (not inside or bool(names(output, "checkpoints/.tmp-*") - halves))

    if not killed_when(come, words, log, processes, delay=delay / 40 if inside else delay):
        return None
    return bool(names(output, "checkpoints/.tmp-*") - halves)


def killed_when(come: Callable[[], bool], words: list[str], log: Path, processes: int, delay: float = 0) -> bool:
    """One attempt that is killed so many seconds after `come()`; False when it had ended by then."""
    deadline = time.monotonic() + 240
    with attempt(words, log, processes) as jobs:
        while all(job.is_alive() for job in jobs) and not come():
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.0005)
        time.sleep(delay)
        if all(job.is_alive() for job in jobs):
            return True
        assert all(job.exitcode in (0, None) for job in jobs), log.read_text()[-2000:]
    return False


def names(output: Path, pattern: str) -> set[str]:
    return {path.name for path in output.glob(pattern)}


def nth_next(before: set[str], further: int) -> str:
    """The name of the checkpoint that comes `further` saves after the newest of `before`; "" for none."""
    last = int(max(before, default="step-0").removeprefix("step-"))
    return f"step-{last + 2 * further:09d}" if further else ""


def state_of(run: Path) -> dict[str, Any]:
    """All that a finished run is: tensors and state of its last checkpoint, figures, pictures, exported files."""
    last, problems = newest(run / "checkpoints")
    assert last is not None
    assert problems == []
    found: dict[str, Any] = {f"{path.stem}: {name}": tensor for path in sorted(last.glob("*.safetensors"))
                             for name, tensor in load_file(path).items()}  # fmt: skip
    state = json.loads((last / "state.json").read_text())
    found["state"] = {name: value for name, value in state.items() if name not in ("seconds", "config")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{name: v for name, v in line.items() if not name.startswith("time/")} for line in lines]
    found["figures"] = json.loads((run / "run.json").read_text())["metrics"]
    files = [path for pattern in ("*.safetensors", "previews/*", "snapshots/*", "autoencoder/**/*.safetensors",
                                  "pipeline/**/*.safetensors") for path in run.glob(pattern)]  # fmt: skip
    return found | {str(path.relative_to(run)): path.read_bytes() for path in files}


def assert_identical(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name], name


@pytest.fixture
def train_vae() -> Words:
    return lambda steps: ["train-vae", *VAE, *TRAINING, f"phases=[{{steps: 3, crop: 32, batch: 4}}, "
                          f"{{steps: {steps - 3}, crop: 48, batch: 4}}]"]  # fmt: skip


@pytest.fixture
def train_diffusion(autoencoder_directory: Path, latents: Path) -> Words:  # noqa: F811
    places = [f"latents={latents}", f"autoencoder={autoencoder_directory}"]
    return lambda steps: ["train-diffusion", *DIFFUSION, *TRAINING, *places, f"steps={steps}"]


CASES: list[Any] = [("train_diffusion", 2, 1)]  # the default tests of the autoencoder have another one
CASES += [pytest.param(kind, processes, 15, marks=pytest.mark.slow)
          for kind in ("train_vae", "train_diffusion") for processes in (1, 2)]  # fmt: skip


@pytest.mark.promise(1)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "processes", "trials"), CASES)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_nobody_touched(
    kind, processes, trials, tmp_path, request, record_property
):
    steps = 8 + 4 * trials
    words = [*request.getfixturevalue(kind)(steps), f"training.processes={processes}"]
    log, output, choose = tmp_path / "log", tmp_path / "killed", random.Random(processes)
    started = time.monotonic()
    to_the_end([*words, f"output={tmp_path / 'whole'}"], log, processes)
    step_seconds = (time.monotonic() - started) / steps
    words.append(f"output={output}")
    kills = inside = 0
    for _ in range(trials):
        found = killed(words, log, processes, output, choose, step_seconds)
        assert newest(output / "checkpoints")[1] == []
        kills, inside = kills + (found is not None), inside + bool(found)
    assert kills == trials
    kills += killed_when(lambda: bool(names(output, ".tmp-*-[ap]*e*")), words, log, processes)  # inside the export
    to_the_end(words, log, processes)
    whole = state_of(tmp_path / "whole")
    assert_identical(state_of(output), whole)
    assert not list(output.rglob(".t*-*"))
    tensors = sum(torch.is_tensor(value) for value in whole.values())
    record_property(
        "figure",
        f"{kills} kills ({inside} inside the write of a checkpoint): {tensors} tensors of weights, averages and "
        f"optimizer, {len(whole['metrics'])} metric lines, pictures and exported files bit-identical; the newest "
        "checkpoint was whole after each",
    )
