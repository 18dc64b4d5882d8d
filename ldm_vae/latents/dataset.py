"""Reading latents: a plain PyTorch dataset over a finished set, memory-mapped, random access at memory speed."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ldm_vae.data.split import Part, in_part
from ldm_vae.errors import UserError
from ldm_vae.latents.format import FLIPPED, MAKE_AGAIN, STORED_DTYPES, Manifest, read_ids, read_manifest, shard_name
from ldm_vae.latents.normalizer import LatentNormalizer
from ldm_vae.latents.shard import OpenShard, open_shard
from ldm_vae.latents.writer import READERS
from ldm_vae.random import generator, numpy_rng
from ldm_vae.storage.base import is_url
from ldm_vae.training.loader import GlobalOrder as GlobalOrder
from ldm_vae.training.loader import Order, permuted, round_keys
from ldm_vae.utils.numbers import whole_number

MOST_OPEN_SHARDS = 1 << 14
"""Number of shards that a process maps at the same time; the kernel allows about 65,000 mappings."""

FETCHED_BYTES = 32 * 10**9
"""Approximate size of the mapped part of a set behind a URL. Removed cache copies use disk space while mapped."""

Posterior = Literal["sample", "mean", "moments"]


class LatentDataset(Dataset):
    """The latents of a finished set as a PyTorch dataset: memory-mapped, random access at memory speed.

        dataset = LatentDataset("latents")
        sample = dataset[0]                                # {"latent": (c, h, w) float32, "label": int, "index": int}
        batch = dataset[[3, 17, 99]]                       # {"latent": (3, c, h, w), "label": (3,), "index": (3,)}
        x = dataset.normalizer.normalize(batch["latent"])  # latents are *not* normalized

    Each process opens a shard, and compares it with its checksum, when it first reads one of its samples. This is safe
    in data loader workers. A shard behind a URL is then downloaded to a local cache.

    Args:
        path: the folder with `manifest.json`, or its URL.
        seed: seed of the posterior noise and of the choice between an image and its mirror image.
        posterior: the form of stored moments: `sample` draws from the posterior, `mean` and `moments` are as stored.
            None: `sample`. Must be None for a set that does not store moments.
        flip: use the stored mirror images half of the time, if there are any.
        part: all samples, or one part of the split by the hash of their ids, see `data.split`. This reads every id:
            encode large sets with `part=` instead.
        held_out: fraction of ids that are held out; needed with `part`.
        verify: compare each shard with its checksum (about 10 GB/s) before its first use. Data loader workers share
            the result.

    Attributes:
        manifest: description of the set, see `format.Manifest`: statistics, label names, autoencoder, preprocessing.
        layout: the stored tensors.
        index: one record for each shard.
        where: the folder or URL, as text.

    Raises:
        UserError: no finished set, a damaged manifest, or an empty part; on first use: a damaged shard.
    """

    def __init__(
        self,
        path: str | Path,
        seed: int = 0,
        posterior: Posterior | None = None,
        *,
        flip: bool = True,
        part: Part = "all",
        held_out: float = 0.0,
        verify: bool = True,
    ) -> None:
        self.seed, self.verify = whole_number(seed, "seed"), verify
        self.manifest = manifest = read_manifest(path)
        self.layout, self.where = manifest.layout, str(manifest.where.location)
        if posterior and manifest.content != "moments":
            raise UserError(
                f"{self.where}: posterior={posterior} needs stored moments, this set holds {manifest.content}; leave "
                "posterior out, or encode with store=moments"
            )
        self.posterior = posterior or "sample"
        self.flip = flip and manifest.flipped
        self.index = manifest.shard_index
        ends = np.cumsum(self.index.counts)
        self._ends = array("q", ends.tolist())  # bisecting it is many times faster than numpy's search for one number
        self._starts = array("q", (ends - self.index.counts).tolist())
        self._describe()
        self._rows = self._select(part, held_out)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._most_open = MOST_OPEN_SHARDS
        if is_url(self.where):
            mean_bytes = max(1, self.index.size_bytes // len(self.index))
            self._most_open = min(MOST_OPEN_SHARDS, max(64, FETCHED_BYTES // mean_bytes))
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with persistent workers
        self._verified = torch.zeros(len(self.index), dtype=torch.bool).share_memory_()

    def _describe(self) -> None:
        """Set the name, shape and precision of an item (bfloat16 as uint16)."""
        content, dtype = self.manifest.content, self.manifest.dtype
        self._stored_kind: Any = np.uint16 if dtype == "bfloat16" else np.dtype(dtype).type
        self._kind: Any
        self._shape: tuple[int, ...]
        self._name, self._shape, self._kind = "latent", self.manifest.latent_shape, np.float32
        if content == "indices":
            self._name, self._shape, self._kind = content, self.layout.sample_shape, np.int64
        elif content == "moments" and self.posterior == "moments":
            self._name, self._shape, self._kind = content, self.layout.sample_shape, self._stored_kind
        samples_posterior = self._name == "latent" and content == "moments" and self.posterior == "sample"
        self._draws = self.flip or samples_posterior

    @property
    def normalizer(self) -> LatentNormalizer:
        """Raises: UserError for a set of codes."""
        return self.manifest.normalizer

    @property
    def shard_counts(self) -> np.ndarray:
        """Number of samples of this dataset in each shard, int64. Samples of a shard are consecutive."""
        if isinstance(self._rows, range):
            return self.index.counts
        ends = np.frombuffer(self._ends, np.int64)
        return np.bincount(np.searchsorted(ends, self._rows, side="right"), minlength=len(self.index))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int | slice | Sequence[int] | np.ndarray | Tensor) -> dict[str, Any]:
        """Sample `i`. Its random numbers are a function of (seed, epoch, source index), see `set_epoch`.

        A list of indices gives a stacked batch of these samples, with a leading axis (n): with
        `DataLoader(dataset, batch_size=None, sampler=BATCHES)` that is about three times as fast as collating them.

        Returns:
            label: int64, -1 for none; index: int64, the place in the image source; and one of
            latent: float32 (c, h, w);
            moments: (2c, h, w) in the stored precision, for posterior="moments";
            indices: int64 (h, w), for a set of codes.
        """
        if isinstance(i, (np.ndarray, Tensor)) and i.ndim:
            i = i.tolist()
        elif isinstance(i, slice):
            i = range(len(self))[i]
        return self._batch(i) if isinstance(i, Sequence) else self._one(whole_number(i, "index"))

    def sample(self, index: int, position: int, size: int | None = None) -> dict[str, Any]:
        """Sample `index` as the training sample at global `position`. The noise is a function of (seed, position).

        For `training.loader`. `size` has no effect here.
        """
        return self._one(index, "position", position)

    def versions(self, i: int) -> Tensor:
        """Every stored latent of image `i`, without noise: (v, c, h, w) float32.

        v is 2 in a set with mirror images (the image comes first), otherwise 1. For moments, the means. Not for codes.
        """
        number, row = self.locate(i)
        shard = self._shard(number)
        stored = torch.stack([torch.from_numpy(shard[name][row].copy()) for name in self.layout.names])
        return stored.view(STORED_DTYPES[self.manifest.dtype])[:, : self.manifest.latent_shape[0]].float()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the posterior samples (for indexing; takes effect in workers immediately)."""
        self._epoch.fill_(epoch)

    def id(self, i: int) -> str:
        """The id of sample `i` in the image source; reads a sidecar."""
        number, row = self.locate(i)
        return self._ids(number)[row]

    def locate(self, i: int) -> tuple[int, int]:
        """(shard number, row in it) of sample `i`. Raises: IndexError."""
        if not -len(self._rows) <= i < len(self._rows):
            raise IndexError(f"{self.where}: sample {i} of {len(self)}")
        place = int(self._rows[i])
        number = bisect_right(self._ends, place)
        return number, place - self._starts[number]

    def _one(self, i: int, *moment: int | str) -> dict[str, Any]:
        stored, label, index, key = self._row(i, moment or self._this_epoch())
        if self._name != "latent":
            return {self._name: self._tensor(stored.astype(self._kind)), "label": label, "index": index}
        values: np.ndarray = np.empty(self._shape, self._kind)
        self._fill(values, stored, key, self._scratch())
        return {self._name: self._tensor(values), "label": label, "index": index}

    def _batch(self, samples: Sequence[int]) -> dict[str, Tensor]:
        # numpy's memory uses huge pages from 4 MiB, torch's has a page fault every 4 KiB
        values: np.ndarray = np.empty((len(samples), *self._shape), self._kind)
        moment, labels, indices = self._this_epoch(), [], []
        scratch = self._scratch() if self._name == "latent" else None
        for row, i in zip(values, samples):
            stored, label, index, key = self._row(i, moment)
            if scratch is None:
                row[...] = stored
            else:
                self._fill(row, stored, key, scratch)
            labels.append(label)
            indices.append(index)
        label, index = torch.tensor([labels, indices])
        return {self._name: self._tensor(values), "label": label, "index": index}

    def _this_epoch(self) -> tuple[str, int]:
        return "epoch", int(self._epoch) if self._draws else 0  # reading a tensor takes a tenth of the time of a sample

    def _row(self, i: int, moment: tuple[int | str, ...]) -> tuple[np.ndarray, int, int, tuple[int | str, ...]]:
        """(what is stored for sample `i` or its mirror image, not copied; label; source index; key of its noise).
        `moment`: ("position", p), or ("epoch", e), with which the noise depends on the source index too."""
        number, row = self.locate(i)
        shard = self._shard(number)
        index = shard["index"].item(row)
        key = (*moment, index) if self._draws and moment[0] == "epoch" else moment
        flip = self.flip and torch.rand((), generator=generator(self.seed, "mirror", *key)) < 0.5
        stored = shard[self.manifest.content + FLIPPED if flip else self.manifest.content]
        return stored[row], shard["label"].item(row), index, key

    def _scratch(self) -> tuple[Tensor, Tensor]:
        """Buffers for one stored row, and for it in float32."""
        row: np.ndarray = np.empty(self.layout.sample_shape, self._stored_kind)
        return torch.from_numpy(row), torch.empty(self.layout.sample_shape)

    def _fill(
        self, values: np.ndarray, stored: np.ndarray, key: tuple[int | str, ...], scratch: tuple[Tensor, Tensor]
    ) -> None:
        """A latent from its stored form."""
        row, full = scratch
        row.numpy()[...] = stored  # the only copy from the mapped file; the rest stays in the processor's cache
        latent, cached = torch.from_numpy(values), row.view(STORED_DTYPES[self.manifest.dtype])
        if self.manifest.content != "moments" or self.posterior == "mean":
            latent.copy_(cached[: len(latent)])
            return
        mean, logvar = full.copy_(cached).chunk(2)
        latent.normal_(generator=generator(self.seed, "posterior", *key))
        latent.mul_(logvar.mul_(0.5).exp_()).add_(mean)

    def _tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.view(torch.bfloat16) if self._kind is np.uint16 else tensor

    def _shard(self, number: int) -> OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        verify = self.verify and not self._verified[number]
        shard = open_shard(self.manifest.where, number, self.index[number], self.layout, verify=verify)
        self._verified[number] |= verify
        self._open[number] = shard
        if len(self._open) > self._most_open:
            self._open.popitem(last=False)
        return shard

    def _ids(self, number: int) -> list[str]:
        return read_ids(self.manifest.where, number, self.index[number])

    def _select(self, part: Part, held_out: float) -> Sequence[int] | np.ndarray:
        count = self.manifest.count
        if part == "all":
            return range(count)
        ids = (id for number in range(len(self.index)) for id in self._ids(number))
        rows = np.array([row for row, id in enumerate(ids) if in_part(id, part, held_out)], np.int64)
        if not len(rows):
            raise UserError(
                f"{self.where}: none of {count} samples falls into the {part} part at held_out={held_out}; "
                "change held_out or encode more images"
            )
        return rows

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped files, which would be pickled as copies; the other process opens them again."""
        return self.__dict__ | {"_open": OrderedDict()}


# The order of latents: block by block of shards, and batches in any order for a plain DataLoader.


@dataclass(frozen=True)
class _Epoch:
    """Shards in the order of one epoch: the position where each ends, and the offset to its dataset indices."""

    ends: np.ndarray
    shifts: np.ndarray


@dataclass(frozen=True, eq=False)
class ShardBlockOrder:
    """Shuffles in every epoch the shards, then the samples inside blocks of `block` shards, block by block.

    For sets larger than memory: reads touch `block` shards at a time. Needs 16 bytes per shard.

    Args:
        seed: seed of the order.
        shard_counts: number of samples of each shard, int64 (shards,), in the order of the dataset; 0 is allowed.
        block: shards per block; the last block of an epoch has the remaining shards.

    Raises:
        UserError: no samples, or no shards in a block.
    """

    seed: int
    shard_counts: np.ndarray
    block: int
    _epochs: dict[int, _Epoch] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("seed", "block"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name))
        if self.block < 1:
            raise UserError(f"order: a block of {self.block} shards is empty; give 1 or more")
        if self.count < 1:
            raise UserError(f"order: {len(self.shard_counts)} shards hold no samples; give a set that holds some")

    @cached_property
    def count(self) -> int:
        """Number of samples in the set."""
        return int(self.shard_counts.sum())

    def __call__(self, position: int) -> int:
        epoch, offset = divmod(int(position), self.count)
        ends, shifts = self._shards(epoch).ends, self._shards(epoch).shifts
        block = int(ends.searchsorted(offset, "right") // self.block)
        first = int(ends[block * self.block - 1]) if block else 0
        last = int(ends[min((block + 1) * self.block, len(ends)) - 1])
        keys = round_keys(self.seed, "order", epoch, block)
        place = first + permuted(offset - first, last - first, keys)
        return place + int(shifts[ends.searchsorted(place, "right")])

    def _shards(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs.clear()  # positions increase, so earlier epochs are not needed again
            shards = numpy_rng(self.seed, "order", epoch).permutation(len(self.shard_counts))
            counts = self.shard_counts[shards]
            ends = counts.cumsum()
            starts = (self.shard_counts.cumsum() - self.shard_counts)[shards]
            self._epochs[epoch] = _Epoch(ends, starts - (ends - counts))
        return self._epochs[epoch]


class OrderedSampler(Sampler[list[int]]):
    """The `batch_sampler` of a plain DataLoader: this process's share of each step, a function of the step's number.

    Every process takes a contiguous share of the same global batch, so that step `s` has the same samples for any
    number of processes. An epoch has `steps_per_epoch` steps. The remaining samples, which do not fill a batch, are
    dropped; they differ in each epoch. Do not let `accelerate` prepare the loader, which would divide it again.

        while step < steps:
            dataset.set_epoch(sampler.start_at(step))
            for batch in DataLoader(dataset, batch_sampler=sampler):
                ...
                step += 1

    Args:
        order: the order of the samples.
        global_batch: samples per step over all processes.
        rank, processes: number of this process, and of all.

    Raises:
        UserError: the batch does not divide into the processes, or is larger than the set.
    """

    def __init__(self, order: Order, global_batch: int, *, rank: int = 0, processes: int = 1) -> None:
        global_batch, rank, processes = (
            whole_number(value, name)
            for name, value in (("global_batch", global_batch), ("rank", rank), ("processes", processes))
        )
        if global_batch < 1 or global_batch % processes:
            raise UserError(
                f"batch: {global_batch} samples per step do not divide into {processes} process(es); "
                f"choose a multiple of {processes}"
            )
        if global_batch > order.count:
            raise UserError(f"batch: {global_batch} samples per step are more than the {order.count} of the set")
        if not 0 <= rank < processes:
            raise UserError(f"rank: {rank} is not one of {processes} process(es); give 0 to {processes - 1}")
        self.order, self.global_batch, self.rank, self.processes = order, global_batch, rank, processes
        self._first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.order.count // self.global_batch

    def start_at(self, step: int) -> int:
        """Let the next pass begin with `step`; it ends with that step's epoch. Returns: the epoch."""
        self._first_step = whole_number(step, "step")
        return self._first_step // self.steps_per_epoch

    def __len__(self) -> int:
        """Number of steps of the next pass."""
        return self.steps_per_epoch - self._first_step % self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first_step = divmod(self._first_step, self.steps_per_epoch)
        share = self.global_batch // self.processes
        for step in range(first_step, self.steps_per_epoch):
            first = epoch * self.order.count + step * self.global_batch + self.rank * share
            yield [self.order(position) for position in range(first, first + share)]


