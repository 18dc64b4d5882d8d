"""Every file of the corpus is read rightly or named with its reason, whichever way it comes and whoever reads it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm_vae import cli
from ldm_vae import config as configuration
from ldm_vae.data import open_source
from ldm_vae.data.decoding import DecodeLimits, ImageRejected, decode_image
from ldm_vae.data.folder import FolderSource
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.streaming import open_stream
from tests.data import hostile
from tests.data.encoded import encode, picture
from tests.data.hostile import Hostile, check, corpus
from tests.latents.conftest import autoencoder_directory  # noqa: F401 - a fixture

HOSTILE = Path(hostile.__file__)
MOST_MEGABYTES, MOST_SECONDS = 1024, 2.0


@pytest.fixture(scope="module", autouse=True)
def silent() -> None:
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as files, and what only a file system can do to a reader. Nobody may change it."""
    path = tmp_path_factory.mktemp("hostile")
    for file in corpus():
        (path / file.name).write_bytes(file.data)
    os.symlink("loop.png", path / "loop.png")
    os.symlink("there.png", path / "here.png")
    os.symlink("here.png", path / "there.png")
    os.symlink(path / "nowhere.png", path / "dangling.png")
    os.symlink(path, path / "round.png")
    os.mkfifo(path / "pipe.png")
    (path / "folder.png").mkdir()
    Path(os.fsdecode(os.fsencode(path) + b"/latin-\xe9.png")).write_bytes(encode(picture()))
    return path


UNREADABLE = ("dangling.png", "here.png", "loop.png", "pipe.png", "there.png")
OTHER_FILES = (*(Hostile(name, b"", reason="unreadable") for name in UNREADABLE),
               Hostile("latin-\\xe9.png", b"", picture()))  # fmt: skip


def in_folder() -> dict[str, Hostile]:
    return {file.name: file for file in (*corpus(), *OTHER_FILES)}


def rejected_in_folder() -> dict[str, str]:
    return {name: file.reason for name, file in in_folder().items() if file.reason is not None}


def rows_of_a_table(directory: Path) -> list[tuple[bytes | None, str | None, Hostile]]:
    """(bytes, path) of the cells of an image column: the corpus, and what only a table can do to a reader."""
    os.mkfifo(directory / "pipe.png")
    return [
        *((file.data, None, file) for file in corpus()),
        (None, None, Hostile("neither bytes nor path", b"", reason="empty")),
        (b"", str(HOSTILE), Hostile("no bytes beside a path", b"", reason="empty")),
        (None, str(directory / "gone.png"), Hostile("path to nothing", b"", reason="unreadable")),
        (None, str(directory / "pipe.png"), Hostile("path to a pipe", b"", reason="unreadable")),
    ]


def write_table(rows: list[tuple[bytes | None, str | None, Hostile]], kind: str, directory: Path) -> str:
    """A file or folder that `datasets` loads, with the column `image`."""
    contents, paths = pa.array([row[0] for row in rows], pa.binary()), pa.array([row[1] for row in rows], pa.string())
    table = pa.table({"image": pa.StructArray.from_arrays([contents, paths], ["bytes", "path"])})
    metadata = datasets.Features({"image": datasets.Image(decode=False)}).arrow_schema.metadata
    table = table.replace_schema_metadata(metadata)
    if kind == "arrow":
        path = directory / "table.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path = directory / "table.parquet"
        pq.write_table(table, path)
    return str(path)


@pytest.mark.promise(7)
def test_every_file_of_a_folder_is_read_rightly_or_named(folder: Path, record_property: Any) -> None:
    source = FolderSource(folder)
    expected = in_folder()
    assert sorted(source.id(i) for i in range(len(source))) == sorted(expected), "a file is passed over"
    wrong = [check(expected[source.id(i)], lambda i=i: source.read(i)) for i in range(len(source))]
    assert [sentence for sentence in wrong if sentence] == []
    assert len(corpus()) >= 60
    rejected = len(rejected_in_folder())
    record_property("figure", f"{len(source)} files in a folder: {len(source) - rejected} right, {rejected} named")


