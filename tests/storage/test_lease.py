"""The lock of a folder, between real processes: on a disk the kernel keeps it, on S3 a lease object does."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ldm_vae.errors import UserError
from ldm_vae.files import write_text
from ldm_vae.storage import open_folder
from ldm_vae.storage import remote as remote_module
from ldm_vae.storage.base import Folder
from ldm_vae.storage.remote import Claim
from tests.s3 import make_older
from tests.waiting import wait_until

NAME = "test.lock"
HOLD = """
import sys
from ldm_vae.storage import open_folder, remote
remote.RENEW_SECONDS = 0.2
folder = open_folder(sys.argv[1])
with folder.lock(sys.argv[2]):
    print("held", flush=True)
    for line in sys.stdin:
        folder.write(line.strip(), b"written")
        print("written", flush=True)
"""


class Holder:
    """Another process that has the lock."""

    def __init__(self, location: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, location, NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        assert self.process.stdout.readline() == "held\n"

    def finish(self) -> int:
        self.process.stdin.close()
        return self.process.wait(120)


@pytest.fixture(params=("local", "s3"))
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(remote_module, "SETTLE_SECONDS", 0.1)
    return str(tmp_path / "set") if request.param == "local" else f"{request.getfixturevalue('bucket')}/set"


@pytest.fixture
def remote(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(remote_module, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(remote_module, "RENEW_SECONDS", 0.1)
    return open_folder(f"{bucket}/set")


@pytest.fixture
def killed() -> Iterator[list[Holder]]:
    """Holders to end with the test, whatever happens."""
    holders: list[Holder] = []
    yield holders
    for holder in holders:
        holder.process.kill()
        holder.process.wait()


def claim(**values: object) -> bytes:
    return json.dumps({"host": "elsewhere", "pid": 1, "machine": "m", "token": "t", "renewed": ""} | values).encode()


@pytest.mark.promise(11)
def test_one_process_holds_a_folder(location: str, killed: list[Holder]) -> None:
    folder = open_folder(location)
    assert folder.holder(NAME) is None
    with folder.lock(NAME):
        folder.write("a.bin", b"1")
        assert folder.holder(NAME)
        with pytest.raises(UserError, match="is using this folder"), folder.lock(NAME):
            pass
    assert folder.holder(NAME) is None
    killed.append(Holder(location))
    who = f"process {killed[0].process.pid} on host "
    assert (folder.holder(NAME) or "").startswith(who)
    with pytest.raises(UserError, match=f"{who}.* is using this folder"), folder.lock(NAME):
        pass
    with folder.lock("another.lock"):  # a lock is its name
        pass
    time.sleep(0.5)  # some renewals
    assert folder.holder(NAME)
    killed[0].process.stdin.write("a.bin\n")
    killed[0].process.stdin.flush()
    assert killed[0].process.stdout.readline() == "written\n"
    assert folder.read("a.bin") == b"written"
    assert killed[0].finish() == 0
    assert folder.holder(NAME) is None
    with folder.lock(NAME):
        pass


@pytest.mark.promise(11)
def test_a_lock_of_another_machine_is_respected_until_it_is_stale(remote: Folder) -> None:
    remote.write(NAME, claim())
    with pytest.raises(UserError, match="process 1 on host elsewhere is using this folder"), remote.lock(NAME):
        pass
    assert remote.holder(NAME) == "process 1 on host elsewhere"
    make_older(remote.location, NAME, remote_module.STALE_SECONDS - 30)
    assert remote.holder(NAME)
    make_older(remote.location, NAME, 60)
    assert remote.holder(NAME) is None
    with remote.lock(NAME):
        assert json.loads(remote.read(NAME))["host"] != "elsewhere"
        make_older(remote.location, NAME, 3600)
        wait_until(lambda: remote.holder(NAME))  # its own is renewed
    assert remote.sizes() == {}
    assert not [name for name, _ in remote._files()], "the probes are removed"


def test_a_lock_is_made_only_where_there_is_none(remote: Folder) -> None:
    """By the store, not by looking first: between the two another process may come."""
    remote.write(NAME, claim())
    remote_module.Lease(remote.connection, NAME)._create()
    assert remote.read(NAME) == claim()


def test_the_same_name_of_a_host_is_not_the_same_machine(remote: Folder) -> None:
    """Containers share host names; their process numbers mean nothing to each other."""
    mine = remote_module.Lease(remote.connection, NAME).claim
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert Claim(mine.host, dead.pid, mine.machine, "t", "").is_dead
    assert not Claim(mine.host, dead.pid, "another boot", "t", "").is_dead
    assert not mine.is_dead


@pytest.mark.promise(11)
def test_another_process_with_the_number_of_a_dead_one_is_told_apart(remote: Folder) -> None:
    """Numbers come again, in containers soon: the same number that began at another time is another process."""
    mine = remote_module.Lease(remote.connection, NAME).claim
    if not mine.started:
        pytest.skip("no /proc here")
    assert replace(mine, started="1").is_dead
    assert not replace(mine, started="").is_dead, "a claim of an older release does not say"
    remote.write(NAME, json.dumps(asdict(replace(mine, started="1"))).encode())
    assert remote.holder(NAME) is None
    with remote.lock(NAME):
        assert json.loads(remote.read(NAME))["started"] == mine.started


@pytest.mark.promise(11)
@pytest.mark.parametrize("named", ["living", "elsewhere", "nobody", "noise"])
def test_a_lock_file_that_no_process_has_open_holds_nobody_up(tmp_path: Path, named: str) -> None:
    """On a disk the kernel knows; what the file says may be of another host, or of a number that came again."""
    words = {"living": f"process {os.getppid()} on host {socket.gethostname()}", "nobody": ""}
    words |= {"elsewhere": "process 1 on host elsewhere", "noise": "\x00\xff" * 5000}
    (tmp_path / NAME).write_text(words[named])
    folder = open_folder(tmp_path)
    assert folder.holder(NAME) is None
    with folder.lock(NAME):
        assert (tmp_path / NAME).read_text() == f"process {os.getpid()} on host {socket.gethostname()}"
    assert not (tmp_path / NAME).exists()


@pytest.mark.promise(11)
def test_a_child_of_a_killed_holder_does_not_have_its_lock(tmp_path: Path) -> None:
    """As the workers of a data loader, which notice after seconds that their process is gone."""
    script = (
        "import os, sys, time; from ldm_vae.storage import open_folder\n"
        "with open_folder(sys.argv[1]).lock(sys.argv[2]):\n"
        "    if os.fork() == 0: sys.stdin.read(); os._exit(0)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), NAME], stdin=subprocess.PIPE)
    assert holder.wait() == -9
    folder = open_folder(tmp_path)
    wait_until(lambda: folder.holder(NAME) is None)  # a child that has just begun
    with folder.lock(NAME):
        assert str(os.getpid()) in (tmp_path / NAME).read_text()
    assert holder.stdin is not None
    holder.stdin.close()


def test_who_opened_the_lock_of_the_one_before_does_not_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock's file goes with it: between opening and locking it, it may be gone, and a new one be another's."""
    import fcntl

    flock, before, other = fcntl.flock, ExitStack(), ExitStack()
    before.enter_context(open_folder(tmp_path).lock(NAME))

    def overtaken(file: object, operation: int) -> None:
        monkeypatch.setattr("fcntl.flock", flock)
        before.close()
        other.enter_context(open_folder(tmp_path).lock(NAME))
        flock(file, operation)

    monkeypatch.setattr("fcntl.flock", overtaken)
    with other, pytest.raises(UserError, match="is using this folder"), open_folder(tmp_path).lock(NAME):
        pass
    assert not (tmp_path / NAME).exists()


