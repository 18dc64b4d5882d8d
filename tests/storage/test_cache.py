"""Copies of remote files: whole, fetched once, and few enough, between real processes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm_vae import files
from ldm_vae.errors import UserError
from ldm_vae.storage import cache, open_folder
from ldm_vae.storage.base import Folder
from ldm_vae.storage.cache import Cache
from tests.s3 import requests

DATA = {files.checksum_bytes(bytes([number]) * 1000).split(":")[1]: bytes([number]) * 1000 for number in range(8)}
DIGESTS = list(DATA)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_VAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote(bucket: str, folder: Path) -> Folder:
    remote = open_folder(f"{bucket}/set")
    for number, data in enumerate(DATA.values()):
        remote.write(f"{number}.bin", data)
    return remote


def local(remote: Folder, number: int) -> Path:
    return remote.local(f"{number}.bin", f"xxh3_128:{DIGESTS[number]}")


def get(kept: Cache, number: int) -> Path:
    """A download that cannot be wrong."""
    return kept.get(DIGESTS[number], lambda path: path.write_bytes(DATA[DIGESTS[number]]))


def numbers(folder: Path) -> list[int]:
    """Which copies are there."""
    return sorted(DIGESTS.index(name) for name in os.listdir(folder) if name in DIGESTS)


def in_processes(count: int, target: Callable[..., None], *arguments: object) -> None:
    """`target(number, *arguments)` in forked processes at once."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=(number, *arguments)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0


@pytest.mark.parametrize("damage", [b"", b"\1" * 999, b"\1" * 999 + b"\0", b"\1" * 1001])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_damaged_copy_is_fetched_again(
    damage: bytes, is_known: bool, remote: Folder, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if is_known:  # this process made it
        local(remote, 1)
    folder.mkdir(exist_ok=True)
    (folder / DIGESTS[1]).write_bytes(damage)
    with requests(caplog) as made:
        assert local(remote, 1).read_bytes() == DATA[DIGESTS[1]]
        assert [record.message for record in caplog.records if "damaged; fetching" in record.message]
        local(remote, 1)
    assert made.count("GET 206") == 1
    assert os.listdir(folder) == [DIGESTS[1]]


def test_a_damaged_object_is_told_from_a_damaged_copy(remote: Folder, folder: Path) -> None:
    copy = local(remote, 1)
    for place in (remote.write, lambda _, data: copy.write_bytes(data)):
        place("1.bin", b"damaged")
    for _ in range(2):
        with pytest.raises(UserError, match=r"/1\.bin: is damaged .* `repair`"):
            local(remote, 1)
    remote.write("1.bin", DATA[DIGESTS[1]])
    assert local(remote, 1).read_bytes() == DATA[DIGESTS[1]]


def test_a_copy_is_compared_once_in_a_process(folder: Path) -> None:
    kept = Cache(folder, None)
    copy = get(kept, 1)
    before = copy.stat()
    copy.write_bytes(b"x" * 1000)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))  # nothing but the content says so
    assert get(kept, 1).read_bytes() == b"x" * 1000
    assert get(Cache(folder, None), 1).read_bytes() == DATA[DIGESTS[1]]


