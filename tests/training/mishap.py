"""Runs a script of ours with a mishap: at the Nth forward pass a rank raises, dies, stops, hangs, or its worker does.

`python mishap.py FOLDER MISHAP RANK PASS SCRIPT [argument ...]`; in FOLDER are left the time of the mishap, in `time`,
and the exit code of each rank, in `code-RANK`. After a restart by torchrun nothing happens any more.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "LDM_VAE_TEST_JOB"
LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no",
        "--dynamo_backend=no", "--cpu",
    ],
    "accelerate-2": [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A started command and everything that descends from it."""

    process: subprocess.Popen
    folder: Path
    mark: str

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def survivors(self) -> list[int]:
        """Processes of the job that are alive."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                zombie = path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
                if not zombie and f"{MARK}={self.mark}".encode() in path.joinpath("environ").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def wait_for(self, what, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.output[-4000:]
            assert self.process.poll() is None, self.output[-4000:]
            time.sleep(0.05)

    def end(self, seconds: float) -> int:
        """Wait for the command, and then for what descends from it. Returns: its exit code."""
        try:
            code = self.process.wait(seconds)
            deadline = time.monotonic() + seconds
            while self.survivors() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not self.survivors(), self.output[-4000:]
            return code
        finally:
            for number in self.survivors():
                os.kill(number, signal.SIGKILL)

    def seconds_since_mishap(self) -> float:
        return time.time() - float((self.folder / "time").read_text())

    def codes(self) -> list[int]:
        """The exit code of each rank that left by itself."""
        return [int(path.read_text()) for path in sorted(self.folder.glob("code-*"))]


def start(
    folder: Path, script: Path | str, *words: str, launcher: str = "python", more: tuple[str, ...] = (),
    mishap: str = "none", rank: int = 1, forward_pass: int = 0,
) -> Job:  # fmt: skip
    """Start `script` under a launcher; `more` are its options. Output goes to a file: nobody waits for a pipe."""
    folder.mkdir(parents=True)
    mark = uuid.uuid4().hex
    command = [sys.executable, *LAUNCHERS[launcher], *more, __file__, str(folder), mishap, str(rank),
               str(forward_pass), str(script), *words]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: mark}
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Job(process, folder, mark)


def keep_port(held: socket.socket) -> int:
    """Bind `held` to a free port of loopback, at which a process that is started may listen, but nobody else by chance
    as long as `held` is open."""
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held.getsockname()[1]


def happen(mishap: str) -> None:
    if mishap == "exception":
        raise ValueError("a mishap")
    if mishap == "asked to stop":
        os.kill(os.getpid(), signal.SIGTERM)
    elif mishap == "hangs":
        time.sleep(10**6)
    else:
        target = multiprocessing.active_children()[0].pid if mishap.startswith("worker") else os.getpid()
        assert target is not None
        os.kill(target, signal.SIGSTOP if mishap.endswith("stopped") else signal.SIGKILL)


def main(folder: str, mishap: str, rank: str, forward_pass: str, script: str, *words: str) -> None:
    from torch.nn.modules.module import register_module_forward_pre_hook

    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == int(forward_pass):
            Path(folder, "time").write_text(str(time.time()))
            happen(mishap)

    ours = os.environ.get("RANK", rank)
    if ours == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and mishap != "none":
        register_module_forward_pre_hook(count)
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        Path(folder, f"code-{ours}").write_text(str(leaving.code or 0))
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
