"""What goes wrong between here and a store, in words."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time

import pytest

from ldm_vae.errors import UserError
from ldm_vae.storage import open_folder, remote
from ldm_vae.storage.remote import AccessDenied, Connection
from tests.s3 import Server, forget_filesystems


def test_an_outage_is_survived(s3_server: Server, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.1, *[0.3] * 10))
    folder = open_folder(f"{s3_server.new_bucket()}/set")
    folder.write("a.bin", b"1")
    s3_server.stop()
    again = threading.Timer(0.5, s3_server.start)
    again.start()
    with caplog.at_level(logging.WARNING):
        assert folder.read("a.bin") == b"1"
    again.join()
    assert "trying again in" in caplog.text


def test_a_store_that_is_away_is_named(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.1, 0.1))
    location = f"{s3_server.new_bucket()}/set"
    folder = open_folder(location)
    folder.write("a.bin", b"1")
    s3_server.stop()
    calls = (folder.sizes, folder.clean, lambda: folder.read("a.bin"), lambda: folder.exists("a.bin"))
    for call in (*calls, lambda: folder.write("a.bin", b""), lambda: folder.lock("x").__enter__()):
        with pytest.raises(UserError, match=f"{location}: Could not connect.*; check the network") as caught:
            call()
        assert "\n" not in str(caught.value)
    s3_server.start()
    assert folder.read("a.bin") == b"1"


def test_wrong_credentials_are_not_the_fault_of_one_file(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(f"{bucket}/set")
    folder.write("a.bin", b"1")
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # the server now asks who we are
    with pytest.raises(UserError, match=f"{bucket}/set: access denied") as caught:
        folder.read("a.bin")
    assert not isinstance(caught.value, AccessDenied)


def test_an_archived_object_is_the_fault_of_one_file(bucket: str) -> None:
    store = Connection(bucket)
    store.request(lambda filesystem: filesystem.pipe_file(store.path("a.bin"), b"1", StorageClass="GLACIER"))
    with pytest.raises(AccessDenied, match="access denied"):
        store.read("a.bin")


def test_missing_credentials_are_named_at_once(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    forget_filesystems()
    start = time.monotonic()
    with pytest.raises(UserError, match="Unable to locate credentials"):
        open_folder("s3://bucket/set").sizes()
    assert time.monotonic() - start < sum(remote.PAUSES_SECONDS) / 2  # it was not tried again


def test_a_missing_bucket_is_named(s3_session: Server) -> None:
    folder = open_folder("s3://no-such-bucket/set")
    for call in (folder.sizes, lambda: folder.write("a.bin", b"1"), lambda: folder.lock("x").__enter__()):
        with pytest.raises(UserError, match="s3://no-such-bucket/set: no such bucket"):
            call()


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UserError, match=r"nonsense://x: .*; give a path, or a URL"):
        open_folder("nonsense://x")


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from ldm_vae.storage import open_folder\n"
        "try: open_folder('s3://bucket/x')\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("UserError s3://bucket/x: ")
    assert 'pip install "ldm_vae[s3]"' in said