def test_the_copies_used_longest_ago_go(remote: Folder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_VAE_CACHE_GB", "3e-6")
    for number in (0, 1, 2, 0, 3):
        assert local(remote, number).read_bytes() == DATA[DIGESTS[number]]
    assert numbers(folder) == [0, 2, 3]
    monkeypatch.setenv("LDM_VAE_CACHE_GB", "0")
    local(remote, 4)
    assert numbers(folder) == [3, 4]  # what was asked for last may not be open yet
    monkeypatch.delenv("LDM_VAE_CACHE_GB")
    for number in range(8):
        local(remote, number)
    assert numbers(folder) == list(range(8))


def test_a_set_that_fits_exactly_is_fetched_once(folder: Path) -> None:
    kept = Cache(folder, 8000)
    for _ in range(2):
        for number in range(8):
            get(kept, number)
        assert numbers(folder) == list(range(8))


def test_large_caches_are_not_listed_each_time(folder: Path) -> None:
    kept = Cache(folder, 1000 * 300)
    get(kept, 0)
    (folder / f".tmp-12345678-{DIGESTS[0]}").touch()
    os.utime(folder / f".tmp-12345678-{DIGESTS[0]}", (0, 0))
    get(kept, 1)  # 1/300 of the limit
    assert len(os.listdir(folder)) == 3
    get(kept, 2)
    assert numbers(folder) == [0, 1, 2]
    assert len(os.listdir(folder)) == 3


def test_some_of_the_disk_is_kept_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Cache(folder, None)
    for number in range(3):
        get(kept, number)
    assert numbers(folder) == [0, 1, 2]
    monkeypatch.setattr(cache, "KEEP_FREE_SHARE", 1.0)  # no disk is that empty
    get(kept, 3)
    assert numbers(folder) == [3]


def test_only_our_own_files_are_removed(folder: Path) -> None:
    folder.mkdir()
    killed = [f".tmp-12345678-{DIGESTS[0]}", f".{DIGESTS[1]}.lock"]
    others = ["notes.txt", ".hidden", ".tmp-12345678-notes.txt", DIGESTS[0].upper() + "F"]
    for name in (*killed, *others):
        (folder / name).write_bytes(b"x" * 1000)
        os.utime(folder / name, (0, 0))
    young = f".tmp-87654321-{DIGESTS[0]}"
    (folder / young).touch()
    get(Cache(folder, 0), 2)
    assert sorted(os.listdir(folder)) == sorted([*others, young, DIGESTS[2]])


def test_a_full_disk_makes_older_copies_go(folder: Path) -> None:
    kept = Cache(folder, None)
    for number in range(3):
        get(kept, number)

    def download(path: Path) -> None:
        path.write_bytes(b"half")
        if numbers(folder) == [0, 1, 2]:
            raise OSError(errno.EDQUOT, "quota exceeded")
        path.write_bytes(DATA[DIGESTS[3]])

    kept.get(DIGESTS[3], download)
    assert numbers(folder) == [1, 2, 3]

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        kept.get(DIGESTS[4], fail)
    assert os.listdir(folder) == []  # all was tried


def test_a_mapped_copy_survives_its_removal(folder: Path) -> None:
    kept = Cache(folder, 0)
    with open(get(kept, 1), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        get(kept, 2)
        assert numbers(folder) == [2]
        assert mapped[:] == DATA[DIGESTS[1]]


@pytest.mark.parametrize("text", ["much", "-1", "inf", "nan"])
def test_a_limit_is_a_number(text: str, remote: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_VAE_CACHE_GB", text)
    with pytest.raises(UserError, match=f"LDM_VAE_CACHE_GB={text}: is not a number"):
        local(remote, 0)


def read_all(_: int, remote: Folder, start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
    for number in range(5):
        assert local(remote, number).read_bytes() == DATA[DIGESTS[number]]


def test_processes_fetch_each_file_once(remote: Folder, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with requests(caplog) as made:
        in_processes(4, read_all, remote, time.time() + 0.3)
    assert made.count("GET 206") == 5
    assert sorted(os.listdir(folder)) == sorted(DIGESTS[:5])  # no lock is left


def race(seed: int, folder: Path) -> None:
    rng, kept = random.Random(seed), Cache(folder, 0)
    for _ in range(300):
        number = rng.randrange(4)
        copy = get(kept, number)
        if not rng.randrange(10):
            time.sleep(0.002)
        assert copy.read_bytes() == DATA[DIGESTS[number]]


def test_a_copy_stays_until_it_is_opened(folder: Path) -> None:
    """While other processes fetch others, and each of them wants all the room."""
    in_processes(4, race, folder)
    assert len(numbers(folder)) <= 4
    assert all(name in DIGESTS for name in os.listdir(folder))


def test_a_waiting_process_takes_over_from_one_that_fails(folder: Path) -> None:
    started, errors = threading.Event(), []

    def fail(path: Path) -> None:
        started.set()
        time.sleep(0.1)
        raise UserError("the store is gone")

    def try_it() -> None:
        with pytest.raises(UserError, match="is gone"):
            Cache(folder, None).get(DIGESTS[0], fail)
        errors.append("raised")

    thread = threading.Thread(target=try_it)
    thread.start()
    assert started.wait(60)
    assert get(Cache(folder, None), 0).read_bytes() == DATA[DIGESTS[0]]
    thread.join()
    assert errors == ["raised"]
    assert os.listdir(folder) == [DIGESTS[0]]


STUCK = """
import sys, time
from pathlib import Path
from ldm_vae.storage.cache import Cache
def download(path):
    path.write_bytes(b"half")
    print("started", flush=True)
    time.sleep(60)
Cache(Path(sys.argv[1]), None).get(sys.argv[2], download)
"""


def test_nobody_waits_for_dead_or_stopped_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 0.2)
    command = [sys.executable, "-c", STUCK, str(folder), DIGESTS[0]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            start = time.monotonic()
            assert get(Cache(folder, None), 0).read_bytes() == DATA[DIGESTS[0]]
            assert time.monotonic() - start > 0.2  # it is waited for, but not for ever
        finally:
            process.kill()
    (folder / DIGESTS[0]).unlink()
    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 30.0)
    start = time.monotonic()
    get(Cache(folder, None), 0)
    assert time.monotonic() - start < 10
    assert len(os.listdir(folder)) == 2  # the dead process's half is removed after a day


def test_a_filesystem_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    kept = Cache(folder, 0)
    get(kept, 0)
    get(kept, 1)
    assert numbers(folder) == [0, 1]  # somebody may be about to open it
    os.utime(folder / DIGESTS[0], (time.time() - 100, (folder / DIGESTS[0]).stat().st_mtime))
    get(kept, 2)
    assert numbers(folder) == [1, 2]


WITHOUT = """
import sys
sys.modules["fcntl"] = None
from pathlib import Path
from ldm_vae.storage import open_folder
from ldm_vae.storage.cache import Cache
folder = open_folder(sys.argv[1])
folder.write("a.bin", b"data")
assert folder.local("a.bin", folder.checksum("a.bin")).read_bytes() == b"data"
digest = folder.checksum("a.bin").split(":")[1]
for _ in range(2):
    copy = Cache(Path(sys.argv[1]) / "cache", 0).get(digest, lambda path: path.write_bytes(b"data"))
    assert copy.read_bytes() == b"data"
"""


def test_a_system_without_locks(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path)], check=True)
