"""The folders that commands fill: one job at a time in each, and one sentence when the disk refuses.

Sets of latents have tests of their own in `latents/test_full_disk.py`, trainings in `training/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ldm_vae import cli
from ldm_vae.errors import EXIT_USER_ERROR
from tests.diffusion.conftest import saved as saved  # a fixture
from tests.disks import Disk
from tests.disks import disk as disk  # a fixture
from tests.latents.conftest import autoencoder_directory as autoencoder_directory  # a fixture
from tests.latents.test_processes import Forked, Halt

Words = Callable[[Path], list[str]]
LOCKS = {"encode": "encode.lock"}
"""Of the others: run.lock."""
EVALUATE, DIAGNOSE, TRAIN = (
    pytest.param(name, marks=pytest.mark.slow) for name in ("evaluate", "diagnose", "train-vae")
)


@pytest.fixture
def words(request: pytest.FixtureRequest) -> Words:
    """The words of a command that writes into a folder."""
    data = [f"data.path={request.getfixturevalue('image_folder')}", "data.source=folder", "device=cpu"]
    measured = [f"autoencoder={request.getfixturevalue('autoencoder_directory')}", *data, "resolution=64", "part=all"]
    pipeline = str(request.getfixturevalue("saved"))
    training = ["data.source=synthetic", "data.synthetic.count=40", "data.synthetic.resolution=64"]
    training += ["phases=[{steps: 2, crop: 32, batch: 2}]"]
    training += ["autoencoder.preset=pico", "autoencoder.latent_channels=2", "held_out_images=1"]
    training += ["held_out_resolution=64", "training.device=cpu", "training.workers=1", "training.tracker=none"]
    commands = {
        "generate": [pipeline, "--count", "6", "--steps", "3", "--batch", "1", "--device", "cpu", "--out"],
        "evaluate": [*measured, "examples=2", "batch=2"],
        "diagnose": [*measured, "batch=2"],
        "encode": [*measured[:-2], "resolution=32", "batch=2", "shard_size=2", "workers=0"],
        "train-vae": training,
    }
    name = request.param

    def of(output: Path) -> list[str]:
        place = [str(output)] if name == "generate" else [f"output={output}"]
        return [name, *commands[name], *place]

    return of


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def last_line(text: str) -> str:
    return text.strip().replace("\r", "\n").splitlines()[-1]


@pytest.fixture
def halted(tmp_path: Path) -> Iterator[Callable[[list[str], Halt], Forked]]:
    """Starts a command in another process, which suspends itself when so many files are there, and ends with the
    test."""
    jobs: list[Forked] = []

    def start(words: list[str], halt: Halt) -> Forked:
        jobs.append(Forked(words, 1, tmp_path / "log.txt", halt))
        assert jobs[-1].halts(), (tmp_path / "log.txt").read_text()
        return jobs[-1]

    yield start
    for job in jobs:
        job.processes[0].kill()
        job.processes[0].join()


@pytest.mark.promise(11)
@pytest.mark.parametrize("words", ["generate", EVALUATE, DIAGNOSE, "encode", TRAIN], indirect=True)
def test_the_second_job_in_a_folder_is_refused_and_told_who_is_there(
    words: Words, halted: Callable[[list[str], Halt], Forked], tmp_path: Path, capfd, record_property
) -> None:
    output = tmp_path / "out"
    lock = output / LOCKS.get(words(output)[0], "run.lock")
    process = halted(words(output), (output, lock.name, 1)).processes[0]
    before = contents(output)
    capfd.readouterr()
    assert cli.main(words(output)) == EXIT_USER_ERROR
    assert f"out: process {process.pid} " in last_line(capfd.readouterr().err)
    assert contents(output) == before
    process.kill()
    process.join()
    assert lock.exists(), "a killed job leaves its lock behind"
    assert cli.main(words(output)) == 0
    assert not lock.exists() or words(output)[0] == "train-vae"
    assert not list(output.rglob(".tmp-*"))
    record_property("figure", f"{words(output)[0]}: the second refused, the lock of a killed one passed over")


@pytest.mark.promise(5)
@pytest.mark.parametrize("words", ["generate", "evaluate", DIAGNOSE], indirect=True)
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
    words: Words,
    disk: Disk,
    tmp_path: Path,
    capfd,
    record_property,
) -> None:
    assert cli.main(words(tmp_path / "whole")) == 0
    names = contents(tmp_path / "whole").keys()
    pages = sum(-(-path.stat().st_size // 4096) for path in (tmp_path / "whole").rglob("*") if path.is_file())
    sizes = [4 * pages * part // 5 for part in (1, 3, 4)]
    output = disk.path / "out"
    for size in sizes:
        disk.resize(f"{size}k")
        capfd.readouterr()
        assert cli.main(words(output)) == EXIT_USER_ERROR
        assert f"{output}: cannot be written (no space left on the device)" in last_line(capfd.readouterr().err)
        assert not list(output.rglob(".tmp-*"))
    disk.resize("1m")
    assert cli.main(words(output)) == 0
    assert contents(output).keys() == names
    record_property("figure", f"{words(output)[0]}: full at {len(sizes)} of {4 * pages} KiB, then complete")


@pytest.mark.promise(5)
@pytest.mark.parametrize("words", ["generate", EVALUATE, DIAGNOSE], indirect=True)
def test_a_read_only_disk_is_one_sentence_and_what_is_there_is_left_and_read(
    words: Words,
    disk: Disk,
    capfd,
    record_property,
) -> None:
    assert cli.main(words(disk.path / "whole")) == 0
    (disk.path / "free").mkdir()
    before = contents(disk.path)
    disk.make_read_only()
    capfd.readouterr()
    assert cli.main(words(disk.path / "free")) == EXIT_USER_ERROR
    assert "free: cannot be written (Read-only file system)" in last_line(capfd.readouterr().err)
    assert cli.main(words(disk.path / "whole")) == 0, "a finished result is read"
    assert contents(disk.path) == before
    disk.make_writable()
    assert cli.main(words(disk.path / "free")) == 0
    record_property("figure", f"{words(disk.path)[0]}: refused, the finished result intact and read, then made")


@pytest.mark.promise(5)
@pytest.mark.parametrize("words", ["generate", EVALUATE, DIAGNOSE], indirect=True)
def test_a_disk_that_vanishes_is_one_sentence(
    words: Words,
    halted: Callable[[list[str], Halt], Forked],
    disk: Disk,
    tmp_path: Path,
    record_property,
) -> None:
    output = disk.path / "out"
    name = "0001_dog.png" if words(output)[0] == "generate" else "run.lock"
    job = halted(words(output), (output, name, 1))
    process = job.processes[0]
    disk.vanish()
    job.go_on()
    process.join(240)
    assert process.exitcode == EXIT_USER_ERROR
    assert "out: cannot be written (No such file or directory)" in last_line((tmp_path / "log.txt").read_text())
    assert not contents(disk.path), "nothing was written onto the disk below"
    disk.bring_back()
    assert cli.main(words(output)) == 0
    record_property("figure", f"{words(output)[0]}: exit code 2, one line; then made")


def test_other_commands_say_it_in_one_line_too(autoencoder_directory, disk: Disk, capfd) -> None:
    disk.make_read_only()
    assert cli.main(["synth", str(disk.path / "out"), "--count", "2"]) == EXIT_USER_ERROR
    assert last_line(capfd.readouterr().err).startswith(f"ldm-vae synth: {disk.path}")