def test_a_filesystem_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"this filesystem has no locks \(Function not implemented\)"):
        open_folder(tmp_path).lock(NAME).__enter__()


def test_a_folder_that_was_replaced_is_not_written(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "set")
    with folder.lock(NAME):
        folder.write("a.bin", b"1")
        (tmp_path / "set").rename(tmp_path / "before")
        (tmp_path / "set").mkdir()
        with pytest.raises(UserError, match=r"was removed, replaced or unmounted while in use \(test\.lock"):
            folder.write("b.bin", b"2")
    assert not list((tmp_path / "set").iterdir())


def test_a_lock_that_went_to_another_stops_the_writer(remote: Folder, caplog: pytest.LogCaptureFixture) -> None:
    other = open_folder(remote.location)
    with remote.lock(NAME):
        remote.write("a.bin", b"1")
        (own,) = remote._leases
        other.write(NAME, claim())
        wait_until(lambda: own.lost_to or other.write(NAME, claim()))  # a renewal that was under way writes over it
        with pytest.raises(UserError, match=r"process 1 on host elsewhere took over the lock test\.lock"):
            remote.write("b.bin", b"2")
    assert remote.sizes().keys() == {"a.bin", NAME}, "nothing was written, and the other's lock is left alone"


def test_a_process_that_slept_looks_before_it_writes(remote: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "RENEW_SECONDS", 100.0)
    other = open_folder(remote.location)
    with remote.lock(NAME):
        monkeypatch.setattr(remote_module, "STALE_SECONDS", 0.0)
        remote.write("a.bin", b"1")  # nobody took it: renewed
        other.remove(NAME)
        with pytest.raises(UserError, match="its file is gone"):
            remote.write("b.bin", b"2")


