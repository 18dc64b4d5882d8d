"""Datasets of the `datasets` library as a source. Images stay encoded; `decoding` decodes them.

Also the parts shared with `streaming`: opening by name, checking the columns, numbering the labels.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_vae.data.decoding import DecodeLimits, ImageRejected, decode_image, read_regular_file
from ldm_vae.data.folder import LABEL_COLUMNS
from ldm_vae.data.sources import DatasetsConfig, hash_items, number_labels
from ldm_vae.errors import UserError

if TYPE_CHECKING:
    from datasets import Features

logger = logging.getLogger(__name__)

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
HASH_ROWS = 1000


class DatasetsSource:
    """A dataset with random access; images and labels are two of its columns.

    Raises:
        UserError: it cannot be loaded, or a column is missing.
    """

    def __init__(self, config: DatasetsConfig, limits: DecodeLimits = DecodeLimits()) -> None:  # noqa: B008
        self.limits = limits
        dataset = load_rows(config)
        if not len(dataset):
            raise UserError(f"data.datasets.name: {config.name}: the split {config.split} is empty; give another")
        check_columns(dataset.features, config)
        values: list[Any] = [None] * len(dataset)
        if config.label_column is not None:
            values = dataset.select_columns([config.label_column])[:][config.label_column]
        labels = Labels(config, dataset.features, values)
        self.label_names, self.labels_from = labels.names, f"the column {config.label_column}"
        self.labels = np.array([labels.number(value) for value in values], np.int64)
        self.column, self.split = config.image_column, config.split
        self.rows = keep_encoded(dataset.select_columns([self.column]), self.column)

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, i: int) -> str:
        return row_id(self.split, i)

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def read(self, i: int) -> np.ndarray:
        return decode_image(image_bytes(self.rows[int(i)][self.column], self.limits), self.limits)

    def fingerprint(self) -> str:
        """sha256 hex of ids, labels and the sizes of the encoded images (or their names, if they are files)."""
        import pyarrow.compute as pc

        def sizes() -> Iterable[object]:
            table = self.rows.with_format("arrow")
            for start in range(0, len(self), HASH_ROWS):
                images = table[start : start + HASH_ROWS].column(self.column)
                lengths = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
                names = pc.struct_field(images, "path").to_pylist()
                yield from (
                    os.path.basename(name or "") if length is None else length for length, name in zip(lengths, names)
                )

        rows = ((self.id(i), self.label(i), size) for i, size in enumerate(sizes()))
        return hash_items([("datasets", self.label_names), *rows])


def load_rows(config: DatasetsConfig) -> Any:
    """The split as a `datasets.Dataset`, or as an `IterableDataset` when streaming.

    A name that is a local path is never looked up on the network.
    """
    return load_with_builder(config)[0]


def load_with_builder(config: DatasetsConfig) -> tuple[Any, Any]:
    """The result of `load_rows`, and the `DatasetBuilder` that knows the files of a stream (None if there is none)."""
    from datasets import DatasetDict, load_dataset, load_dataset_builder, load_from_disk

    name, files = os.path.expanduser(config.name), local_files(config.name)
    is_path = bool(files) or name.startswith((".", "/")) or Path(name).suffix in BUILDERS
    if is_path and not files and "://" not in name:
        raise UserError(f"data.datasets.name: {name}: no such file or folder; give an existing path or a hub id")
    if files and (config.subset or config.revision):
        raise UserError(f"data.datasets: subset and revision have no effect on local files ({name}); remove them")
    try:
        if any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(name)
            if isinstance(saved, DatasetDict):
                saved = _choose_split(saved, config)
            return saved.to_iterable_dataset() if config.streaming else saved, None
        if kind := BUILDERS.get(Path(name).suffix):
            origin: dict[str, Any] = {"path": kind, "data_files": name}
        else:
            origin = {"path": name, "name": config.subset, "revision": config.revision}
        if not config.streaming:
            return load_dataset(**origin, split=config.split), None
        builder = load_dataset_builder(**origin)
        if kind == "webdataset" and name.startswith(("s3://", "s3a://")):
            _open_archives_plainly(builder)
        return builder.as_streaming_dataset(split=config.split), builder
    except UserError:
        raise
    except Exception as error:  # the library raises many classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data.datasets.name: {name}: {reason}; check the name, subset, split and revision") from error


def _open_archives_plainly(builder: Any) -> None:
    """Make the next streaming dataset of a webdataset builder open its tars without further options.

    `datasets` opens them with `block_size=0`, which `s3fs` rejects as an unknown connection option.
    """
    from datasets.utils.file_utils import ArchiveIterable

    split_generators = builder._split_generators

    def plain(manager: Any) -> Any:
        del builder._split_generators  # else the stream cannot be pickled
        manager.iter_archive = partial(ArchiveIterable, _archive_members)
        return split_generators(manager)

    builder._split_generators = plain


def _archive_members(path: str) -> Iterator[tuple[str, Any]]:
    from datasets.utils.file_utils import ArchiveIterable, xopen

    with xopen(path, "rb") as file:
        yield from ArchiveIterable._iter_tar(file)


def _choose_split(saved: Any, config: DatasetsConfig) -> Any:
    if config.split not in saved:
        found = ", ".join(map(str, saved))
        raise UserError(f"data.datasets.split: {config.split} is not in {config.name}; it has: {found}")
    return saved[config.split]


def local_files(name: str) -> list[str]:
    """The local files or folder that a name or `*` pattern stands for, sorted; empty for a hub id."""
    path = os.path.expanduser(name)
    return [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))


def check_columns(features: Features | None, config: DatasetsConfig) -> None:
    """Raises: UserError if the image or label column is missing or has another type."""
    from datasets import ClassLabel, Image, Value

    columns = features or {}
    for key, column in (("image_column", config.image_column), ("label_column", config.label_column)):
        if column is not None and column not in columns:
            raise UserError(f"data.datasets.{key}: no column {column!r} in {config.name}; it has: {', '.join(columns)}")
    kind = columns[config.image_column]
    if not isinstance(kind, Image) and kind not in (Value("binary"), Value("large_binary"), Value("string")):
        raise UserError(f"data.datasets.image_column: {config.image_column!r} holds {kind}; give a column of images")
    named = [name for name, kind in columns.items() if isinstance(kind, ClassLabel) or name in LABEL_COLUMNS]
    if named and config.label_column is None:
        logger.warning("%s: no labels are read; data.datasets.label_column=%s takes them", config.name, named[0])


def keep_encoded(dataset: Any, column: str) -> Any:
    from datasets import Image

    return dataset.cast_column(column, Image(decode=False))


def image_bytes(cell: dict[str, Any] | None, limits: DecodeLimits, remote: bool = False) -> bytes:
    """The encoded image of a cell of an undecoded image column; `remote` allows paths outside this machine.

    Raises:
        ImageRejected: `empty` or `unreadable`.
    """
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise ImageRejected("empty", "the dataset has no image here")
    if cell["bytes"] is not None:
        return cell["bytes"]
    if not remote or "://" not in cell["path"]:
        return read_regular_file(cell["path"], limits.file_bytes + 1)
    from datasets.utils.file_utils import xopen

    try:
        with xopen(cell["path"], "rb") as file:
            return file.read(limits.file_bytes + 1)
    except OSError as error:
        raise ImageRejected("unreadable", f"cannot be opened: {error.strerror or error}") from error


def row_id(split: str, i: int) -> str:
    return f"{split}/{i:09d}"


class Labels:
    """Class names, and the class number of a cell of the label column.

    Names come from `label_names`, the column's own `ClassLabel`, or from all `values` of the column.

    Raises:
        UserError: the classes are not known: `values` is None and no names are given.
    """

    def __init__(self, config: DatasetsConfig, features: Features, values: Iterable[Any] | None) -> None:
        self.column = config.label_column
        feature = features[self.column] if self.column is not None else None
        self.names: tuple[str, ...] = tuple(config.label_names or getattr(feature, "names", ()))
        self.by_index = bool(self.names)
        if self.column is not None and not self.names:
            if values is None:
                raise UserError(
                    f"data.datasets.label_names: missing, and the column {self.column!r} of this stream does not "
                    "name its classes; give them as data.datasets.label_names=[a,b,c]"
                )
            self.names = tuple(number_labels(str(value) for value in values if value is not None))
        self.numbers = {name: i for i, name in enumerate(self.names)}

    def number(self, value: Any) -> int:
        """The class number; -1 for no label. Raises: UserError for a value without a name."""
        if value is None or self.column is None:
            return -1
        if self.by_index and isinstance(value, int):
            if -1 <= value < len(self.names):
                return value
        elif str(value) in self.numbers:
            return self.numbers[str(value)]
        raise UserError(
            f"data.datasets.label_names: {value!r} in column {self.column!r} is not one of {len(self.names)} "
            "classes; list all classes in order"
        )
