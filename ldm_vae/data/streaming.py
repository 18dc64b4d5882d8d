"""Image collections without random access: read from start to end, in a reproducible order.

The sample at a global position depends only on (seed, position), as with `samples.ImageSamples`. In training, every
process and every worker reads the whole stream, but decodes only what it needs. If the rows of its files can be
counted (`count_files`), `StreamingSource.read` reads any rows.
"""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ldm_vae.data.decoding import DecodeLimits, ImageRejected, decode_image
from ldm_vae.data.hf_datasets import (
    Labels,
    check_columns,
    image_bytes,
    keep_encoded,
    load_with_builder,
    local_files,
    row_id,
)
from ldm_vae.data.samples import ATTEMPTS, Transform, channels_first, too_many_rejected
from ldm_vae.data.sources import DataConfig, ImageSource, hash_items
from ldm_vae.data.split import Part, in_part
from ldm_vae.errors import UserError
from ldm_vae.random import key_hash, numpy_rng

if TYPE_CHECKING:
    from datasets import Features

READ_ROWS = 16
BLOCK_ROWS = 2**14


@dataclass(frozen=True)
class Item:
    """One image of a stream, not yet decoded. `index` counts from the start of the stream."""

    index: int
    id: str
    label: int
    image: dict[str, Any] = field(repr=False)
    limits: DecodeLimits = field(default_factory=DecodeLimits, repr=False)

    def read(self) -> np.ndarray:
        """uint8 (h, w, 3). Raises: ImageRejected."""
        return decode_image(image_bytes(self.image, self.limits, remote=True), self.limits)


class StreamingSource:
    """A streamed dataset. Ids are the same as with random access, so splits agree."""

    def __init__(self, config: DataConfig) -> None:
        assert config.streaming, "this collection has random access: open it with open_source"
        self.config, self.limits = config.datasets, config.limits
        rows, self._builder = load_with_builder(self.config)
        features = rows.features or rows._resolve_features().features
        check_columns(features, self.config)
        self._labels = Labels(self.config, features, None)
        columns = [c for c in (self.config.image_column, self.config.label_column) if c is not None]
        self._rows = keep_encoded(rows.select_columns(columns), self.config.image_column)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._labels.names

    @property
    def labels_from(self) -> str:
        return f"the column {self.config.label_column}"

    def iterate(self, start: int = 0) -> Iterator[Item]:
        """Items in stream order from index `start`, not decoded."""
        for index, row in enumerate(_all_rows(self._rows.skip(start) if start else self._rows), start):
            yield self._item(index, row)

    def files(self) -> StreamFiles | None:
        """The files of the stream and their row counts; None if they are unknown or cannot be counted.

        See `count_files` for the cost. Raises: UserError that names an unreadable file.
        """
        return count_files(self._builder, self.config.split)

    def read(self, files: StreamFiles, rows: Iterable[int]) -> Iterator[Item]:
        """The items at increasing `rows` of the stream, as from `iterate`; reads only the files that hold them.

        Raises: UserError if a file has changed since it was counted.
        """
        _after_fork()
        for index, row in files.read(rows, self._rows.features):
            yield self._item(index, row)

    def _item(self, index: int, row: dict[str, Any]) -> Item:
        columns = self.config
        label = self._labels.number(row[columns.label_column]) if columns.label_column else -1
        return Item(index, row_id(columns.split, index), label, row[columns.image_column], self.limits)

    def take(self, count: int, part: Part, held_out: float) -> ImageSource:
        """The first `count` images of a part, kept encoded in memory, with random access."""
        items = list(islice(_part(self.iterate(), part, held_out), count))
        if not items:
            raise UserError(f"data: the stream has no image in the {part} part at data.held_out={held_out}")
        return _Taken(items, self.label_names)

    def fingerprint(self) -> str:
        """sha256 hex of the hub id and revision, or of the names and sizes of local files."""
        config = self.config
        files = local_files(config.name)
        origin = [(os.path.basename(f), os.path.getsize(f)) for f in files if os.path.isfile(f)] or config.name
        if files and isinstance(origin, str):
            origin = os.path.basename(os.path.normpath(origin))
        columns = (config.image_column, config.label_column)
        return hash_items([("stream", origin, config.subset, config.split, config.revision, columns, self.label_names)])


def open_stream(config: DataConfig) -> StreamingSource:
    """Open a collection with `data.datasets.streaming=true`."""
    return StreamingSource(config)


