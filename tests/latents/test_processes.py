"""Real processes: the number of them does not change a byte, and neither does a SIGKILL."""

from __future__ import annotations

import os
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
    while len(list((tmp_path / "set").glob("shard-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    job.send_signal(number)
    job.communicate(timeout=60)
    assert job.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 75)
    assert not (tmp_path / "set" / "manifest.json").exists()
    encode(tmp_path / "set", *settings)
    encode(tmp_path / "whole", *settings)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