@pytest.mark.promise(7)
@pytest.mark.parametrize("kind", ["parquet", "arrow", "parquet stream"])
def test_every_row_of_a_table_is_read_rightly_or_named(tmp_path: Path, kind: str, record_property: Any) -> None:
    rows = rows_of_a_table(tmp_path)
    name = write_table(rows, kind, tmp_path)
    overrides = ["source=datasets", f"datasets.name={name}", f"datasets.streaming={'stream' in kind}".lower()]
    config = configuration.load(DataConfig, None, overrides)
    wrong = [check(file, read) for (*_, file), read in zip(rows, readers(config), strict=True)]
    assert [sentence for sentence in wrong if sentence] == []
    record_property("figure", f"{len(rows)} rows of {kind}: all right or named")


@pytest.mark.promise(7)
@pytest.mark.parametrize("counted", [False, True])
def test_every_member_of_a_tar_stream_is_read_rightly_or_named(
    tmp_path: Path, counted: bool, record_property: Any
) -> None:
    files = (*corpus(), Hostile("empty at the end", b"", reason="empty"))
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as archive:
        for number, file in enumerate(files):
            name = os.fsdecode(b"%04d-\xe9.jpg" % number) if number == 9 else f"{number:04d}.jpg"
            member = tarfile.TarInfo(name)
            member.size = len(file.data)
            archive.addfile(member, io.BytesIO(file.data))
    overrides = ["source=datasets", f"datasets.name={path}", "datasets.streaming=true", "datasets.image_column=jpg"]
    config = configuration.load(DataConfig, None, overrides)
    stream = open_stream(config)
    if counted:
        listed = stream.files()
        assert listed is not None
        items = stream.read(listed, range(listed.count))
    else:
        items = stream.iterate()
    wrong = [check(file, item.read) for file, item in zip(files, items, strict=True)]
    assert [sentence for sentence in wrong if sentence] == []
    record_property("figure", f"{len(files)} members of a tar stream: all right or named")


def readers(config: DataConfig) -> Iterator[Callable[[], np.ndarray]]:
    if config.streaming:
        yield from (item.read for item in open_stream(config).iterate())
        return
    source = open_source(config)
    yield from ((lambda i=i: source.read(i)) for i in range(len(source)))