class PartRows:
    """The rows of a split's first `count` rows that are in a part.

    Ids follow from row numbers, so nothing is read: 2 us per row once (3.5 minutes for 1e8 rows), then 16 ms per block
    of 16384 rows; 8 bytes per block are kept (0.5 MB for 1e9 rows).
    """

    def __init__(self, split: str, count: int, part: Part, held_out: float) -> None:
        self.split, self.count, self.part, self.held_out = split, count, part, held_out
        if part != "all":
            blocks = range(0, count, BLOCK_ROWS)
            self.ends = np.cumsum([len(self._block(start)) for start in blocks], dtype=np.int64)

    def __len__(self) -> int:
        if self.part == "all":
            return self.count
        return int(self.ends[-1]) if len(self.ends) else 0

    def rows(self, start: int, stop: int) -> Iterator[int]:
        """The rows of images `start` to `stop` - 1 of the part."""
        if self.part == "all":
            yield from range(start, stop)
            return
        while start < stop:
            block = int(np.searchsorted(self.ends, start, side="right"))
            rows = self._block(block * BLOCK_ROWS)
            before = int(self.ends[block]) - len(rows)
            yield from rows[start - before : stop - before].tolist()
            start = int(self.ends[block])

    def _block(self, start: int) -> np.ndarray:
        return _part_rows(self.split, start, min(start + BLOCK_ROWS, self.count), self.part, self.held_out)


class Key(Protocol):
    """A request for the sample at a global position, as a crop of `size` pixels."""

    @property
    def position(self) -> int: ...

    @property
    def size(self) -> int | None: ...


