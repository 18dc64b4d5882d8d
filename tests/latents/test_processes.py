"""Real processes: the number of them does not change a byte, and neither does a SIGKILL."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.latents.test_encode import contents

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "encode_dataset.py")


def start(*words: str, processes: int = 1) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*launcher, SCRIPT, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_do_not_change_a_byte(settings, latents, tmp_path, processes):
    job = start(*settings, f"output={tmp_path / 'set'}", f"processes={processes}", processes=processes)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert contents(tmp_path / "set") == contents(latents)
    assert f'"processes": {processes}' in (tmp_path / "set" / "run.json").read_text()


@pytest.mark.slow
def test_a_refusal_ends_all_processes_with_one_sentence(settings, latents):
    job = start(*settings, f"output={latents}", "dtype=float32", processes=2)
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert output.count("dtype is float16 there and float32 here") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_job_is_continued_to_the_same_bytes(encode, settings, tmp_path, number):
    settings = [*settings, "data.source=synthetic", "data.path=null", "data.synthetic.count=120"]
    settings += ["data.synthetic.resolution=64", "batch=2", "shard_size=2"]
    job = start(*settings, f"output={tmp_path / 'set'}")
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "set").glob("shard-*.jsonl"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    job.send_signal(number)
    job.communicate(timeout=60)
    assert job.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 75)
    assert not (tmp_path / "set" / "manifest.json").exists()
    encode(tmp_path / "set", *settings)
    encode(tmp_path / "whole", *settings)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_of_two_launches_at_once_one_is_refused_and_the_set_is_whole(settings, latents, tmp_path):
    jobs = [start(*settings, f"output={tmp_path / 'set'}") for _ in range(2)]
    outputs = [job.communicate(timeout=120)[0] for job in jobs]
    codes = sorted(job.returncode for job in jobs)
    assert codes in ([0, 0], [0, 2]), outputs  # the second may come when the first has finished
    assert any("is at work here" in output or "finished already" in output for output in outputs)
    assert contents(tmp_path / "set") == contents(latents)


@pytest.mark.slow
def test_random_kills_and_other_numbers_of_processes_never_change_a_byte(encode, settings, tmp_path):
    """10 trials, each killed three times at a random moment, each time with 1 or 2 processes."""
    settings = [*settings, "data.source=synthetic", "data.path=null", "data.synthetic.count=200"]
    settings += ["data.synthetic.resolution=64", "batch=2", "shard_size=2"]
    encode(tmp_path / "whole", *settings)
    choose, killed = random.Random(0), 0
    for trial in range(10):
        output = tmp_path / str(trial)
        for _ in range(3):
            job = start(*settings, f"output={output}", processes=choose.choice([1, 1, 2]))
            deadline, before = time.monotonic() + 60, len(list(output.glob("shard-*.jsonl")))
            more = choose.randrange(1, 30)
            while len(list(output.glob("shard-*.jsonl"))) < before + more and job.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            killed += job.poll() is None
            subprocess.run(["pkill", "-KILL", "-f", str(output)], check=False)
            job.communicate(timeout=60)
        encode(output, *settings)
        assert contents(output) == contents(tmp_path / "whole")
    assert killed > 20
