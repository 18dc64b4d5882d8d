"""A process of a training dies or hangs: the job ends and says which, nothing is left behind, and the rerun goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ldm_vae.errors import EXIT_INTERRUPTED
from tests.training import toy
from tests.training.mishap import Job, start
from tests.training.test_trainer_fit import assert_same, weights

TOY = toy.__file__
STEPS = ("steps=40", "micro=2")
TIMEOUT_SECONDS = 8
DOCUMENTED_SECONDS = TIMEOUT_SECONDS + 35
BUSY_SECONDS = 60
"""What a machine may need besides that is five times as busy as ours."""

SETTINGS = (*STEPS, "training.workers=1", f"training.timeout_seconds={TIMEOUT_SECONDS}")
MISHAPS = ("killed", "exception", "stopped", "hangs", "worker killed", "worker stopped")
FORWARD_PASS = 90
"""In step 8: the first checkpoint, of step 5, is there."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "run"
    assert toy.main(str(output), *STEPS) == 0
    return output


def assert_rerun_ends_like(reference: Path, output: Path) -> None:
    """Two processes before the mishap, one after it: equal to the order of a float sum."""
    assert any((output / "checkpoints").glob("step-*"))
    assert toy.main(str(output), *STEPS) == 0
    assert_same(weights(output), weights(reference), tolerance=1e-6)


def names_the_rank(job: Job) -> bool:
    return "rank 1 of 2 (process" in job.output or "rank      : 1 " in job.output


@pytest.mark.promise(3)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mishap", [MISHAPS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MISHAPS[1:])])
def test_a_lost_process_ends_the_job_and_the_rerun_continues(reference, tmp_path, mishap, record_property):
    output = tmp_path / "run"
    job = start(tmp_path / "job", TOY, str(output), *SETTINGS, launcher="torchrun", mishap=mishap,
                forward_pass=FORWARD_PASS)  # fmt: skip
    code = job.end(seconds=240)
    seconds = job.seconds_since_mishap()
    assert code != 0
    assert names_the_rank(job), job.output
    assert seconds < DOCUMENTED_SECONDS + BUSY_SECONDS, job.output
    assert_rerun_ends_like(reference, output)
    record_property("figure", f"training, rank 1 {mishap}: ended after {seconds:.1f} s of a timeout of "
                              f"{TIMEOUT_SECONDS} s, 0 processes left, the rerun agrees to 1e-6")  # fmt: skip


@pytest.mark.promise(3)
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_restarts_the_job_by_itself(reference, tmp_path, record_property):
    output = tmp_path / "run"
    job = start(tmp_path / "job", TOY, str(output), *STEPS, "training.workers=1", launcher="torchrun",
                more=("--max-restarts=1",), mishap="killed", forward_pass=FORWARD_PASS)  # fmt: skip
    assert job.end(seconds=800) == 0, job.output
    assert "continuing from step 5" in job.output
    assert_same(weights(output), weights(reference), tolerance=1e-6)
    record_property("figure", "torchrun --max-restarts=1: rank 1 killed in step 8, continued from 5, agrees to 1e-6")


@pytest.mark.promise(3)
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_other_numbers_of_processes_give_the_same_run(reference, tmp_path, record_property):
    """Each of 1, 4, and 2 processes is asked to stop after some ten steps; one more ends the run."""
    output = tmp_path / "run"
    for processes, forward_pass in ((1, 160), (4, 50), (2, 100), (1, 0)):
        launcher = "torchrun" if processes > 1 else "python"
        more = (f"--nproc_per_node={processes}",) if processes > 1 else ()
        job = start(tmp_path / f"{processes}-{forward_pass}", TOY, str(output), *STEPS, launcher=launcher,
                    more=more, mishap="asked to stop", rank=0, forward_pass=forward_pass)  # fmt: skip
        job.end(seconds=240)
        assert job.codes() == [EXIT_INTERRUPTED if forward_pass else 0] * processes, job.output
    ours, theirs = weights(output), weights(reference)
    assert_same(ours, theirs, tolerance=1e-6)
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    record_property("figure", f"1, 4, 2 and 1 processes within one run of 40 steps: weights differ by {worst:.1e}")


@pytest.mark.promise(3)
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("trials", [pytest.param(30, marks=pytest.mark.slow)])
def test_runs_of_two_processes_that_nothing_befalls_end_well(tmp_path, trials, record_property):
    started = time.monotonic()
    for trial in range(trials):
        job = start(tmp_path / f"job-{trial}", TOY, str(tmp_path / str(trial)), "micro=4", "training.workers=1",
                    launcher="torchrun")  # fmt: skip
        assert job.end(seconds=240) == 0, job.output
        assert (tmp_path / str(trial) / "run.json").exists()
    load = os.getloadavg()[0]
    record_property("figure", f"{trials} clean runs of two processes under a load of {load:.0f}: {trials} x exit 0, "
                              f"{(time.monotonic() - started) / trials:.0f} s each")  # fmt: skip
