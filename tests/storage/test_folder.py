"""What every folder does, on a disk and behind a URL."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import urllib.request
from pathlib import Path

import pytest

from ldm_vae import files
from ldm_vae.errors import UserError
from ldm_vae.storage import open_folder
from ldm_vae.storage import remote as remote_module
from ldm_vae.storage.base import Folder, join
from ldm_vae.storage.local import LocalFolder
from ldm_vae.storage.remote import RemoteFolder
from tests.s3 import Server, requests

KINDS = ("local", "file", "memory", "renaming", "s3")


def location_of(kind: str, request: pytest.FixtureRequest) -> str:
    tmp_path = request.getfixturevalue("tmp_path")
    if kind == "s3":
        return f"{request.getfixturevalue('bucket')}/some/set"
    if kind == "renaming":  # as sftp and others: a write is not one request
        request.getfixturevalue("monkeypatch").setattr(remote_module, "OBJECT_STORES", ())
    urls = {"local": str(tmp_path / "set"), "file": f"file://{tmp_path}/set"}
    return urls.get(kind, f"memory:/{tmp_path}/set")


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest) -> Folder:
    return open_folder(location_of(request.param, request))


@pytest.fixture(params=("memory", "s3"))
def remote(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Folder:
    monkeypatch.setenv("LDM_VAE_CACHE", str(tmp_path / "cache"))
    return open_folder(location_of(request.param, request))


def test_files_are_written_read_listed_and_removed(folder: Folder) -> None:
    assert folder.sizes() == {}
    assert not folder.exists("a.bin")
    folder.write("a.bin", b"0123456789")
    folder.write("b.bin", b"")
    folder.write("a.bin", b"abcdef")  # a second time
    assert folder.exists("a.bin")
    assert (folder.read("a.bin"), folder.read("a.bin", 3), folder.read("a.bin", 99)) == (b"abcdef", b"abc", b"abcdef")
    assert folder.read("b.bin") == folder.read("b.bin", 10) == b""
    assert folder.sizes() == {"a.bin": 6, "b.bin": 0}
    assert folder.sizes("b") == {"b.bin": 0}
    folder.remove("a.bin")
    folder.remove("a.bin")
    assert folder.sizes() == {"b.bin": 0}
    for read in (folder.read, folder.checksum):
        with pytest.raises(FileNotFoundError):
            read("a.bin")


def test_a_listing_has_visible_files_directly_inside(folder: Folder) -> None:
    folder.write("a.bin", b"1")
    folder.write(".hidden", b"2")
    inside = open_folder(join(folder.location, "inside"))
    inside.write("c.bin", b"3")
    assert folder.sizes() == {"a.bin": 1}
    assert inside.sizes() == {"c.bin": 1}
    assert not folder.exists("inside")


def test_leftovers_of_killed_writers_are_cleaned_up(folder: Folder) -> None:
    folder.write(".tmp-12345678-a.bin", b"half")
    folder.write("a.bin", b"whole")
    folder.clean()
    assert not folder.exists(".tmp-12345678-a.bin")
    assert folder.sizes() == {"a.bin": 5}


def test_checksums_do_not_depend_on_the_place(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "BLOCK_BYTES", 1000)
    data = os.urandom(3500)
    folder.write("a.bin", data)
    (tmp_path / "same").write_bytes(data)
    assert folder.checksum("a.bin") == files.checksum(tmp_path / "same")


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "/etc/passwd", "a\\b", "a..b", "a*", "a\0", "a\n"])
def test_names_that_could_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    for folder in (open_folder(tmp_path), open_folder("memory://set")):
        calls = (folder.read, folder.exists, folder.remove, folder.checksum, folder.holder)
        for call in (*calls, lambda name, folder=folder: folder.write(name, b"")):
            with pytest.raises(UserError, match="plain file name"):
                call(name)
    with pytest.raises(UserError, match="plain file name"):
        join("s3://bucket/x", name)


def test_locations_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    home = open_folder("~/set")
    assert isinstance(home, LocalFolder)
    assert (home.path, str(home)) == (tmp_path / "set", "~/set")
    assert isinstance(open_folder("memory://x"), RemoteFolder)
    assert join("s3://bucket/x/", "256") == "s3://bucket/x/256"
    assert join("latents", "256") == "latents/256"
    assert join(Path("latents"), "256") == Path("latents/256")
    assert home.free_bytes()
    assert open_folder("memory://x").free_bytes() is None
    with pytest.raises(AssertionError, match="was a URL"):
        open_folder(Path("s3://bucket/x"))


def test_a_file_is_no_folder(folder: Folder) -> None:
    folder.write("a.bin", b"1")
    with pytest.raises(UserError, match=r"is a file|Not a directory"):
        open_folder(join(folder.location, "a.bin")).sizes()


def test_a_local_file_is_its_own_copy(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.write("a.bin", b"data")
    assert folder.local("a.bin", "unchecked") == tmp_path / "a.bin"
    with pytest.raises(FileNotFoundError):
        folder.local("b.bin", "unchecked")


def test_a_remote_file_is_copied_once_and_checked(remote: Folder, tmp_path: Path) -> None:
    remote.write("a.bin", b"data")
    checksum = remote.checksum("a.bin")
    copy = remote.local("a.bin", checksum)
    assert copy == tmp_path / "cache" / checksum.split(":")[1]
    assert copy.read_bytes() == b"data"
    remote.write("a.bin", b"other")
    with pytest.raises(UserError, match=r"a\.bin: is damaged"):
        remote.local("a.bin", checksum[:-1] + ("0" if checksum[-1] != "0" else "1"))
    assert remote.local("a.bin", checksum) == copy  # by its content: nothing is asked
    assert os.listdir(tmp_path / "cache") == [copy.name]
    with pytest.raises(UserError, match="is not a checksum"):
        remote.local("a.bin", "xxh3_128:../../escape")
    with pytest.raises(FileNotFoundError):
        remote.local("gone.bin", "xxh3_128:" + "0" * 32)


def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LDM_VAE_CACHE", str(tmp_path / "file"))
    folder = open_folder(f"memory:/{tmp_path}")
    folder.write("a.bin", b"data")
    with pytest.raises(UserError, match="LDM_VAE_CACHE"):
        folder.local("a.bin", folder.checksum("a.bin"))


def test_requests_are_few(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = open_folder(f"{bucket}/set")
    with requests(caplog) as made:
        for number in range(30):
            folder.write(f"{number}.bin", b"1234")
    assert made == ["PUT 200"] * 30
    with requests(caplog) as made:
        assert len(folder.sizes()) == 30
    assert made == ["GET 200"]
    with requests(caplog) as made:
        assert (folder.read("1.bin"), folder.read("1.bin", 2)) == (b"1234", b"12")
    assert made == ["GET 206"] * 2


def test_what_others_write_is_seen(bucket: str, s3_session: Server) -> None:
    folder = open_folder(f"{bucket}/set")
    folder.write("a.bin", b"1")
    assert folder.sizes() == {"a.bin": 1}
    url = f"{s3_session.endpoint}/{bucket.removeprefix('s3://')}/set/b.bin"
    request = urllib.request.Request(url, b"12", {"Content-Type": "application/octet-stream"}, method="PUT")
    urllib.request.urlopen(request, timeout=120).close()
    assert folder.sizes() == {"a.bin": 1, "b.bin": 2}


def test_a_long_listing_has_pages(
    bucket: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "4")  # of the server
    folder = open_folder(f"{bucket}/set")
    for number in range(10):
        folder.write(f"{number}.bin", b"1")
    with requests(caplog) as made:
        assert len(folder.sizes()) == 10
    assert made == ["GET 200"] * 3


def test_a_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a write is two steps, an error in the second leaves neither half a file nor the temporary one."""
    from fsspec.implementations.memory import MemoryFileSystem

    def fail(*_: object, **__: object) -> None:
        raise OSError("rename failed")

    monkeypatch.setattr(remote_module, "OBJECT_STORES", ())
    monkeypatch.setattr(remote_module, "PAUSES_SECONDS", ())
    folder = open_folder(f"memory:/{tmp_path}")
    folder.write("a.bin", b"old")
    monkeypatch.setattr(MemoryFileSystem, "mv", fail)
    with pytest.raises(UserError, match="rename failed"):
        folder.write("a.bin", b"new")
    assert folder.read("a.bin") == b"old"
    assert [name for name, _ in folder._files()] == ["a.bin"]


def use_elsewhere(folder: Folder, name: str) -> None:
    """In another process."""
    folder.write(name, folder.read("a.bin") + name.encode())


@pytest.mark.parametrize(("method", "count"), [("fork", 2), ("spawn", 1)])
def test_a_folder_works_in_other_processes(bucket: str, method: str, count: int) -> None:
    folder = open_folder(f"{bucket}/set")
    folder.write("a.bin", b"from ")  # connections are open before the fork
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=use_elsewhere, args=(folder, f"{method}{number}")) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    assert folder.read(f"{method}0") == f"from {method}0".encode()
    assert pickle.loads(pickle.dumps(folder)).sizes() == folder.sizes()


def test_a_read_only_folder_is_explained(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        (tmp_path / "set").write_bytes(b"a file in its place")
    else:
        (tmp_path / "set").mkdir(mode=0o500)
    folder = open_folder(tmp_path / "set")
    with pytest.raises(UserError, match=r"set: cannot be written \("):
        folder.write("a.bin", b"1")


def test_a_full_disk_passes_through() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="No space left") as caught, LocalFolder("x")._explained("written"):
        Path("/dev/full").write_bytes(b"1")
    assert not isinstance(caught.value, UserError)
