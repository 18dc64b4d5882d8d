"""A job killed before each of its file operations in turn: nothing torn is seen, and the same command goes on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_vae import cli
from tests.latents.test_encode import contents
from tests.latents.test_processes import FORKS, published

COUNTED = ("mkdir", "fsync", "replace", "unlink")


def encode_until(words: list[str], number: int, record: Path) -> None:
    """Encode, and die before file operation `number`; `record` gets a line for each, `kind name`."""
    done, log = 0, open(record, "w", buffering=1)  # noqa: SIM115 - the process ends

    def step(kind: str, path: Any) -> None:
        nonlocal done
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        log.write(f"{kind} {Path(os.readlink(f'/proc/self/fd/{path}') if isinstance(path, int) else path).name}\n")

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            step(kind, arguments[-1] if kind == "replace" else arguments[0])
            return function(*arguments, **named)

        return call

    def write_bytes(path: Path, data: bytes) -> None:
        step("create", path)
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            step("write", path)
            file.write(data[len(data) // 2 :])

    for kind in COUNTED:
        setattr(os, kind, counted(kind, getattr(os, kind)))
    Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]
    torch.set_num_threads(1)
    sys.exit(cli.main(["encode", *words]))


def run(words: list[str], number: int, record: Path) -> int | None:
    process = FORKS.Process(target=encode_until, args=(words, number, record))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no names of open files here")
@pytest.mark.timeout(3600)
@pytest.mark.promise(4)
@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_a_file_operation_is_continued_to_the_byte(
    encode, settings, image_folder, tmp_path, every, record_property
):
    images = shutil.copytree(image_folder, tmp_path / "images")
    (images / "a" / "004.png").write_bytes(b"no picture")
    settings = [*settings, f"data.path={images}", "shard_size=8"]
    assert run([*settings, f"output={tmp_path / 'whole'}"], -1, tmp_path / "operations.txt") == 0
    whole = contents(tmp_path / "whole")
    lines = (tmp_path / "operations.txt").read_text().splitlines()
    operations = [tuple(line.split()) for line in lines]
    check_order(operations, {*whole, "run.json"})
    killed = range(every // 2, len(operations), every)
    for number in killed:
        output = tmp_path / str(number)
        words = [*settings, f"output={output}"]
        assert run(words, number, tmp_path / "record.txt") == -signal.SIGKILL
        for name, data in published(output).items():
            assert data == whole[name], f"{name} after a kill before {operations[number]}"
        encode(output, *settings)
        assert contents(output) == whole, operations[number]
        assert not list(output.glob(".tmp-*"))
    record_property("figure", f"killed before {len(killed)} of {len(operations)} file operations: all byte-identical")


def check_order(operations: list[tuple[str, ...]], names: set[str]) -> None:
    """Every file is written beside its place and forced to the disk before it is renamed, its folder after that."""
    assert {name for kind, name in operations if kind == "replace"} == names
    for number, (kind, name) in enumerate(operations):
        if kind == "replace":
            before, after = operations[number - 3 : number], operations[number + 1]
            assert [kind for kind, _ in before] == ["create", "write", "fsync"]
            assert all(temporary.startswith(".tmp-") and temporary.endswith(name) for _, temporary in before)
            assert after == ("fsync", "whole")
