"""Image collections without random access: read from start to end, in an order that is still reproducible.

The sample at a global position depends on (seed, position) alone, as with `samples.ImageSamples`. In training, every
process and every worker reads the whole stream, but decodes only what it needs; where the files of the stream can be
counted (`stream_files`), `StreamingSource.read` reads any rows of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ldm_vae.data.datasets_source import (
    Labels,
    check_columns,
    image_bytes,
    keep_encoded,
    load_with_builder,
    local_files,
    row_id,
)
from ldm_vae.data.decoding import DecodeLimits, ImageRejected, decode_image
from ldm_vae.data.samples import ATTEMPTS, Transform, to_tensor, too_many_rejected
from ldm_vae.data.sources import DataConfig, ImageSource, hash_items
from ldm_vae.data.split import Part, part_of
from ldm_vae.data.stream_files import StreamFiles, count_files
from ldm_vae.errors import UserError
from ldm_vae.random import key_hash, numpy_rng

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
    """A streamed dataset. Ids are those that the same dataset has with random access, so splits agree."""

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

    def iterate(self, start: int = 0) -> Iterator[Item]:
        """Items in stream order from index `start` on; none of them is decoded."""
        for index, row in enumerate(_all_rows(self._rows.skip(start) if start else self._rows), start):
            yield self._item(index, row)

    def files(self) -> StreamFiles | None:
        """The files of the stream, with the rows of each; None where they are not known or cannot be counted.

        See `stream_files` for what it costs. Raises: UserError that names a file that cannot be read.
        """
        return count_files(self._builder, self.config.split)

    def read(self, files: StreamFiles, rows: Iterable[int]) -> Iterator[Item]:
        """The items of increasing `rows` of the stream, as `iterate` gives them; reads the files that hold them.

        Raises: UserError when a file is not what was counted.
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
        """sha256 hex of what names the stream: hub id and revision, or the names and sizes of local files."""
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
    """Which of the first `count` rows of a split are in a part.

    An id follows from the row, so nothing is read: 2 us a row once (3.5 minutes for 1e8 rows) and 16 ms a block of
    16384 rows later; 8 bytes a block are kept (0.5 MB for 1e9 rows).
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
        """The rows of the images `start` to `stop` - 1 of the part."""
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
    """What to make: the sample at a global position, as a crop of `size` pixels."""

    @property
    def position(self) -> int: ...

    @property
    def size(self) -> int | None: ...


class StreamSamples:
    """Training samples of a stream: shuffled through a buffer anew each epoch, without end.

    Resuming at a position reads (but does not decode) at most one epoch to learn its length, and then the
    part of the running epoch that is over.
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
        """`buffer`: encoded images held in memory to draw from; larger is closer to a full shuffle."""
        assert buffer >= 1, "the shuffle buffer holds at least one image"
        self.stream, self.transform, self.seed = stream, transform, seed
        self.part, self.held_out, self.buffer = part, held_out, buffer

    def samples(self, keys: Iterable[Key]) -> Iterator[dict[str, Any]]:
        """One sample, as `ImageSamples.sample` makes it, for each key; positions must increase."""
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
        """What `training.loader` asks of samples without random access."""
        return StreamBatches(self, keys)

    def _sample(self, item: Item, pool: list[Item], key: Key) -> dict[str, Any]:
        """The crop of `item`, or, when it cannot be read, of another one from the shuffle buffer."""
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
            return {"image": to_tensor(crop), "label": item.label, "index": item.index, "rejected": rejected}
        raise too_many_rejected(rejected)

    def _order(self, start: int) -> Iterator[tuple[Item, list[Item]]]:
        """(item, shuffle buffer) of every global position from `start` on."""
        epoch, over = 0, start
        while True:
            count = 0
            for item, pool in self._epoch(epoch):
                if count >= over:
                    yield item, pool
                count += 1
            if count == 0:
                raise UserError(f"data: the stream has no image in the {self.part} part; check data.held_out")
            epochs = max(1, over // count)  # every epoch has as many items: those before `start` need no reading
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
        samples: where they come from.
        batches: lists of keys; can be iterated more than once, with increasing positions.
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
    return np.array([row for row in range(start, stop) if part_of(row_id(split, row), held_out) == part], np.int64)


def _after_fork() -> None:
    if get_worker_info() is not None:
        import fsspec.asyn

        fsspec.asyn.reset_lock()  # a lock inherited by fork would hang remote files


def _all_rows(rows: Any) -> Iterator[dict[str, Any]]:
    """Every row of a `datasets.IterableDataset`, in any process.

    Its own `__iter__` hands each worker of a torch loader some of the shards only; `iter` does not.
    """
    _after_fork()
    for batch in rows.iter(batch_size=READ_ROWS):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


def _part(items: Iterator[Item], part: Part, held_out: float) -> Iterator[Item]:
    return (item for item in items if part == "all" or part_of(item.id, held_out) == part)
