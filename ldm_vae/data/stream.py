"""Image collections without random access: read from start to end, in an order that is still reproducible.

The sample at a global position depends on (seed, position) alone, as with `samples.ImageSamples`. Every
process and every worker reads the whole stream, but decodes only what it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ldm_vae.data.datasets_source import (
    Labels,
    check_columns,
    image_bytes,
    keep_encoded,
    load_rows,
    local_files,
    row_id,
)
from ldm_vae.data.decoding import DecodeLimits, ImageRejected, decode_image
from ldm_vae.data.samples import ATTEMPTS, Transform, to_tensor, too_many_rejected
from ldm_vae.data.sources import DataConfig, ImageSource, hash_items
from ldm_vae.data.split import Part, part_of
from ldm_vae.errors import UserError
from ldm_vae.random import key_hash, numpy_rng

READ_ROWS = 16


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
        rows = load_rows(self.config)
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
        columns = self.config
        for index, row in enumerate(_all_rows(self._rows.skip(start) if start else self._rows), start):
            label = self._labels.number(row[columns.label_column]) if columns.label_column else -1
            image = row[columns.image_column]
            yield Item(index, row_id(columns.split, index), label, image, self.limits)

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


def _all_rows(rows: Any) -> Iterator[dict[str, Any]]:
    """Every row of a `datasets.IterableDataset`, in any process.

    Its own `__iter__` hands each worker of a torch loader some of the shards only; `iter` does not.
    """
    if get_worker_info() is not None:
        import fsspec.asyn

        fsspec.asyn.reset_lock()  # a lock inherited by fork would hang remote files
    for batch in rows.iter(batch_size=READ_ROWS):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


def _part(items: Iterator[Item], part: Part, held_out: float) -> Iterator[Item]:
    return (item for item in items if part == "all" or part_of(item.id, held_out) == part)
