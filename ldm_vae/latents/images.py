"""The images of an encoding job: divided into work units, decoded in worker processes, in batches of a fixed shape.

A unit is a fixed range of source indices and becomes one shard. What is in a batch follows from the source, the unit
and the batch size alone, so that neither the number of processes nor the number of workers changes a latent's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.samples import to_tensor
from ldm_vae.data.sources import DataConfig, ImageSource, open_source
from ldm_vae.data.split import Part, part_of, subset
from ldm_vae.data.transforms import cover_crop
from ldm_vae.latents.shard import Rejection
from ldm_vae.training.loader import ignore_signals

WORKER_TIMEOUT_SECONDS = 300


class Item(Protocol):
    """An image that is not decoded yet."""

    @property
    def id(self) -> str: ...

    @property
    def label(self) -> int: ...

    def read(self) -> np.ndarray: ...


@dataclass(frozen=True)
class ImageBatch:
    """Consecutive images of one unit.

    Attributes:
        unit: its number.
        images: uint8 (batch, 3, r, r); rows after the last image and of rejected images are black.
        rows: which of them are images; `indices`, `labels` and `ids` belong to these.
        rejected: images that could not be read.
    """

    unit: int
    images: Tensor
    rows: list[int]
    indices: list[int]
    labels: list[int]
    ids: list[str]
    rejected: list[Rejection]

    def pin_memory(self) -> ImageBatch:
        """For the data loader."""
        return replace(self, images=self.images.pin_memory())


Group = tuple[int, Sequence[tuple[int, Item]]]
"""A unit's number and, in order, the (index, item) of one batch of it."""


class Images(Protocol):
    """The images to encode, whichever way they are opened."""

    @property
    def label_names(self) -> tuple[str, ...]: ...

    @property
    def count(self) -> int | None:
        """None for a stream, whose end is not known before it is reached."""
        ...

    def fingerprint(self) -> str: ...

    def groups(self, finished: frozenset[int], rank: int, processes: int, unit: int, batch: int) -> Iterator[Group]:
        """The batches of the unfinished units that process `rank` of `processes` makes, in order."""
        ...


class RandomAccessImages:
    """Images of a source with random access: only the share of this process is touched."""

    def __init__(self, source: ImageSource) -> None:
        self.source, self.label_names, self.count = source, source.label_names, len(source)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def groups(self, finished: frozenset[int], rank: int, processes: int, unit: int, batch: int) -> Iterator[Group]:
        missing = (number for number in range(-(-self.count // unit)) if number not in finished)
        for number in islice(missing, rank, None, processes):
            end = min((number + 1) * unit, self.count)
            for start in range(number * unit, end, batch):
                indices = range(start, min(start + batch, end))
                yield number, [(index, _SourceItem(self.source, index)) for index in indices]


class StreamedImages:
    """Images of a stream: every process and worker reads all of it, and decodes its share only.

    Indices count the images of the part, as they do for the same images with random access.
    """

    count = None

    def __init__(self, config: DataConfig, part: Part) -> None:
        from ldm_vae.data.stream import open_stream

        self.stream, self.part, self.held_out = open_stream(config), part, config.held_out
        self.label_names = self.stream.label_names

    def fingerprint(self) -> str:
        whole = self.stream.fingerprint()
        return whole if self.part == "all" else f"{whole}, {self.part} at {self.held_out!r}"

    def groups(self, finished: frozenset[int], rank: int, processes: int, unit: int, batch: int) -> Iterator[Group]:
        group: list[tuple[int, Item]] = []
        for index, item in enumerate(self._items()):
            number = index // unit
            if number in finished or number % processes != rank:
                continue
            if group and (len(group) == batch or group[0][0] // unit != number):
                yield group[0][0] // unit, group
                group = []
            group.append((index, item))
        if group:
            yield group[0][0] // unit, group

    def _items(self) -> Iterator[Item]:
        for item in self.stream.iterate():
            if self.part == "all" or part_of(item.id, self.held_out) == self.part:
                yield item


def open_images(config: DataConfig, part: Part) -> Images:
    """Raises: UserError when there are no images or the part is empty."""
    if config.streaming:
        return StreamedImages(config, part)
    return RandomAccessImages(subset(open_source(config), part, config.held_out))


def load_batches(
    groups: Callable[[], Iterable[Group]], *, batch: int, resolution: int, workers: int, pin: bool
) -> Iterable[ImageBatch]:
    """Decode, crop and stack what `groups` lists, in this order, in `workers` processes."""
    return DataLoader(
        _Batches(groups, batch, resolution),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # else the loader draws from the global one
        worker_init_fn=ignore_signals,
        timeout=WORKER_TIMEOUT_SECONDS if workers else 0,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )


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
    """Worker w of n makes the batches w, w + n, ...; the loader takes them from the workers in turn."""

    def __init__(self, groups: Callable[[], Iterable[Group]], batch: int, resolution: int) -> None:
        self.groups, self.batch, self.resolution = groups, batch, resolution

    def __iter__(self) -> Iterator[ImageBatch]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from map(partial(decode_group, batch=self.batch, resolution=self.resolution),
                       islice(self.groups(), first, None, step))  # fmt: skip


def decode_group(group: Group, batch: int, resolution: int) -> ImageBatch:
    """Read and crop the images of a group."""
    unit, items = group
    decoded = ImageBatch(unit, torch.zeros(batch, 3, resolution, resolution, dtype=torch.uint8), [], [], [], [], [])
    for row, (index, item) in enumerate(items):
        try:
            pixels = item.read()
        except ImageRejected as error:
            decoded.rejected.append(Rejection(index, item.id, error.reason, str(error)))
            continue
        decoded.images[row] = to_tensor(cover_crop(pixels, resolution))
        decoded.rows.append(row)
        decoded.indices.append(index)
        decoded.labels.append(item.label)
        decoded.ids.append(item.id)
    return decoded
