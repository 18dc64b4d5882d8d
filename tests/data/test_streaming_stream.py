"""`datasets` collections with random access and as streams: the same images, ids, labels and splits."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ldm_vae.config import load
from ldm_vae.data import open_source
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.samples import ImageSamples
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.split import part_of, subset
from ldm_vae.data.streaming import Item, StreamBatches, StreamSamples, open_stream
from ldm_vae.data.transforms import center_crop, random_crop
from ldm_vae.errors import UserError
from ldm_vae.training.loader import Key, collate
from tests.data.encoded import encode, picture

COUNT, BROKEN = 30, 4


def pixels_of(i: int) -> np.ndarray:
    return picture(16 + i, 24)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`datasets` writes its cache there, and stays silent and offline."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 30 images, one of them broken, as a saved dataset, parquet files and webdataset archives."""
    folder = tmp_path_factory.mktemp("datasets")
    images = [encode(pixels_of(i)) if i != BROKEN else b"broken" for i in range(COUNT)]
    rows = {
        "image": [{"bytes": data, "path": None} for data in images],
        "label": [i % 3 for i in range(COUNT)],
        "name": [f"{10 - i % 3}" if i else None for i in range(COUNT)],
        "raw": images,
    }
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["x", "y", "z"]),
        name=datasets.Value("string"),
        raw=datasets.Value("binary"),
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(folder / "saved_splits")
    for part in range(2):
        dataset.select(range(15 * part, 15 * part + 15)).to_parquet(folder / f"rows-{part}.parquet")
        with tarfile.open(folder / f"rows-{part}.tar", "w") as archive:
            for i in range(15 * part, 15 * part + 15):
                for suffix, data in (("png", images[i]), ("cls", b"%d" % (i % 3))):
                    member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def config(files: Path, name: str = "rows-*.parquet", *overrides: str) -> DataConfig:
    settings = [f"datasets.{override}" for override in (f"name={files / name}", *overrides)]
    return load(DataConfig, None, ["source=datasets", *settings])


FORMS = pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("saved", ["label_column=label"]),
        ("saved_splits", ["label_column=label"]),
        ("rows-*.parquet", ["label_column=label"]),
        ("rows-*.parquet", ["label_column=label", "image_column=raw"]),
        ("rows-*.tar", ["image_column=png", "label_column=cls", "label_names=[x,y,z]"]),
    ],
    ids=["saved", "saved splits", "parquet", "binary column", "webdataset"],
)


@FORMS
def test_all_forms_give_the_same_images(files: Path, name: str, columns: list[str]) -> None:
    source = open_source(config(files, name, *columns))
    stream = open_stream(config(files, name, "streaming=true", *columns))
    assert len(source) == COUNT
    assert source.label_names == stream.label_names == ("x", "y", "z")
    for item in stream.iterate():
        assert (item.id, item.label) == (source.id(item.index), source.label(item.index))
        assert item.label == item.index % 3
        if item.index == BROKEN:
            for read in (item.read, lambda: source.read(BROKEN)):
                with pytest.raises(ImageRejected):
                    read()
        else:
            np.testing.assert_array_equal(item.read(), pixels_of(item.index))
            np.testing.assert_array_equal(source.read(item.index), pixels_of(item.index))


@FORMS
def test_a_stream_starts_anywhere(files: Path, name: str, columns: list[str]) -> None:
    stream = open_stream(config(files, name, "streaming=true", *columns))
    assert [item.index for item in stream.iterate(17)] == list(range(17, COUNT))


def test_labels_from_strings_and_none_at_all(files: Path) -> None:
    source = open_source(config(files, "saved", "label_column=name"))
    assert source.label_names == ("8", "9", "10")
    assert [source.label(i) for i in range(4)] == [-1, 1, 0, 2]
    unlabeled = open_source(config(files, "saved"))
    assert (unlabeled.label_names, unlabeled.label(0)) == ((), -1)


