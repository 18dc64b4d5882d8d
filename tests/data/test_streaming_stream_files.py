"""Counted streams: the same rows as the library's own reading, from any row on, and from the files that hold them."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest

from ldm_vae.config import load
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.split import Part, part_of
from ldm_vae.data.streaming import STRIDE, Item, PartRows, StreamingSource, open_stream
from ldm_vae.errors import UserError

Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module", autouse=True)
def silent() -> None:
    datasets.disable_progress_bars()


def write_tar(path: Path, members: Members, mode: Any = "w", **options: Any) -> None:
    with tarfile.open(path, mode, **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            archive.addfile(member, io.BytesIO(data))


def samples(file: int, count: int) -> Members:
    """Bytes that tell the sample; nobody decodes them here."""
    return [
        (f"{file}/{i:04d}.{suffix}", data)
        for i in range(count)
        for suffix, data in (("png", b"%d-%d" % (file, i) * 50), ("json", b"{}"), ("cls", b"%d" % (i % 2)))
    ]


ODDITIES: Members = [
    ("1/", b""),
    ("1/.hidden.png", b"hidden"),
    ("1/__index.json", b"{}"),
    ("1/no_suffix", b""),
    ("1/again.cls", b"1"),  # a sample without an image
    ("1/" + "long" * 60 + ".png", b"a name that needs a header of its own"),
    ("1/again.png", b"another sample, although the key was there"),
    ("1/two.dots.png", b"of the key `two`, in a column `dots.png`"),
    ("1/squeezed.cls.gz", gzip.compress(b"1")),
]


@pytest.fixture(params=["gnu", "pax", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Four files (0, 1, 2, 3), of 10, 2 STRIDE + 9 or more, 0 or 1, and 40 rows."""
    if request.param == "parquet":
        features = datasets.Features(
            png=datasets.Image(), json=datasets.Value("string"), cls=datasets.ClassLabel(names=["a", "b"])
        )
        for file, count in enumerate((10, 2 * STRIDE + 9, 0, 40)):
            rows = {
                "png": [{"bytes": b"%d-%d" % (file, i) * 50, "path": None} for i in range(count)],
                "json": ["{}"] * count,
                "cls": [i % 2 for i in range(count)],
            }
            path = tmp_path / f"{file}.parquet"
            datasets.Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=7)
        return tmp_path
    style = {"format": tarfile.GNU_FORMAT if request.param == "gnu" else tarfile.PAX_FORMAT}
    write_tar(tmp_path / "0.tar", samples(0, 10), **style)
    write_tar(tmp_path / "1.tar", samples(1, STRIDE) + ODDITIES + samples(1, STRIDE + 5), **style)
    write_tar(tmp_path / "2.tar", [], **style)
    write_tar(tmp_path / "3.tar", samples(3, 40), **style)
    return tmp_path


def stream_of(folder: Path, *overrides: str) -> StreamingSource:
    suffix = min(folder.iterdir()).suffix
    settings = [f"name={folder}/*{suffix}", "streaming=true", "image_column=png", "label_column=cls"]
    settings += ["label_names=[a,b]", *overrides]
    return open_stream(load(DataConfig, None, ["source=datasets", *(f"datasets.{setting}" for setting in settings)]))


def content(items: Any) -> list[tuple[int, str, int, bytes | None]]:
    def one(item: Item) -> tuple[int, str, int, bytes | None]:
        return item.index, item.id, item.label, item.image and item.image["bytes"]

    return [one(item) for item in items]


