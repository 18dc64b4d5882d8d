"""The engine's promises: processes and micro-batches change nothing, a killed run ends where an unbroken one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm_vae.errors import EXIT_INTERRUPTED, UserError
from tests.training import toy

TOY = Path(toy.__file__)
ROOT = TOY.parents[2]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def train(
    output: Path, *overrides: str, processes: int = 1, launcher: str = "python", kill_at: int = -1
) -> subprocess.CompletedProcess:
    """Train the toy in new processes; `kill_at`: the step at which it sends itself SIGKILL."""
    command = [sys.executable]
    if processes > 1 and launcher == "torchrun":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    elif processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}",
                    "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]  # fmt: skip
    command += [str(TOY), str(output), *overrides]
    variables = environment() | {"TOY_KILL_AT": str(kill_at)}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors") | {
        f"ema.{name}": value for name, value in load_file(output / "ema.safetensors").items()
    }


def metrics(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def assert_same(first: dict, second: dict, tolerance: float | None = None) -> None:
    assert first.keys() == second.keys()
    for name in first:
        if tolerance is None:
            assert torch.equal(first[name], second[name]), name
        else:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "run"
    assert train(output).returncode == 0
    return output


def test_two_runs_of_one_seed_are_equal(reference, tmp_path):
    assert train(tmp_path / "run").returncode == 0
    assert_same(weights(reference), weights(tmp_path / "run"))
    assert metrics(reference) == metrics(tmp_path / "run")


def test_micro_batches_equal_the_whole_batch(reference, tmp_path):
    assert toy.main(str(tmp_path / "run"), "micro=2") == 0
    assert_same(weights(reference), weights(tmp_path / "run"), tolerance=1e-6)


@pytest.mark.promise(3)
def test_two_processes_with_micro_batches_equal_one_process(reference, tmp_path, record_property):
    result = train(tmp_path / "run", "micro=2", "training.processes=2", processes=2, launcher="accelerate")
    assert result.returncode == 0, result.stderr[-2000:]
    assert_same(weights(reference), weights(tmp_path / "run"), tolerance=1e-6)
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(reference)):
        assert ours["loss/copy"] == pytest.approx(theirs["loss/copy"], abs=1e-6)
    record_property("figure", "2 processes with micro-batches and 1 without: weights and losses agree to 1e-6")


def test_gradients_that_bypass_the_wrapper_are_noticed(tmp_path):
    result = train(tmp_path / "run", "micro=2", "broken=true", processes=2, launcher="torchrun")
    assert result.returncode != 0
    assert "step 3: the processes are out of step, with other weights" in result.stderr


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (3, 5)), 11])
def test_a_run_killed_at_a_step_ends_bit_identical(reference, tmp_path, step):
    """Checkpoints are at 5 and 10; log steps at 3, 6, 9, 12: the resumed run starts inside a logging interval."""
    output = tmp_path / "run"
    assert train(output, kill_at=step).returncode == -signal.SIGKILL
    assert not (output / "model.safetensors").exists()
    result = train(output)
    assert result.returncode == 0, result.stderr
    assert ("continuing from step" in result.stdout) == (step >= 5)
    assert_same(weights(output), weights(reference))
    assert metrics(output) == metrics(reference)


@pytest.mark.slow
def test_random_kills_end_bit_identical(tmp_path):
    """SIGKILL at random moments, also while a checkpoint is written."""
    import random

    settings = ("steps=300", "training.save_every=2", "training.workers=2")
    assert train(tmp_path / "whole", *settings).returncode == 0
    output, rng = tmp_path / "killed", random.Random(0)
    command = [sys.executable, str(TOY), str(output), *settings]
    for _ in range(10):
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(2.0, 5.0))
        process.kill()
        process.wait()
    assert train(output, *settings).returncode == 0
    assert_same(weights(output), weights(tmp_path / "whole"))
    assert metrics(output) == metrics(tmp_path / "whole")


@pytest.mark.promise(2)
def test_sigterm_saves_and_the_same_command_continues(tmp_path, record_property):
    output = tmp_path / "run"
    command = [sys.executable, str(TOY), str(output), "steps=200000", "training.save_every=100000"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (output / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=240)
    seconds = time.monotonic() - sent
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert "SIGTERM: saving" in errors
    (saved,) = (output / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    result = train(output, f"steps={step + 1}", "training.save_every=100000")
    assert f"continuing from step {step}" in result.stdout, result.stderr
    assert result.returncode == 0
    record_property("figure", f"python, SIGTERM: saved, exit 75 after {seconds:.1f} s, the same command continues")


def test_a_finished_run_says_so(tmp_path, capsys):
    assert toy.main(str(tmp_path / "run")) == 0
    assert toy.main(str(tmp_path / "run")) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_another_runs_directory_is_refused_with_the_keys(tmp_path):
    assert toy.main(str(tmp_path / "run"), "steps=2") == 0
    with pytest.raises(UserError, match=r"batch \(8 -> 4\)"):
        toy.main(str(tmp_path / "run"), "steps=2", "batch=4", "micro=4")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("important")
    with pytest.raises(UserError, match="holds other files"):
        toy.main(str(tmp_path / "notes"))


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/mine.pt", "previews/mine.png", "photo.png"])
def test_nothing_is_made_in_a_folder_that_is_refused(tmp_path, name):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("output: x\nbatch: 16\n")
    before = sorted(str(path) for path in (tmp_path / "mine").rglob("*"))
    with pytest.raises(UserError, match=r"holds other files but no run|holds a run with other settings"):
        toy.main(str(tmp_path / "mine"))
    assert sorted(str(path) for path in (tmp_path / "mine").rglob("*")) == before
    assert path.read_text() == "output: x\nbatch: 16\n"


def test_a_directory_in_use_is_refused_with_its_holder(tmp_path):
    from ldm_vae.training.run_directory import RunDirectory

    first = RunDirectory(tmp_path / "run", toy.ToyConfig(output="x"))
    with pytest.raises(UserError, match=f"process {os.getpid()} on host .* is training here"):
        RunDirectory(tmp_path / "run", toy.ToyConfig(output="x"))
    del first


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path):
    """One NaN step: the weights stay finite, the other steps go on."""
    assert toy.main(str(tmp_path / "run"), "nan_at=4") == 0
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())
    assert not torch.equal(*(weights(tmp_path / "run")[name] for name in ("0.weight", "ema.0.weight")))


def test_out_of_memory_names_the_keys_to_lower(tmp_path, monkeypatch):
    def update(self, step, batch, engine):
        torch.empty(1 << 60)

    monkeypatch.setattr(toy.ToyModel, "update", update)
    advice = r"lower micro \(the result stays the same\), then size, or set training.gradient_checkpointing=true"
    with pytest.raises(UserError, match=f"step 1: out of memory; {advice}"):
        toy.main(str(tmp_path / "run"))


def test_batches_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(UserError, match="multiple of 3"):
        toy.main(str(tmp_path / "run"), "micro=3")


def test_another_number_of_processes_than_asked_for_is_refused(tmp_path):
    with pytest.raises(UserError, match="2 were asked for, 1 started"):
        toy.main(str(tmp_path / "run"), "training.processes=2")
