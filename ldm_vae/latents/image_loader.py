"""The images of an encoding job: divided into work units, decoded in worker processes, in batches of a fixed shape.

A unit is a fixed range of source indices and becomes one shard. The content of a batch depends on the source, the unit
and the batch size only, so the numbers of processes and workers do not change a latent's bits. Batches of a unit come
in order. Batches of several units may alternate, at most one unit for each worker.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, groupby, islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm_vae.data import open_source
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.samples import Enlarged, channels_first, crop_image
from ldm_vae.data.sources import DataConfig, ImageSource, hash_items, labels_from
from ldm_vae.data.split import Part, in_part, subset
from ldm_vae.errors import UserError
from ldm_vae.latents.format import Rejection
from ldm_vae.training.distributed import TIMEOUT_SECONDS
from ldm_vae.training.loader import LOADER_SHARE, ErrorsAsItems, from_workers
from ldm_vae.training.watchdog import obey_only_the_parent

if TYPE_CHECKING:
    from ldm_vae.data.streaming import StreamFiles, StreamingSource

Once = Callable[[Callable[[], Any]], Any]
"""Calls a function in one of several processes, and returns its result in all of them."""


class Item(Protocol):
    """A not yet decoded image."""

    @property
    def id(self) -> str: ...

    @property
    def label(self) -> int: ...

    def read(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Units:
    """The work units that one process makes.

    Attributes:
        finished: units that exist already.
        rank: number of the process among `processes` that divide the others.
        share: (i, n): this is number i of n independent jobs, which makes only the units k with k % n == i.
    """

    finished: frozenset[int] = frozenset()
    rank: int = 0
    processes: int = 1
    share: tuple[int, int] = (0, 1)

    def numbers(self, total: int | None) -> Iterator[int]:
        """This process's units, increasing. The missing units of `total` are given to the processes in turn. For an
        unknown total (None), all units are, and the iterator does not end."""
        if total is None:
            place, jobs = self.share
            dealt = count(place + jobs * self.rank, jobs * self.processes)
            return (number for number in dealt if number not in self.finished)
        return islice(self._missing(total), self.rank, None, self.processes)

    def run(self, total: int) -> list[int]:
        """The missing units of `total`, with consecutive units for each process."""
        missing = sum(1 for _ in self._missing(total))
        first, end = (missing * rank // self.processes for rank in (self.rank, self.rank + 1))
        return list(islice(self._missing(total), first, end))

    def of_worker(self, worker: int, workers: int) -> Units:
        """The part of one worker, if each of the `workers` of every process makes whole units."""
        return replace(self, rank=self.rank * workers + worker, processes=self.processes * workers)

    def _missing(self, total: int) -> Iterator[int]:
        place, jobs = self.share
        return (number for number in range(place, total, jobs) if number not in self.finished)


@dataclass(frozen=True)
class Group:
    """One batch of a unit, not decoded yet: its (index, item) in order. `last`: the unit ends here."""

    unit: int
    items: Sequence[tuple[int, Item]]
    last: bool


@dataclass(frozen=True)
class ImageBatch:
    """Consecutive images of one unit.

    Attributes:
        unit: its number.
        images: uint8 (batch, 3, h, w); rows after the last image and of rejected images are black.
        rows: the rows with images; `indices`, `labels` and `ids` belong to these.
        rejected: images that could not be read.
        last: the unit ends with this batch.
        enlarged: number of images that were smaller than their crop.
    """

    unit: int
    images: Tensor
    rows: list[int]
    indices: list[int]
    labels: list[int]
    ids: list[str]
    rejected: list[Rejection]
    last: bool = True
    enlarged: int = 0

    def pin_memory(self) -> ImageBatch:
        """For the data loader."""
        return replace(self, images=self.images.pin_memory())


class Images(Protocol):
    """The interface of the images to encode."""

    @property
    def label_names(self) -> tuple[str, ...]: ...

    @property
    def count(self) -> int | None:
        """The number of images; None for a stream whose length is not known in advance."""
        ...

    @property
    def whole_units(self) -> bool:
        """Whether a worker makes whole consecutive units, so that no other worker reads the same images, instead of
        every n-th batch."""
        ...

    def fingerprint(self) -> str: ...

    def groups(self, units: Units, unit: int, batch: int) -> Iterator[Group]:
        """The batches of these units of `unit` images, in order."""
        ...


class RandomAccessImages:
    """Images of a source with random access: only the share of this process is touched."""

    whole_units = False  # batches in turn, so that the first shard is finished sooner and only one is open

    def __init__(self, source: ImageSource) -> None:
        self.source, self.label_names, self.count = source, source.label_names, len(source)
        self.labels_from = labels_from(source)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def groups(self, units: Units, unit: int, batch: int) -> Iterator[Group]:
        for number in units.numbers(-(-self.count // unit)):
            for indices, last in batches_of(number, unit, batch, self.count):
                yield Group(number, list(zip(indices, self.items(indices))), last)

    def keys(self) -> Iterable[int]:
        """The arguments of `id` and `items` for all images, increasing."""
        return range(self.count)

    def id(self, key: int) -> str:
        return self.source.id(key)

    def items(self, keys: Iterable[int]) -> Iterator[Item]:
        """`keys` must increase."""
        return (_SourceItem(self.source, int(key)) for key in keys)

    def record_of(self, keys: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """`fingerprint` (of ids and classes) and `label_names` of these images only."""
        labels = [item.label for item in self.items(keys)]
        classes = (
            (self.id(int(key)), self.label_names[label] if label >= 0 else "") for key, label in zip(keys, labels)
        )
        names = [self.label_names[label] for label in sorted({*labels} - {-1})]
        return {"fingerprint": hash_items(chain([("images",)], classes)), "label_names": names}


class CountedImages:
    """Images of a stream whose files are counted. A worker reads only the rows of its units, and each file once.

    Indices count the images of the part, as for the same images with random access.
    """

    whole_units = True

    def __init__(self, stream: StreamingSource, files: StreamFiles, part: Part, held_out: float) -> None:
        """Raises: UserError when the part is empty."""
        from ldm_vae.data.streaming import PartRows

        self.stream, self.files, self.part, self.held_out = stream, files, part, held_out
        self.rows = PartRows(stream.config.split, files.count, part, held_out)
        self.label_names, self.count = stream.label_names, len(self.rows)
        if not files.count:
            raise UserError(f"data.datasets.name: {stream.config.name}: its files have no rows; give others")
        if not self.count:
            raise UserError(
                f"data: no image of {files.count} in this stream falls into the {part} part at "
                f"data.held_out={held_out}; change data.held_out or give other files"
            )

    def fingerprint(self) -> str:
        return _stream_fingerprint(self.stream, self.part, self.held_out)

    def groups(self, units: Units, unit: int, batch: int) -> Iterator[Group]:
        numbers = units.run(-(-self.count // unit))
        ranges = ((number * unit, min((number + 1) * unit, self.count)) for number in numbers)
        rows = chain.from_iterable(self.rows.rows(start, stop) for start, stop in ranges)
        items = self.items(rows)  # one pass over all units, which may share a file
        for number in numbers:
            for indices, last in batches_of(number, unit, batch, self.count):
                yield Group(number, list(zip(indices, items)), last)

    def keys(self) -> Iterable[int]:
        """The arguments of `id` and `items` for all images, increasing: rows in the stream."""
        return self.rows.rows(0, self.count)

    def id(self, key: int) -> str:
        from ldm_vae.data.hf_datasets import row_id

        return row_id(self.stream.config.split, key)

    def items(self, keys: Iterable[int]) -> Iterator[Item]:
        """`keys` must increase."""
        return self.stream.read(self.files, (int(key) for key in keys))

    def record_of(self, keys: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """`fingerprint` (of ids) and all `label_names`, since the used ones are not known before reading."""
        rows = ((self.id(int(key)),) for key in keys)
        return {"fingerprint": hash_items(chain([("rows",)], rows)), "label_names": list(self.label_names)}


Addressable = RandomAccessImages | CountedImages
"""Images with random access by their place in the source."""


class StreamedImages:
    """Images of a stream that cannot be counted. Every process and worker reads all of it and decodes its share only.

    Indices count the images of the part, as for the same images with random access.
    """

    count = None
    whole_units = False

    def __init__(self, stream: StreamingSource, part: Part, held_out: float) -> None:
        self.stream, self.part, self.held_out = stream, part, held_out
        self.label_names = stream.label_names

    def fingerprint(self) -> str:
        return _stream_fingerprint(self.stream, self.part, self.held_out)

    def groups(self, units: Units, unit: int, batch: int) -> Iterator[Group]:
        own = units.numbers(None)
        awaited = next(own)
        for number, pairs in groupby(enumerate(self._items()), lambda pair: pair[0] // unit):
            while awaited < number:
                awaited = next(own)
            if awaited != number:
                continue
            group: list[tuple[int, Item]] = []
            for pair in pairs:
                if len(group) == batch:  # one more image
                    yield Group(number, group, last=False)
                    group = []
                group.append(pair)
            yield Group(number, group, last=True)

    def _items(self) -> Iterator[Item]:
        for item in self.stream.iterate():
            if in_part(item.id, self.part, self.held_out):
                yield item


def open_images(config: DataConfig, part: Part, once: Once = lambda make: make()) -> Images:
    """The images of a collection. `once` runs the slow counting of a stream's files in one process.

    Raises:
        UserError: there are no images, or the part is empty.
    """
    if not config.streaming:
        return RandomAccessImages(subset(open_source(config), part, config.held_out))
    from ldm_vae.data.streaming import open_stream

    stream = open_stream(config)
    files = once(stream.files)
    if files is None:
        return StreamedImages(stream, part, config.held_out)
    return CountedImages(stream, files, part, config.held_out)


def _stream_fingerprint(stream: StreamingSource, part: Part, held_out: float) -> str:
    whole = stream.fingerprint()
    return whole if part == "all" else f"{whole}, {part} at {held_out!r}"


def batches_of(number: int, unit: int, batch: int, count: int) -> Iterator[tuple[range, bool]]:
    """The indices of each batch of a unit, and whether it is the last."""
    end = min((number + 1) * unit, count)
    for start in range(number * unit, end, batch):
        yield range(start, min(start + batch, end)), start + batch >= end


def load_batches(
    images: Images,
    units: Units,
    *,
    unit: int,
    batch: int,
    size: tuple[int, int],
    workers: int,
    pin: bool,
    timeout_seconds: int = TIMEOUT_SECONDS,
) -> Generator[ImageBatch, None, None]:
    """Decode, crop and stack the batches of these units, in `workers` processes.

    A worker holds 4 finished batches. With `images.whole_units`, every worker works on its own unit, so that batches
    alternate and up to `workers` units are open until their `last` batches.

    Raises:
        UserError: while iterating, if the source cannot be read any more, or gives nothing for `timeout_seconds`.
    """
    batches = DataLoader(
        ErrorsAsItems(_Batches(partial(images.groups, unit=unit, batch=batch), units, images.whole_units, batch, size)),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # else the loader draws from the global one
        worker_init_fn=obey_only_the_parent,
        timeout=LOADER_SHARE * timeout_seconds if workers else 0,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    return from_workers(batches)


@dataclass(frozen=True)
class _SourceItem:
    source: ImageSource
    index: int

    @property
    def id(self) -> str:
        return self.source.id(self.index)

    @property
    def label(self) -> int:
        return self.source.label(self.index)

    def read(self) -> np.ndarray:
        return self.source.read(self.index)


class _Batches(IterableDataset):
    """Worker w of n makes its own units, or the batches w, w + n, ... of all. The loader takes them in turn."""

    def __init__(
        self,
        groups: Callable[[Units], Iterable[Group]],
        units: Units,
        whole_units: bool,
        batch: int,
        size: tuple[int, int],
    ) -> None:
        self.groups, self.units, self.whole_units = groups, units, whole_units
        self.batch, self.size = batch, size

    def __iter__(self) -> Iterator[ImageBatch]:
        worker = get_worker_info()
        place, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.whole_units:
            groups = iter(self.groups(self.units.of_worker(place, workers)))
        else:
            groups = islice(self.groups(self.units), place, None, workers)
        yield from map(partial(decode_group, batch=self.batch, size=self.size), groups)


def decode_group(group: Group, batch: int, size: tuple[int, int]) -> ImageBatch:
    """Read and crop the images of a group."""
    enlarged = Enlarged()
    black = torch.zeros(batch, 3, *size, dtype=torch.uint8)
    decoded = ImageBatch(group.unit, black, [], [], [], [], [], group.last)
    for row, (index, item) in enumerate(group.items):
        try:
            pixels = item.read()
        except ImageRejected as error:
            decoded.rejected.append(Rejection(index, item.id, error.reason, str(error)))
            continue
        decoded.images[row] = channels_first(crop_image(pixels, size, item.id, enlarged).pixels)
        decoded.rows.append(row)
        decoded.indices.append(index)
        decoded.labels.append(item.label)
        decoded.ids.append(item.id)
    return replace(decoded, enlarged=len(enlarged))