@pytest.mark.parametrize(
    "choose",
    [
        lambda rows: rows,
        lambda rows: rows[::3],
        lambda rows: rows[11:13] + rows[STRIDE + 9 : STRIDE + 12] + rows[-1:],
        lambda rows: rows[20 + 2 * STRIDE :],
        lambda rows: [],
    ],
    ids=["all", "every third", "some", "end", "none"],
)
def test_any_rows_are_those_of_the_whole_stream(folder: Path, choose: Callable[[list[int]], list[int]]) -> None:
    stream = stream_of(folder)
    files, expected = stream.files(), content(stream.iterate())
    assert files is not None
    assert files.count == len(expected) == sum(files.rows)
    assert (files.rows[0], files.rows[2], files.rows[3]) == (10, 0, 40)
    rows = choose(list(range(files.count)))
    assert content(stream.read(files, rows)) == [expected[row] for row in rows]


def test_only_files_with_a_wanted_row_are_opened(folder: Path) -> None:
    stream = stream_of(folder)
    files, expected = stream.files(), content(stream.iterate())
    assert files is not None
    for path in folder.glob("[12].*"):
        path.unlink()
    rows = [*range(3, 7), *range(files.count - 40, files.count - 9)]
    assert content(stream.read(files, rows)) == [expected[row] for row in rows]
    with pytest.raises(UserError, match=r"1\.\w+: cannot be read \(.*No such file.*replace or remove it"):
        list(stream.read(files, [9, 10]))


def test_a_damaged_file_is_named(folder: Path) -> None:
    stream, path = stream_of(folder), next(folder.glob("3.*"))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"3\.\w+: cannot be read"):
        stream.files()


def test_a_file_that_became_shorter_is_named(folder: Path) -> None:
    stream, path = stream_of(folder), next(folder.glob("3.*"))
    files = stream.files()
    assert files is not None
    path.write_bytes(next(folder.glob("0.*")).read_bytes())
    assert len(list(stream.read(files, range(files.count - 40, files.count - 30)))) == 10
    with pytest.raises(UserError, match=r"3\.\w+: .* counted; start again"):
        list(stream.read(files, [files.count - 1]))


def test_what_cannot_be_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples(0, 6), "w:gz")
    stream = stream_of(tmp_path)
    assert stream.files() is None
    assert len(list(stream.iterate())) == 6
    datasets.Dataset.from_dict({"image": [b"x"]}).save_to_disk(tmp_path / "saved")
    saved = ["source=datasets", f"datasets.name={tmp_path / 'saved'}", "datasets.streaming=true"]
    assert open_stream(load(DataConfig, None, saved)).files() is None


def test_remote_files(folder: Path, bucket: str) -> None:
    import fsspec

    expected = content(stream_of(folder).iterate())
    fsspec.filesystem("s3").put(f"{folder}/*", bucket)
    stream = stream_of(folder, f"name={bucket}/*{min(folder.iterdir()).suffix}")
    files = pickle.loads(pickle.dumps(stream)).files()
    assert files is not None
    assert files.count == len(expected)
    assert content(stream.read(files, range(5, files.count, 7))) == expected[5::7]
    assert content(stream.iterate()) == expected
    fsspec.filesystem("s3").rm_file(f"{bucket}/{min(folder.iterdir()).name}")
    with pytest.raises(UserError, match=r"0\.\w+: cannot be read"):
        list(stream.read(files, [0]))


@pytest.mark.parametrize("held_out", [0.0, 0.3])
def test_the_rows_of_a_part(held_out: float) -> None:
    count = 2**14 + 5000
    parts = {part: PartRows("train", count, part, held_out) for part in get_args(Part)}
    whole = {part: list(rows.rows(0, len(rows))) for part, rows in parts.items()}
    assert whole["all"] == list(range(count))
    assert whole["train"] == [i for i in range(count) if part_of(f"train/{i:09d}", held_out) == "train"]
    assert sorted(whole["train"] + whole["held_out"]) == whole["all"]
    assert sorted(whole["validation"] + whole["test"]) == whole["held_out"]
    for part, rows in whole.items():
        for start in (0, 100, len(rows) // 2, max(0, len(rows) - 7)):
            assert list(parts[part].rows(start, min(start + 7, len(rows)))) == rows[start : start + 7]
