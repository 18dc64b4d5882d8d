"""Checkpoints: complete or absent whatever happens while one is written, every damage found, nothing not finite."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm_vae.errors import EXIT_USER_ERROR, DamagedFile, NewerFormat, UserError
from ldm_vae.files import verify_checksums
from ldm_vae.training.checkpoint import (
    Checkpoint,
    load_optimizer_tensors,
    newest,
    optimizer_tensors,
    read_checkpoint,
    write_checkpoint,
)
from tests.training import faults


def checkpoint(step: int) -> Checkpoint:
    rng = torch.Generator().manual_seed(step)
    return Checkpoint(step, {"net": {"a.weight": torch.randn(8, 8, generator=rng)}}, {"seconds": 1.5, "model": {}})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(path: Path) -> bool:
    try:
        verify_checksums(path)
    except (DamagedFile, NewerFormat):  # newer: a flipped bit in the format version
        return True
    return False


def whole(folder: Path) -> list[int]:
    """The steps of all that is visible as a checkpoint; each of them must be whole."""
    found = sorted(folder.glob("step-*"))
    for path in found:
        verify_checksums(path)
    return [int(path.name.removeprefix("step-")) for path in found]


def test_round_trip(tmp_path):
    path = write_checkpoint(tmp_path, checkpoint(7), keep=2)
    assert path.name == "step-000000007"
    loaded = read_checkpoint(path)
    assert (loaded.step, loaded.state) == (7, {"seconds": 1.5, "model": {}})
    assert torch.equal(loaded.tensors["net"]["a.weight"], checkpoint(7).tensors["net"]["a.weight"])


def test_the_newest_good_one_is_taken_and_the_damaged_one_named(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, checkpoint(step), keep=2)
    file = tmp_path / "step-000000002" / "net.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    path, problems = newest(tmp_path)
    assert path is not None
    assert path.name == "step-000000001"
    assert "net.safetensors is damaged; it is passed over, and is now called damaged-step-000000002" in problems[0]
    assert newest(tmp_path) == (path, [])
    write_checkpoint(tmp_path, checkpoint(3), keep=2)
    assert names(tmp_path)[1:] == ["step-000000001", "step-000000003"]  # the damaged one is none of the two


def test_where_all_are_damaged_nothing_begins_anew(tmp_path):
    for step in (1, 2):
        (write_checkpoint(tmp_path, checkpoint(step), keep=2) / "net.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"none of the checkpoints can be used \(step-000000002: net.*to start again"
        ):
            newest(tmp_path)


def test_every_flipped_bit_and_truncation_is_found(tmp_path):
    path = write_checkpoint(tmp_path, checkpoint(1), keep=2)
    rng = random.Random(0)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for _ in range(100):
            damaged = bytearray(original)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            assert refused(path), file.name
        for length in range(0, len(original), 7):
            file.write_bytes(original[:length])
            with pytest.raises(DamagedFile):
                verify_checksums(path)
        file.write_bytes(original)
        verify_checksums(path)


def test_a_missing_file_is_found(tmp_path):
    path = write_checkpoint(tmp_path, checkpoint(1), keep=2)
    (path / "net.safetensors").unlink()
    with pytest.raises(DamagedFile, match=r"net\.safetensors is missing"):
        verify_checksums(path)


def test_a_newer_format_is_refused_with_advice(tmp_path):
    path = write_checkpoint(tmp_path, checkpoint(1), keep=2)
    manifest = path / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(NewerFormat, match="update ldm_vae"):
        newest(tmp_path)


def test_old_ones_go_but_never_below_two(tmp_path):
    for step in range(1, 6):
        write_checkpoint(tmp_path, checkpoint(step), keep=0)
    assert names(tmp_path) == ["step-000000004", "step-000000005"]


def test_leftovers_of_a_crash_are_ignored_and_removed(tmp_path):
    (tmp_path / ".tmp-dead-step-000000009").mkdir()
    assert newest(tmp_path)[0] is None
    write_checkpoint(tmp_path, checkpoint(1), keep=2)
    assert names(tmp_path) == ["step-000000001"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    bad = checkpoint(3)
    bad.tensors["net"]["a.weight"][0, 0] = float("inf")
    with pytest.raises(UserError, match=r"'a\.weight' is not finite"):
        write_checkpoint(tmp_path, bad, keep=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_optimizer_state_round_trip(memory_format):
    """Tensors travel through files as contiguous ones; a channels_last weight needs its moments in its own order."""
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def make():
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    def step(layer, optimizer):
        layer(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, second = make(), make()
    step(*first)
    second[0].load_state_dict(first[0].state_dict())
    load_optimizer_tensors(
        second[1], {k: v.clone(memory_format=torch.contiguous_format) for k, v in optimizer_tensors(first[1]).items()}
    )
    step(*first)
    step(*second)
    assert torch.equal(first[0].weight, second[0].weight)


@pytest.fixture
def begin(tmp_path: Path) -> Callable[[], Path]:
    """A folder with the checkpoints 1 and 2, and with what kills have left: the same at each call."""
    pattern, folder = tmp_path / "pattern", tmp_path / "checkpoints"
    pattern.mkdir()
    for step in (1, 2):
        write_checkpoint(pattern, checkpoint(step), keep=2)
    for leftover in (".tmp-dead-step-000000003", ".trash-dead-step-000000000"):
        (pattern / leftover).mkdir()
        (pattern / leftover / "net.safetensors").write_bytes(b"half")

    def begin() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(pattern, folder)

    return begin


def third(folder: Path) -> None:
    write_checkpoint(folder, checkpoint(3), keep=2)


@pytest.mark.promise(1)
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_at_any_file_operation_leaves_whole_checkpoints(begin, tmp_path, every, record_property):
    faults.require_strace()
    folder = begin()
    code, operations = faults.watched(lambda: third(folder), tmp_path / "record")
    assert code == 0
    places = faults.places(operations)
    assert len(places) > 50
    for name, number in places[::every]:
        begin()
        inject = ("-e", f"inject={name}:signal=KILL:when={number}")
        assert faults.watched(lambda: third(folder), tmp_path / "record", *inject)[0] == -signal.SIGKILL, (name, number)
        assert whole(folder)[-2:] in ([1, 2], [2, 3]), (name, number)
        third(folder)
        assert names(folder) == ["step-000000002", "step-000000003"]
        assert newest(folder) == (folder / "step-000000003", [])
    record_property("figure", f"{len(places[::every])} of the {len(places)} file operations of a save, each crashed "
                    "once: 0 torn checkpoints, at least 2 whole ones each time, the next save succeeds")  # fmt: skip


@pytest.mark.promise(5)
@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.slow)])
def test_a_system_error_at_any_file_operation_is_one_sentence(begin, tmp_path, every, record_property):
    """ENOSPC and EDQUOT: full; EIO: a broken disk; EROFS: it turned read-only; ESTALE: the server forgot it."""
    faults.require_strace()
    folder = begin()
    _, operations = faults.watched(lambda: third(folder), tmp_path / "record")
    places, refused, tolerated = faults.places(operations), 0, 0
    for error, (name, number) in itertools.product(("ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE"), places[::every]):
        begin()
        inject = ("-e", f"inject={name}:error={error}:when={number}")
        code, _ = faults.watched(lambda: third(folder), tmp_path / "record", *inject)
        assert code in (0, EXIT_USER_ERROR), (error, name, number)  # 0: of what was only to be removed
        refused, tolerated = refused + (code != 0), tolerated + (code == 0)
        assert whole(folder)[-2:] in ([[2, 3]] if code == 0 else [[1, 2], [2, 3]]), (error, name, number)
        third(folder)
        assert names(folder) == ["step-000000002", "step-000000003"]
    assert refused > 3 * tolerated
    record_property("figure", f"{refused + tolerated} failing file operations (5 errors): {refused} one-line errors, "
                    f"{tolerated} without consequence, checkpoints whole each time")  # fmt: skip


@pytest.mark.promise(1)
def test_every_byte_is_on_the_disk_before_the_checkpoint_has_its_name(begin, tmp_path, record_property):
    """write, then fsync of each file, then fsync of their folder, then rename, then fsync of the folder above."""
    faults.require_strace()
    folder = begin()
    _, operations = faults.watched(lambda: third(folder), tmp_path / "record")
    written: set[str] = set()
    published = None
    for line in operations:
        if match := re.match(r"(?:write|pwrite64|ftruncate)\(\d+<(.*?)>", line):
            written |= {match[1], os.path.dirname(match[1])}
        elif match := re.match(r"fsync\(\d+<(.*?)>", line):
            written.discard(match[1])
        elif match := re.match(r'rename(?:at)?\((?:AT_FDCWD<.*?>, )?"(.*?)", (?:AT_FDCWD<.*?>, )?"(.*?)"', line):
            source, target = match[1], match[2]
            if target.endswith("/step-000000003"):
                assert written == set()
                published, written = target, {os.path.dirname(target)}
            elif published is not None:
                assert written == set(), "removed before the new one was on the disk"
            elif source in written:
                written = written - {source} | {target, os.path.dirname(target)}
    assert published is not None
    record_property("figure", f"{len(operations)} system calls in the order write, fsync, rename, fsync of the folder")


@pytest.mark.promise(1)
@pytest.mark.parametrize("trials", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_random_kills_while_saving_never_cost_a_published_checkpoint(tmp_path, trials, record_property):
    """A process saves one after another, 4 MB each, and says when each begins; SIGKILL comes at any moment."""
    choose, inside, step = random.Random(0), 0, 0

    def large(step: int) -> Checkpoint:
        rng = torch.Generator().manual_seed(step)
        return Checkpoint(step, {name: {"a": torch.randn(2**19, generator=rng)} for name in ("net", "net-ema")})

    (tmp_path / "measured").mkdir()
    first, seconds = large(0), -time.monotonic()
    write_checkpoint(tmp_path / "measured", first, keep=0)
    seconds += time.monotonic()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for trial in range(10 * trials):
        if trial >= trials and inside:
            break
        hear, tell = os.pipe()

        def forever(first: int = step + 1, tell: int = tell) -> None:
            for step in itertools.count(first):
                made = large(step)
                os.write(tell, b".")
                write_checkpoint(folder, made, keep=0)

        process = faults.fork(forever)
        os.close(tell)
        with open(hear, "rb", buffering=0) as file:
            begun = sum(len(file.read(1)) for _ in range(choose.randrange(1, 4)))
            time.sleep(choose.uniform(0, seconds))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            announced = step + begun + len(file.read()) - 1
        inside += bool(list(folder.glob(".tmp-*")))
        steps = whole(folder)
        assert len(steps) >= min(2, announced)
        path, problems = newest(folder)
        assert problems == []
        if path is not None:
            step = steps[-1]
            assert step in (announced, announced + 1)
            assert torch.equal(read_checkpoint(path).tensors["net-ema"]["a"], large(step).tensors["net-ema"]["a"])
    assert step > trials // 4
    assert inside
    record_property("figure", f"{trial} kills ({inside} inside a write), {step} checkpoints: the newest always loads, "
                    "none that was announced is lost, never fewer than 2")  # fmt: skip