@pytest.mark.promise(7)
def test_training_names_every_file_that_it_could_not_read(folder: Path, tmp_path: Path, record_property: Any) -> None:
    """More than two epochs over the corpus, with an autoencoder of the smallest kind."""
    expected, run = rejected_in_folder(), tmp_path / "run"
    steps = -(-2 * len(in_folder()) // 16) + 1
    words = [
        f"output={run}", "data.source=folder", f"data.path={folder}", "data.held_out=0", "autoencoder.preset=pico",
        "autoencoder.latent_channels=2", f"phases=[{{steps: {steps}, crop: 32, batch: 16, perceptual: 0}}]",
        "training.precision=fp32", "training.device=cpu", "training.workers=0", "training.tracker=none",
        "training.log_every=4", "training.preview_every=1000", "held_out_images=0",
    ]  # fmt: skip
    assert cli.main(["train-vae", *words]) == 0
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == expected
    assert len(lines) == len(expected), "each is named once"
    record_property("figure", f"training over {len(in_folder())} files: finished, {len(expected)} named, none twice")


@pytest.mark.promise(7)
def test_encoding_takes_or_lists_every_file(
    folder: Path, autoencoder_directory: Path, tmp_path: Path, record_property: Any  # noqa: F811
) -> None:  # fmt: skip
    from ldm_vae.latents.format import read_manifest

    words = [
        f"output={tmp_path / 'set'}", f"autoencoder={autoencoder_directory}", "data.source=folder",
        f"data.path={folder}", "resolution=32", "batch=8", "shard_size=16", "workers=0", "device=cpu",
    ]  # fmt: skip
    assert cli.main(["encode", *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "set" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == rejected_in_folder()
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.count, manifest.rejected) == (len(in_folder()) - len(lines), len(lines))
    record_property("figure", f"encoding {len(in_folder())} files: {manifest.count} latents + {len(lines)} listed")


@pytest.mark.promise(7)
def test_evaluation_measures_or_lists_every_file(
    folder: Path, autoencoder_directory: Path, tmp_path: Path, record_property: Any  # noqa: F811
) -> None:  # fmt: skip
    from ldm_vae.evaluation.reconstruction import EvaluateConfig, evaluate

    results = evaluate(
        EvaluateConfig(
            autoencoder=str(autoencoder_directory),
            output=str(tmp_path / "evaluation"),
            data=DataConfig(source="folder", path=str(folder)),
            part="all",
            resolution=32,
            examples=1,
            codecs=[],
            device="cpu",
        )
    )
    listed = {item["id"]: item["reason"] for item in results["rejected"]}
    assert listed == rejected_in_folder()
    assert len(results["images"]) + len(listed) == len(in_folder())
    record_property("figure", f"evaluating {len(in_folder())} files: {len(results['images'])} measured, rest listed")


def test_the_pixel_limit_can_be_set_and_is_stated(folder: Path) -> None:
    config = configuration.load(DataConfig, None, ["source=folder", f"path={folder}", "maximum_megapixels=1"])
    assert config.limits == DecodeLimits(megapixels=1)
    large = encode(Image.new("RGB", (1001, 1000)))
    with pytest.raises(ImageRejected, match=r"1001x1000 is more than 1 megapixels; raise data\.maximum_megapixels"):
        decode_image(large, config.limits)
    assert decode_image(large).shape == (1000, 1001, 3)


def decode_alone(*words: str) -> dict[str, float]:
    """What decoding costs in a process that does nothing else."""
    variables = os.environ | {"PYTHONPATH": str(HOSTILE.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HOSTILE), *words]
    job = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1000)
    assert job.returncode == 0, job.stderr[-2000:]
    return json.loads(job.stdout)


@pytest.mark.promise(7)
def test_no_file_takes_much_time_or_memory(folder: Path, record_property: Any) -> None:
    found = decode_alone("folder", str(folder))
    assert found["read"] + found["rejected"] == len(in_folder())
    assert found["megabytes"] < MOST_MEGABYTES
    assert found["seconds"] < MOST_SECONDS
    record_property("figure", f"slowest {found['seconds']:.2f} CPU s, process at most {found['megabytes']:.0f} MB")


@pytest.mark.slow
@pytest.mark.promise(7)
def test_the_largest_pictures_that_are_allowed_fit_into_a_gigabyte(tmp_path: Path, record_property: Any) -> None:
    """64 megapixels; they take longer than two seconds, which is why the limit can be lowered."""
    exif = Image.Exif()
    exif[0x0112] = 6
    shapes = {"turned.png": ("RGBA", (1, 2, 3, 128), {"exif": exif}), "picture.webp": ("RGB", (1, 2, 3), {"method": 0}),
              "print.jpg": ("CMYK", (1, 2, 3, 4), {"progressive": True})}  # fmt: skip
    for name, (mode, color, options) in shapes.items():
        Image.new(mode, (8000, 8000), color).save(tmp_path / name, **options)
    found = decode_alone("folder", str(tmp_path))
    assert found["read"] == len(shapes)
    assert found["megabytes"] < MOST_MEGABYTES
    record_property("figure", f"64 MP: {found['megabytes']:.0f} MB, {found['seconds']:.1f} CPU s for the slowest")


@pytest.mark.promise(7)
@pytest.mark.parametrize("trials", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_files_are_pixels_or_a_rejection(trials: int, record_property: Any) -> None:
    found = decode_alone("mutants", str(trials), "0")
    assert found["read"] + found["rejected"] == trials
    assert found["rejected"] > trials / 5
    assert found["read"] > trials / 20
    assert found["megabytes"] < MOST_MEGABYTES
    assert found["seconds"] < 5
    record_property(
        "figure",
        f"{trials} mutants: {found['rejected']:.0f} rejected, no other error, slowest {found['seconds']:.2f} CPU s, "
        f"{found['megabytes']:.0f} MB",
    )