def test_fingerprint_follows_the_content_not_the_place(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "saved", tmp_path / "moved")
    source = open_source(config(files, "saved", "label_column=label"))
    moved = open_source(config(tmp_path, "moved", "label_column=label"))
    assert pickle.loads(pickle.dumps(source)).fingerprint() == moved.fingerprint() == source.fingerprint()
    assert open_source(config(files, "rows-*.parquet", "label_column=label")).fingerprint() == source.fingerprint()
    others = [config(files, "saved"), config(files, "saved_splits", "split=test", "label_column=label")]
    assert source.fingerprint() not in [open_source(other).fingerprint() for other in others]
    streams = [config(files, "rows-*.parquet", "streaming=true", *more) for more in ([], ["label_column=label"])]
    assert len({open_stream(stream).fingerprint() for stream in streams}) == 2


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("gone.parquet", [], "no such file"),
        ("gone", [], "no such file"),
        ("saved", ["image_column=picture"], "no column 'picture'.*it has: image, label, name, raw"),
        ("saved", ["label_column=class"], "label_column: no column 'class'"),
        ("saved", ["image_column=label"], "give a column of images"),
        ("saved", ["revision=main"], "no effect on local files"),
        ("saved_splits", ["split=dev"], "it has: train, test"),
        ("rows-*.parquet", ["split=dev"], "check the name"),
        ("saved", ["label_column=label", "label_names=[x]"], "list all classes"),
        ("saved", ["streaming=true"], "no random access"),
    ],
)
def test_wrong_settings_are_explained(files: Path, name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(config(files, name, *overrides))


def test_a_stream_needs_the_names_of_its_labels(files: Path) -> None:
    with pytest.raises(UserError, match="label_names: missing"):
        open_stream(config(files, "rows-*.tar", "streaming=true", "image_column=png", "label_column=cls"))


def test_the_first_images_of_a_part(files: Path) -> None:
    stream = open_stream(config(files, "rows-*.parquet", "streaming=true"))
    source = open_source(config(files, "rows-*.parquet"))
    taken, expected = stream.take(3, "held_out", 0.3), subset(source, "held_out", 0.3)
    assert [taken.id(i) for i in range(len(taken))] == [expected.id(i) for i in range(3)]
    np.testing.assert_array_equal(taken.read(1), expected.read(1))
    with pytest.raises(UserError, match="no image in the held_out part"):
        stream.take(3, "held_out", 0.0)


@pytest.fixture
def make(files: Path) -> Callable[..., StreamSamples]:
    stream = open_stream(config(files, "rows-*.parquet", "streaming=true", "label_column=label"))

    def samples(**options: Any) -> StreamSamples:
        return StreamSamples(stream, random_crop, seed=0, **{"held_out": 0.2, "buffer": 8, **options})

    return samples


def keys(*positions: int) -> list[Key]:
    return [Key(index=-1, position=position, size=16) for position in positions]


def test_an_epoch_visits_each_training_image_once_in_a_new_order(make: Callable[..., StreamSamples]) -> None:
    train = [i for i in range(COUNT) if part_of(f"train/{i:09d}", 0.2) == "train"]
    assert 0 < len(train) < COUNT
    order = [item.index for item, _ in islice(make()._order(0), 3 * len(train))]
    epochs = [order[: len(train)], order[len(train) : -len(train)], order[-len(train) :]]
    assert all(sorted(epoch) == train for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_sample_depends_on_its_position_only(make: Callable[..., StreamSamples]) -> None:
    """Whether the stream is read from the start, resumed in any epoch, or read by another process."""
    whole = list(make().samples(keys(*range(90))))
    assert len({sample["index"] for sample in whole}) > 15
    for some in ([0], [7, 8, 30], [24, 49, 50, 89], [89]):
        for position, sample in zip(some, make().samples(keys(*some)), strict=True):
            assert (sample["image"] == whole[position]["image"]).all()
            assert (sample["index"], sample["label"]) == (whole[position]["index"], whole[position]["label"])


def test_a_broken_image_is_replaced_and_reported(make: Callable[..., StreamSamples]) -> None:
    samples = list(make(held_out=0.0).samples(keys(*range(COUNT))))
    reported = [rejection for sample in samples for rejection in sample["rejected"]]
    assert (f"train/{BROKEN:09d}", "unknown_format") in reported
    assert BROKEN not in {sample["index"] for sample in samples}
    assert all(sample["label"] == sample["index"] % 3 for sample in samples)


def test_only_own_samples_are_decoded(make: Callable[..., StreamSamples], monkeypatch: pytest.MonkeyPatch) -> None:
    read, decoded = Item.read, []
    monkeypatch.setattr(Item, "read", lambda item: decoded.append(item.index) or read(item))
    list(make(held_out=0.0).samples(keys(40, 60)))
    assert len(decoded) - decoded.count(BROKEN) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_keeps_the_order(make: Callable[..., StreamSamples], workers: int) -> None:
    batches = [keys(*range(4 * i, 4 * i + 2)) for i in range(7)]  # the first of two processes
    loader = DataLoader(StreamBatches(make(), batches), batch_size=None, collate_fn=collate, num_workers=workers)
    expected = make().samples(keys(*(key.position for batch in batches for key in batch)))
    found = list(loader)
    assert len(found) == 7
    for batch in found:
        assert batch["image"].dtype == torch.uint8
        for image, index in zip(batch["image"], batch["index"], strict=True):
            sample = next(expected)
            assert (image == sample["image"]).all()
            assert index == sample["index"]


def test_the_part_must_not_be_empty(make: Callable[..., StreamSamples]) -> None:
    with pytest.raises(UserError, match="no image in the held_out part"):
        next(make(part="held_out", held_out=0.0).samples(keys(0)))


def test_samples_of_random_access(files: Path) -> None:
    samples = ImageSamples(open_source(config(files, "saved", "label_column=label")), center_crop, seed=0)
    batch = collate([samples.sample(i, i, 16) for i in range(4)])
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["label"].tolist() == [0, 1, 2, 0]
