"""Real processes: the number of them does not change a byte, and neither does a SIGKILL."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from ldm_vae import cli
from tests.latents.test_encode import contents
from tests.training.mishap import keep_port
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ldm_vae.latents.encode", "accelerate", __name__])
SCRIPT = str(ROOT / "scripts" / "encode_dataset.py")


def start(*words: str, processes: int = 1) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, SCRIPT, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_do_not_change_a_byte(settings, latents, tmp_path, processes):
    job = start(*settings, f"output={tmp_path / 'set'}", f"processes={processes}", processes=processes)
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output
    assert contents(tmp_path / "set") == contents(latents)
    assert f'"processes": {processes}' in (tmp_path / "set" / "run.json").read_text()


@pytest.mark.slow
def test_a_refusal_ends_all_processes_with_one_sentence(settings, latents):
    job = start(*settings, f"output={latents}", "dtype=float32", processes=2)
    output, _ = job.communicate(timeout=240)
    assert job.returncode != 0
    assert output.count("dtype=float16 instead of float32") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_job_is_continued_to_the_same_bytes(encode, settings, tmp_path, number):
    settings = [*settings, "data.source=synthetic", "data.path=", "data.synthetic.count=120"]
    settings += ["data.synthetic.resolution=64", "batch=2", "shard_size=2"]
    halt = (tmp_path / "set", "shard-*.jsonl", 3)
    job = Forked(["encode", *settings, f"output={tmp_path / 'set'}"], 1, tmp_path / "log.txt", halt)
    assert job.halts(), (tmp_path / "log.txt").read_text()
    os.kill(job.processes[0].pid, number)
    job.go_on()
    job.processes[0].join()
    assert job.processes[0].exitcode == (-signal.SIGKILL if number == signal.SIGKILL else 75)
    assert not (tmp_path / "set" / "manifest.json").exists()
    encode(tmp_path / "set", *settings)
    encode(tmp_path / "whole", *settings)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.mark.promise(11)
def test_of_two_launches_at_once_one_is_refused_and_the_set_is_whole(settings, latents, tmp_path):
    jobs = [start(*settings, f"output={tmp_path / 'set'}") for _ in range(2)]
    outputs = [job.communicate(timeout=240)[0] for job in jobs]
    codes = sorted(job.returncode for job in jobs)
    assert codes in ([0, 0], [0, 2]), outputs  # the second may come when the first has finished
    assert any("is using this folder" in output or "finished already" in output for output in outputs)
    assert contents(tmp_path / "set") == contents(latents)


Halt = tuple[Path, str, int]
"""(folder, pattern, count): where a job suspends itself, which is at the first layer that it calls when so many files
are there. No look from outside is sure to come in time: the machine may be fast, or busy with others."""


def run_rank(words: list[str], rank: int, processes: int, port: int, log: Path, halt: Halt | None) -> None:
    """`ldm-vae WORDS` in one of the processes that a launcher would have started; what it says is added to `log`."""
    with open(log, "a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in any command
    torch.set_num_threads(1)
    if halt is not None:
        suspend_at(*halt)
    sys.exit(cli.main(words))


def suspend_at(folder: Path, pattern: str, count: int) -> None:
    """Let this process suspend itself once, as `Halt` says."""

    def look(*_: object) -> None:
        if len(list(folder.glob(pattern))) >= count:
            hook.remove()
            os.kill(os.getpid(), signal.SIGSTOP)

    hook = register_module_forward_pre_hook(look)


class Forked:
    """`ldm-vae WORDS` in some processes, forked from a server that has imported torch once."""

    def __init__(self, words: list[str], processes: int, log: Path, halt: Halt | None = None) -> None:
        self._place_kept = socket.socket()  # closed with this object
        port = keep_port(self._place_kept)
        ranks = [(words, rank, processes, port, log, halt) for rank in range(processes)]
        self.processes = [FORKS.Process(target=run_rank, args=arguments) for arguments in ranks]
        for process in self.processes:
            process.start()

    def halts(self) -> bool:
        """Wait until one has suspended itself, or ended. Returns: whether all are there."""
        wait_until(lambda: any(is_suspended(process.pid) or not process.is_alive() for process in self.processes))
        return all(process.is_alive() for process in self.processes)

    def go_on(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)

    def kill(self, choose: random.Random) -> int:
        """One after the other, with a moment in between where the others go on. Returns: how many still lived."""
        killed = 0
        for process in choose.sample(self.processes, len(self.processes)):
            process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            time.sleep(choose.choice([0, 0, 0.1]))
        return killed


def is_suspended(number: int) -> bool:
    try:
        return psutil.Process(number).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def published(directory: Path) -> dict[str, bytes]:
    """What is there under a final name and belongs to the set."""
    names = ("shard-*", "plan*", "index-*", "quarantine.jsonl", "manifest.json")
    return {path.name: path.read_bytes() for name in names for path in directory.glob(name)}


@pytest.mark.timeout(7200)
@pytest.mark.promise(4)
@pytest.mark.parametrize("trials", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_random_kills_and_other_numbers_of_processes_never_change_a_byte(
    encode, settings, tmp_path, trials, record_property
):
    """Trials of three rounds, each with 1 to 3 processes that are killed while they start or some files later."""
    settings = [*settings, "data.source=synthetic", "data.path=", "data.synthetic.count=120"]
    settings += ["data.synthetic.resolution=64", "batch=2", "shard_size=2"]
    choose, killed, compared = random.Random(trials), 0, 0
    encode(tmp_path / "whole", *settings)
    whole = contents(tmp_path / "whole")
    for trial in range(trials):
        output, log = tmp_path / str(trial), tmp_path / f"{trial}.txt"
        for _ in range(3):
            words = ["encode", *settings, f"output={output}", f"workers={choose.choice([0, 0, 2])}"]
            more = choose.randrange(40)  # of 120 files
            halt = (output, "shard-*", len(list(output.glob("shard-*"))) + more)
            job = Forked(words, choose.choice([1, 2, 3]), log, halt if more else None)
            if more:
                job.halts()
                job.go_on()
            time.sleep(choose.uniform(0, 0.05))
            killed += job.kill(choose)
            for name, data in published(output).items():
                assert data == whole[name], f"{name} after a kill in trial {trial}"
                compared += 1
        encode(output, *settings)
        assert contents(output) == whole, log.read_text()
        assert not list(output.glob(".tmp-*"))
    assert killed >= trials
    record_property(
        "figure",
        f"{trials} trials, {killed} processes killed: {trials} sets byte-identical; {compared} published files read "
        "after the kills, 0 torn",
    )
