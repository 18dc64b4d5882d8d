"""Images behind a URL are what the same files in a folder are, and a broken network is not a broken image."""

from __future__ import annotations

import json
import logging
import pickle
import traceback
from pathlib import Path

import numpy as np
import pytest

from ldm_vae.config import load
from ldm_vae.data import open_source
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.folder import FolderSource
from ldm_vae.data.samples import ImageSamples
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.transforms import random_crop
from ldm_vae.errors import UserError
from ldm_vae.storage import remote as remote_module
from ldm_vae.storage.remote import Connection
from ldm_vae.training.loader import Plan, Span, batches
from tests.data.encoded import encode, picture
from tests.s3 import Server, requests

FILES = {
    "b/2.png": encode(picture(16, 24)),
    "a/1.PNG": encode(picture(17, 24)),
    "a/deep/ü 3+%20.jpg": encode(picture(18, 24), "JPEG"),
    "a b.webp": encode(picture(19, 24), "WEBP"),
    "c/empty.png": b"",
    "c/broken.png": b"no image",
    "notes.txt": b"text",
    ".hidden/5.png": encode(picture()),
    "a/.6.png": encode(picture()),
}
TABLES = {
    "folders": {},
    "csv": {"labels.csv": "\ufefffile,label\r\na/1.PNG,9\r\nb/2.png,10\r\n".encode()},
    "json": {"metadata.jsonl": (json.dumps({"file_name": "a/1.PNG", "label": "cat"}) + "\r\n").encode()},
}


def upload(location: str, files: dict[str, bytes]) -> None:
    store = Connection(location)
    store.request(lambda filesystem: filesystem.pipe({store.path(name): data for name, data in files.items()}))


@pytest.fixture(params=["s3", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory:/{tmp_path}/images"
    return f"{request.getfixturevalue('bucket')}/some/images"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "PAUSES_SECONDS", (0.1, 0.1))


def describe(source: FolderSource) -> list[object]:
    def pixels(i: int) -> object:
        try:
            return source.read(i).tobytes()
        except ImageRejected as error:
            return error.reason

    rows = [(source.id(i), source.label(i), pixels(i)) for i in range(len(source))]
    return [source.fingerprint(), source.label_names, *rows]


@pytest.mark.parametrize("labels", TABLES)
def test_it_is_the_source_that_a_local_folder_is(location: str, labels: str, tmp_path: Path) -> None:
    files = FILES | TABLES[labels]
    upload(location, files)
    if location.startswith("s3"):
        upload(location, {"": b"", "marker/": b""})  # as web consoles mark folders
    for name, data in files.items():
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    local, remote = FolderSource(tmp_path / "local"), FolderSource(location + "/")
    assert describe(remote) == describe(local)
    assert len(remote) == 6
    assert local.label_names
    assert describe(pickle.loads(pickle.dumps(remote))) == describe(local)


def test_settings_take_a_url(location: str) -> None:
    upload(location, FILES)
    config = load(DataConfig, None, ["source=folder", f"path={location}", "include=[a/*]", "cache_megabytes=1"])
    assert config.path == location
    source = open_source(config)
    assert [source.id(i) for i in range(len(source))] == ["a/1.PNG", "a/deep/ü 3+%20.jpg"]
    np.testing.assert_array_equal(source.read(0), picture(17, 24))


def test_requests_are_few_and_bounded(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    upload(bucket, FILES)
    with requests(caplog) as made:
        source = FolderSource(bucket)
    assert made == ["GET 200"]
    with requests(caplog) as made:
        source.read(1)
    assert made == ["GET 206"]
    with pytest.raises(ImageRejected, match="more than"):
        FolderSource(bucket, limits=type(source.limits)(file_bytes=30)).read(1)


def test_one_bad_object_is_one_rejected_image(bucket: str) -> None:
    upload(bucket, FILES)
    source, store = FolderSource(bucket), Connection(bucket)
    names = source.names
    store.request(lambda filesystem: filesystem.rm_file(store.path("b/2.png")))
    store.request(lambda filesystem: filesystem.pipe_file(store.path("a b.webp"), b"1", StorageClass="GLACIER"))
    for name, message in (("b/2.png", "not there any more"), ("a b.webp", "access denied")):
        with pytest.raises(ImageRejected, match=message) as caught:
            source.read(names.index(name))
        assert caught.value.reason == "unreadable"
    assert source.read(names.index("a/1.PNG")).shape == (17, 24, 3)


def test_nothing_to_read_is_explained(location: str) -> None:
    with pytest.raises(UserError, match=rf"data\.path: {location}: no such folder"):
        FolderSource(location)
    upload(location, {"a.png": b"1", "notes.txt": b"2"})
    with pytest.raises(UserError, match=r"data\.path: .*a\.png: is a file"):
        FolderSource(f"{location}/a.png")
    upload(f"{location}/texts", {"notes.txt": b"2", "labels.csv": b"x"})
    with pytest.raises(UserError, match=r"found: 1 \.txt\)"):
        FolderSource(f"{location}/texts")


def read_all(source: FolderSource, workers: int) -> list[int]:
    """Indices of the samples of two epochs, through the training loader."""
    samples = ImageSamples(source, random_crop, seed=0)
    plan = Plan((Span(4, len(source) // 2, 1, size=16),))
    return [int(i) for batch in batches(samples, plan, seed=0, workers=workers) for part in batch.parts
            for i in part["index"]]  # fmt: skip


GOOD = {f"{number}.png": encode(picture(16, 24 + number)) for number in range(8)}


def test_forked_workers_read_the_same(bucket: str) -> None:
    upload(bucket, GOOD)
    source = FolderSource(bucket)
    source.read(0)  # a connection that the workers must not share
    assert sorted(read_all(source, 2)) == sorted([*range(8)] * 2)
    assert read_all(source, 2) == read_all(source, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_is_away_stops_the_job(s3_server: Server, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    bucket = s3_server.new_bucket()
    upload(bucket, GOOD)
    source = FolderSource(bucket)
    s3_server.stop()
    with pytest.raises(UserError, match="Could not connect") as caught, caplog.at_level(logging.WARNING):
        read_all(source, workers)
    traceback.clear_frames(caught.tb)  # they hold the workers
    if not workers:
        assert caplog.text.count("trying again") == 2
    s3_server.start()
    assert len(read_all(source, workers)) == 16


def test_refused_credentials_stop_the_job(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(bucket, GOOD)
    source = FolderSource(bucket)
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # the server now asks who we are
    with pytest.raises(UserError, match="access denied"):
        source.read(0)