@pytest.mark.promise(11)
@pytest.mark.parametrize("before", ["free", "stale", "unreadable"])
def test_of_many_at_once_one_gets_the_lock(remote: Folder, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "SETTLE_SECONDS", 0.5)
    if before != "free":
        remote.write(NAME, claim() if before == "stale" else b'{"host": 1')
        make_older(remote.location, NAME, 3600)
    barrier, outcomes = threading.Barrier(6), []

    def take() -> None:
        with ExitStack() as stack:
            barrier.wait()
            try:
                stack.enter_context(open_folder(remote.location).lock(NAME))
                outcomes.append("held")
            except UserError as error:
                outcomes.append(str(error).split("is ", 1)[1])
            barrier.wait()

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    refused = f"using this folder ({NAME}); wait for it, or give another folder"
    assert sorted(outcomes) == ["held"] + [refused] * 5
    assert remote.holder(NAME) is None


@pytest.mark.promise(11)
def test_a_killed_process_holds_nothing(location: str, killed: list[Holder]) -> None:
    killed.append(Holder(location))
    folder = open_folder(location)
    with pytest.raises(UserError), folder.lock(NAME):
        pass
    killed[0].process.kill()
    killed[0].process.wait()
    assert folder.holder(NAME) is None
    with folder.lock(NAME):
        folder.write("a.bin", b"1")


def test_another_process_of_the_job_does_not_fill_a_folder_that_was_replaced(tmp_path: Path) -> None:
    main, other = open_folder(tmp_path / "set"), open_folder(tmp_path / "set")
    with main.lock(NAME), other.watch(NAME):
        other.write("a.bin", b"1")
        (tmp_path / "set").rename(tmp_path / "before")
        with pytest.raises(UserError, match=r"was removed, replaced or unmounted while in use \(test\.lock"):
            other.write("b.bin", b"2")
        with pytest.raises(UserError, match=r"was removed, replaced or unmounted"):
            write_text(tmp_path / "set" / "below" / "c.txt", "3")  # whoever writes it
        assert not (tmp_path / "set").exists()
    write_text(tmp_path / "set" / "below" / "c.txt", "3")  # when the job is over


def test_machines_that_do_not_share_the_folder_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_vae.storage.local.VISIBLE_SECONDS", 0.0)
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="is another folder here than for the main process"):
        open_folder(tmp_path / "set").watch(NAME).__enter__()