# Choosing samples, and the labels of all samples, read without the latents.

HEADER_BYTES = 1 << 12
"""Bytes of the first read, usually with indices and labels; otherwise a second read gets them."""

MOST_SHARDS = 256
"""Largest number of shards to take samples from, since each shard behind a URL is downloaded whole."""


def samples_per_shard(counts: np.ndarray, samples: int, shards: int = MOST_SHARDS) -> list[int]:
    """Indices of at most `samples` samples, evenly spread over at most `shards` evenly spread shards."""
    filled = np.flatnonzero(counts)
    chosen = filled[evenly(len(filled), shards)]
    before, ends = np.cumsum(counts)[chosen] - counts[chosen], np.cumsum(counts[chosen])
    picks = evenly(int(ends[-1]) if len(ends) else 0, samples)
    place = np.searchsorted(ends, picks, side="right")
    return (before[place] + picks - ends[place] + counts[chosen][place]).tolist()


def evenly(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the numbers below `count`: the centers of equal parts."""
    wanted = min(count, wanted)
    return (2 * np.arange(wanted) + 1) * count // (2 * max(1, wanted))


def read_labels(manifest: Manifest) -> np.ndarray:
    """Labels (count,) int64 of all samples, -1 for none. Raises: UserError for a missing or damaged shard."""
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda number: _labels_of(manifest, number), range(manifest.shards)))
    return np.concatenate([np.empty(0, np.int64), *found])


def _labels_of(manifest: Manifest, number: int) -> np.ndarray:
    count, name = int(manifest.shard_index.counts[number]), shard_name(number)
    try:
        data = manifest.where.read(name, HEADER_BYTES + 16 * count)
        start = 8 + int.from_bytes(data[:8], "little")
        tensor = json.loads(data[8:start])["label"]
        begin, end = (start + offset for offset in tensor["data_offsets"])
        if end > len(data):
            data = manifest.where.read(name, end)
        labels = np.frombuffer(data[begin:end], "<i8")
        if tensor["dtype"] != "I64" or len(labels) != count:
            raise ValueError(f"{len(labels)} labels of type {tensor['dtype']} for {count} samples")
        return labels
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise UserError(
            f"{manifest.where.location}/{name}: its labels cannot be read ({type(error).__name__}: {error}); "
            f"{MAKE_AGAIN}"
        ) from error


def label_text(manifest: Manifest, label: int) -> str:
    """The name of a class; `class 7` if it has none, empty without a label."""
    if label < 0:
        return ""
    return manifest.label_names[label] if label < len(manifest.label_names) else f"class {label}"