class StreamSamples:
    """Training samples of a stream, without end: each epoch is shuffled again through a buffer.

    Resuming at a position reads (but does not decode) at most one epoch to find its length, and then the part of
    the current epoch before the position.
    """

    def __init__(
        self,
        stream: StreamingSource,
        transform: Transform,
        seed: int,
        *,
        part: Part = "train",
        held_out: float = 0.0,
        buffer: int = 1024,
    ) -> None:
        """`buffer`: encoded images in memory to draw from; a larger one is closer to a full shuffle."""
        assert buffer >= 1, "the shuffle buffer holds at least one image"
        self.stream, self.transform, self.seed = stream, transform, seed
        self.part, self.held_out, self.buffer = part, held_out, buffer

    def samples(self, keys: Iterable[Key]) -> Iterator[dict[str, Any]]:
        """One sample for each key, as from `ImageSamples.sample`; positions must increase."""
        order: Iterator[tuple[Item, list[Item]]] | None = None
        reached = -1
        for key in keys:
            assert key.position > reached, "the positions of a stream's keys must increase"
            if order is None:
                order = self._order(key.position)
                reached = key.position - 1
            item, pool = next(islice(order, key.position - reached - 1, None))
            reached = key.position
            yield self._sample(item, pool, key)

    def batches(self, keys: Iterable[list[Any]]) -> StreamBatches:
        """The interface that `training.loader` needs for samples without random access."""
        return StreamBatches(self, keys)

    def _sample(self, item: Item, pool: list[Item], key: Key) -> dict[str, Any]:
        """The crop of `item` or, if it is unreadable, of another one from the shuffle buffer."""
        assert key.size is not None, "image samples need a size"
        rejected: list[tuple[str, str]] = []
        for attempt in range(ATTEMPTS):
            try:
                pixels = item.read()
            except ImageRejected as error:
                rejected.append((item.id, error.reason))
                item = pool[key_hash(self.seed, "substitute", key.position, attempt) % len(pool)]
                continue
            crop = self.transform(pixels, numpy_rng(self.seed, "augment", key.position), key.size)
            return {"image": channels_first(crop), "label": item.label, "index": item.index, "rejected": rejected}
        raise too_many_rejected(rejected)

    def _order(self, start: int) -> Iterator[tuple[Item, list[Item]]]:
        """(item, shuffle buffer) of every global position from `start`."""
        epoch, over = 0, start
        while True:
            count = 0
            for item, pool in self._epoch(epoch):
                if count >= over:
                    yield item, pool
                count += 1
            if count == 0:
                raise UserError(f"data: the stream has no image in the {self.part} part; check data.held_out")
            epochs = max(1, over // count)  # every epoch has the same length, so full epochs before `start` are skipped
            epoch, over = epoch + epochs, max(0, over - epochs * count)

    def _epoch(self, epoch: int) -> Iterator[tuple[Item, list[Item]]]:
        rng = numpy_rng(self.seed, "stream", epoch)
        pool: list[Item] = []
        for item in _part(self.stream.iterate(), self.part, self.held_out):
            if len(pool) < self.buffer:
                pool.append(item)
                continue
            place = int(rng.integers(self.buffer))
            chosen, pool[place] = pool[place], item
            yield chosen, pool
        for place in rng.permutation(len(pool)):
            yield pool[place], pool


class StreamBatches(IterableDataset):
    """Lists of samples for lists of keys, for `DataLoader(..., batch_size=None)`.

    With several workers, each makes every n-th list, and the loader puts them back in order.

    Args:
        samples: the source of the samples.
        batches: lists of keys with increasing positions; can be iterated more than once.
    """

    def __init__(self, samples: StreamSamples, batches: Iterable[list[Any]]) -> None:
        self.samples, self.batches = samples, batches

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        made = self.samples.samples(chain.from_iterable(self._own()))
        for batch in self._own():
            yield [next(made) for _ in batch]

    def _own(self) -> Iterator[list[Any]]:
        worker = get_worker_info()
        return islice(self.batches, worker.id if worker else 0, None, worker.num_workers if worker else 1)


class _Taken:
    """Items in memory as a source."""

    def __init__(self, items: list[Item], label_names: tuple[str, ...]) -> None:
        self.items, self.label_names = items, label_names

    def __len__(self) -> int:
        return len(self.items)

    def id(self, i: int) -> str:
        return self.items[i].id

    def label(self, i: int) -> int:
        return self.items[i].label

    def read(self, i: int) -> np.ndarray:
        return self.items[i].read()

    def fingerprint(self) -> str:
        return hash_items((item.id, item.label, len(item.image["bytes"] or b"")) for item in self.items)


@lru_cache(maxsize=1)  # the images of a part are asked for in order
def _part_rows(split: str, start: int, stop: int, part: Part, held_out: float) -> np.ndarray:
    return np.array([row for row in range(start, stop) if in_part(row_id(split, row), part, held_out)], np.int64)


def _after_fork() -> None:
    if get_worker_info() is not None:
        import fsspec.asyn

        fsspec.asyn.reset_lock()  # a lock inherited by fork would hang remote files


def _all_rows(rows: Any) -> Iterator[dict[str, Any]]:
    """Every row of a `datasets.IterableDataset`, in any process.

    Its own `__iter__` gives each worker of a torch loader only some of the shards; `iter` does not.
    """
    _after_fork()
    for batch in rows.iter(batch_size=READ_ROWS):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


def _part(items: Iterator[Item], part: Part, held_out: float) -> Iterator[Item]:
    return (item for item in items if in_part(item.id, part, held_out))


# The files of a stream, counted once, so that any row can be read without reading the files before it.

logger = logging.getLogger(__name__)

STRIDE = 32
"""An offset is kept for every STRIDE samples of a tar."""

THREADS = 16
"""Number of files counted in parallel; remote ones mostly wait for the network."""

BUFFER_BYTES = 4 * 2**20


@dataclass(frozen=True)
class StreamFiles:
    """The files of a stream.

    Attributes:
        kind: their format.
        paths: local paths or fsspec URLs, in order.
        rows: (files,) int64, row count of each.
        starts: byte offsets of the samples 0, STRIDE, 2 STRIDE, ... of each; tar only.
    """

    kind: Literal["parquet", "webdataset"]
    paths: tuple[str, ...]
    rows: np.ndarray
    starts: tuple[np.ndarray, ...]

    @property
    def count(self) -> int:
        return int(self.rows.sum())

    def read(self, wanted: Iterable[int], features: Features) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row number, values of the columns in `features`) for increasing row numbers; images stay encoded.

        Files without a wanted row are not opened; a file with several is opened once.

        Raises:
            UserError: a file cannot be read, or is shorter than it was.
        """
        ends = np.cumsum(self.rows)
        for file, rows in groupby(wanted, lambda row: int(np.searchsorted(ends, row, side="right"))):
            before = int(ends[file] - self.rows[file])
            path = self.paths[file]
            own = (row - before for row in rows)
            if self.kind == "parquet":
                read = _read_parquet(path, own, features)
            else:
                read = _read_tar(path, self.starts[file], own, features)
            for row, values in _explained(path, read):
                yield before + row, values


class _Shorter(Exception):
    """A file has fewer rows than when it was counted."""


def count_files(builder: Any, split: str) -> StreamFiles | None:
    """The files that a `datasets.DatasetBuilder` streams for a split; None if they are not known (another format,
    several splits) or cannot be counted (a compressed tar, a server without range requests).

    Raises:
        UserError: a file cannot be read.
    """
    kind = _kind(builder)
    paths = tuple(map(str, (builder.config.data_files or {}).get(split, ()))) if kind else ()
    if not kind or not paths:
        return None
    logger.info("counting the rows of %d files", len(paths))
    count = _count_parquet if kind == "parquet" else _count_tar
    with ThreadPoolExecutor(THREADS) as pool:
        counted = list(pool.map(partial(_counted, count), paths))
    for path, (rows, _) in zip(paths, counted):
        if rows is None:
            logger.warning("%s is not a plain tar with random access, so every process reads the whole stream", path)
            return None
    return StreamFiles(kind, paths, np.array([rows for rows, _ in counted], np.int64), tuple(s for _, s in counted))


def _kind(builder: Any) -> Literal["parquet", "webdataset"] | None:
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    if isinstance(builder, WebDataset):
        return "webdataset"
    if isinstance(builder, Parquet):
        config = builder.config  # a hub repository can set these in its card: then some rows are skipped
        leaves_out = getattr(config, "filters", None) is not None or getattr(config, "on_bad_files", "error") != "error"
        return None if leaves_out else "parquet"
    return None


def _counted(count: Any, path: str) -> tuple[int | None, np.ndarray]:
    try:
        with _open(path) as file:
            return count(file)
    except _errors() as error:
        raise _unreadable(path, error) from error


def _count_parquet(file: Any) -> tuple[int, np.ndarray]:
    import pyarrow.parquet as pq

    return pq.read_metadata(file).num_rows, np.empty(0, np.int64)


def _count_tar(file: Any) -> tuple[int | None, np.ndarray]:
    if not file.seekable() or not _is_plain_tar(file):
        return None, np.empty(0, np.int64)
    starts, rows = [], 0
    for _, _, members in _samples(file, 0):
        if rows % STRIDE == 0:
            starts.append(next(members)[1].offset)
        rows += 1
    return rows, np.array(starts, np.int64)


def _read_parquet(path: str, wanted: Iterable[int], features: Features) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.table import table_cast

    with _open(path) as raw:
        file = pq.ParquetFile(raw, buffer_size=BUFFER_BYTES)  # otherwise a whole row group is held in memory
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = np.cumsum(sizes, dtype=np.int64)
        for group, rows in groupby(wanted, lambda row: int(np.searchsorted(ends, row, side="right"))):
            if group == len(sizes):
                raise _Shorter(f"has {file.metadata.num_rows} rows now, fewer than when it was counted")
            batches = file.iter_batches(READ_ROWS, row_groups=[group], columns=list(features), use_threads=False)
            end = int(ends[group]) - sizes[group]
            values: list[dict[str, Any]] = []
            for row in rows:
                while row >= end:
                    batch = next(batches)
                    end, values = end + len(batch), []
                if not values:
                    values = table_cast(pa.Table.from_batches([batch]), features.arrow_schema).to_pylist()
                yield row, values[row - end]


def _read_tar(
    path: str, starts: np.ndarray, wanted: Iterable[int], features: Features
) -> Iterator[tuple[int, dict[str, Any]]]:
    from datasets import Image
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    with _open(path) as file:
        samples, reached = None, -1
        for row in wanted:
            if samples is None or row // STRIDE > reached // STRIDE:
                reached = row // STRIDE * STRIDE
                samples = _samples(file, int(starts[row // STRIDE]))
            sample = next(islice(samples, row - reached, None), None)
            if sample is None:
                raise _Shorter(f"ends before its sample {row}, which it had when it was counted")
            reached = row + 1
            _, archive, members = sample
            contents = ((m.name, archive.extractfile(m)) for field, m in members if field in features)
            # the library decodes one sample: decompression, labels and text by their suffix
            found: dict[str, Any] = next(WebDataset._get_pipeline_from_tar(path, contents), {})
            values = {name: found.get(name) for name in features}
            for name, feature in features.items():
                if isinstance(feature, Image) and values[name] is not None:
                    values[name] = feature.encode_example(values[name])
            yield row, values


def _samples(file: Any, offset: int) -> Iterator[tuple[str, tarfile.TarFile, Iterator[tuple[str, tarfile.TarInfo]]]]:
    """(key, archive, its members as (field, member)) of the samples of an open tar, from a member's offset.

    As in `datasets` and `webdataset`, consecutive members with the same name up to the first dot are a sample.
    """
    from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

    file.seek(offset)
    archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is the caller's

    def members() -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined] # otherwise all of them stay in memory
            hidden = member.name.rsplit("/", 1)[-1].startswith((".", "__"))
            if not member.isreg() or hidden:
                continue
            key, field = base_plus_ext(member.name)
            if key is not None:
                yield key, field, member

    for key, group in groupby(members(), lambda member: member[0]):
        yield key, archive, ((field, member) for _, field, member in group)


def _is_plain_tar(file: Any) -> bool:
    try:
        tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    except tarfile.ReadError:
        return False
    return True


def _explained(path: str, read: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same rows, with errors of the file raised as UserError."""
    try:
        yield from read
    except _Shorter as error:
        raise UserError(f"{path}: {error}; start again with files that do not change") from error
    except _errors() as error:
        raise _unreadable(path, error) from error


def _open(path: str) -> Any:
    from datasets.utils.file_utils import xopen

    return xopen(path, "rb")


def _errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return OSError, tarfile.TarError, pa.ArrowException


def _unreadable(path: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"data.datasets.name: {path}: cannot be read ({reason}); replace or remove it")
