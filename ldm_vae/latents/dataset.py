"""Reading latents: a plain PyTorch dataset over a finished set, memory-mapped, random access at memory speed."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm_vae.data.split import Part, part_of
from ldm_vae.errors import UserError
from ldm_vae.latents.contents import FLIPPED, STORED_DTYPES
from ldm_vae.latents.manifest import read_manifest
from ldm_vae.latents.normalizer import LatentNormalizer
from ldm_vae.latents.shard import OpenShard, open_shard
from ldm_vae.latents.sidecar import read_ids
from ldm_vae.random import generator
from ldm_vae.storage import is_url

MOST_OPEN_SHARDS = 1 << 14
"""Mapped at once by a process; the kernel allows it about 65,000 mappings in all."""

FETCHED_BYTES = 32 * 10**9
"""About so much of a set behind a URL stays mapped: a copy that the cache has removed takes its space until then."""

Posterior = Literal["sample", "mean", "moments"]


class LatentDataset(Dataset):
    """The samples of a set that `ldm-vae encode` wrote, *not* normalised: use `self.normalizer` before training.

    Shards are opened, and compared with their checksums, when a sample of them is first asked for, in each process on
    its own: safe in data loader workers. Shards behind a URL are fetched whole into a local cache at that moment.

    Args:
        path: the folder with `manifest.json`, or its URL.
        seed: of the posterior noise and of the choice between an image and its mirror image.
        posterior: what is made of stored moments: `sample` draws from the posterior, `mean` and `moments` are as
            stored. Sets that hold something else leave no choice; None: `sample` where there are moments.
        flip: where mirror images are stored, take them one half of the time.
        part: all samples, or the part that the hash of their ids puts them in, as `data.split` does. This reads every
            id: encode large sets with `part=` instead.
        held_out: fraction of ids that are held out; needed with `part`.
        verify: compare each shard with its checksum (about 10 GB/s) before its first use; data loader workers share
            what was compared.

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
        self.seed, self.verify = seed, verify
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
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it change
        self._verified = torch.zeros(len(self.index), dtype=torch.bool).share_memory_()

    def _describe(self) -> None:
        """What an item is: its name, shape and precision (bfloat16 as its bits)."""
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
        """Samples of this dataset in each shard, int64; those of one shard follow each other."""
        if isinstance(self._rows, range):
            return self.index.counts
        ends = np.frombuffer(self._ends, np.int64)
        return np.bincount(np.searchsorted(ends, self._rows, side="right"), minlength=len(self.index))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int | slice | Sequence[int] | np.ndarray | Tensor) -> dict[str, Any]:
        """Sample `i`; what is random in it is a function of (seed, epoch, source index), see `set_epoch`.

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
        return self._batch(i) if isinstance(i, Sequence) else self._one(int(i))

    def sample(self, index: int, position: int, size: int | None = None) -> dict[str, Any]:
        """Sample `index` as the training sample at global `position`: the noise is a function of (seed, position).

        What `training.loader` asks for. `size` has no meaning here.
        """
        return self._one(index, "position", position)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch gives other posterior samples (for indexing; workers see it at once)."""
        self._epoch.fill_(epoch)

    def id(self, i: int) -> str:
        """The id of sample `i` in the image source; reads a sidecar."""
        number, row = self.place(i)
        return self._ids(number)[row]

    def place(self, i: int) -> tuple[int, int]:
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
        # numpy's memory: from 4 MiB it asks for huge pages, torch's costs a page fault every 4 KiB
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
        return "epoch", int(self._epoch) if self._draws else 0  # reading a tensor takes as long as a tenth of a sample

    def _row(self, i: int, moment: tuple[int | str, ...]) -> tuple[np.ndarray, int, int, tuple[int | str, ...]]:
        """(what is stored for sample `i` or its mirror image, not copied; label; source index; key of its noise).
        `moment`: ("position", p), or ("epoch", e), with which the noise depends on the source index too."""
        number, row = self.place(i)
        shard = self._shard(number)
        index = shard["index"].item(row)
        key = (*moment, index) if self._draws and moment[0] == "epoch" else moment
        flip = self.flip and torch.rand((), generator=generator(self.seed, "mirror", *key)) < 0.5
        stored = shard[self.manifest.content + FLIPPED if flip else self.manifest.content]
        return stored[row], shard["label"].item(row), index, key

    def _scratch(self) -> tuple[Tensor, Tensor]:
        """Room for one stored row, and for it in float32."""
        row: np.ndarray = np.empty(self.layout.sample_shape, self._stored_kind)
        return torch.from_numpy(row), torch.empty(self.layout.sample_shape)

    def _fill(
        self, values: np.ndarray, stored: np.ndarray, key: tuple[int | str, ...], scratch: tuple[Tensor, Tensor]
    ) -> None:
        """A latent from what is stored of it."""
        row, full = scratch
        row.numpy()[...] = stored  # the only copy out of the mapped file; the rest happens in the processor's cache
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
        rows = np.array([row for row, id in enumerate(ids) if part_of(id, held_out) == part], np.int64)
        if not len(rows):
            raise UserError(
                f"{self.where}: none of {count} samples falls into the {part} part at held_out={held_out}; "
                "change held_out or encode more images"
            )
        return rows

    def __getstate__(self) -> dict[str, Any]:
        """Mapped files are opened anew in the process that unpickles this; they would travel as copies."""
        return self.__dict__ | {"_open": OrderedDict()}
