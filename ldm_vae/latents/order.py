"""The order in which latents are read: block by block of shards, and batches of any order for a plain DataLoader.

Both are pure functions of (seed, position), so that resuming is starting there. The shuffle over the whole set is
`training.order.GlobalOrder`, found here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch.utils.data import Sampler

from ldm_vae.errors import UserError
from ldm_vae.random import numpy_rng
from ldm_vae.training.order import GlobalOrder as GlobalOrder
from ldm_vae.training.order import Order as Order
from ldm_vae.training.order import permuted, round_keys


@dataclass(frozen=True)
class _Epoch:
    """Shards in the order of one epoch: where each ends among the positions, and from there to its dataset indices."""

    ends: np.ndarray
    shifts: np.ndarray


@dataclass(frozen=True, eq=False)
class ShardBlockOrder:
    """Every epoch shuffles the shards, then the samples inside blocks of `block` shards, one block after the other.

    For sets larger than memory: reads touch `block` shards at a time. Holds 16 bytes a shard, for one epoch.

    Args:
        seed: of the order.
        shard_counts: samples of each shard, int64 (shards,), which follow each other in the dataset; 0 is allowed.
        block: shards a block; the last block of an epoch takes what remains.

    Raises:
        UserError: no samples, or no shards in a block.
    """

    seed: int
    shard_counts: np.ndarray
    block: int
    _epochs: dict[int, _Epoch] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UserError(f"order: a block of {self.block} shards holds nothing; give 1 or more")
        if self.count < 1:
            raise UserError(f"order: {len(self.shard_counts)} shards hold no samples; give a set that holds some")

    @cached_property
    def count(self) -> int:
        """Samples in the set."""
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
            self._epochs.clear()  # positions increase: the epoch before is not asked for again
            shards = numpy_rng(self.seed, "order", epoch).permutation(len(self.shard_counts))
            counts = self.shard_counts[shards]
            ends = counts.cumsum()
            starts = (self.shard_counts.cumsum() - self.shard_counts)[shards]
            self._epochs[epoch] = _Epoch(ends, starts - (ends - counts))
        return self._epochs[epoch]


class OrderedSampler(Sampler[list[int]]):
    """The `batch_sampler` of a plain DataLoader: this process's share of each step, a function of the step's number.

    Every process takes a contiguous share of the same global batch, so that step `s` holds the same samples on any
    number of processes. An epoch has `steps_per_epoch` steps; the samples of its order that do not fill another batch
    are left out, other ones in each epoch. Do not let `accelerate` prepare the loader: it would divide it again.

        while step < steps:
            dataset.set_epoch(sampler.start_at(step))
            for batch in DataLoader(dataset, batch_sampler=sampler):
                ...
                step += 1

    Args:
        order: which sample comes when.
        global_batch: samples a step over all processes.
        rank, processes: which share is this process's.

    Raises:
        UserError: the batch does not divide into the processes, or is larger than the set.
    """

    def __init__(self, order: Order, global_batch: int, *, rank: int = 0, processes: int = 1) -> None:
        if global_batch < 1 or global_batch % processes:
            raise UserError(
                f"batch: {global_batch} samples per step do not divide into {processes} process(es); "
                f"choose a multiple of {processes}"
            )
        if global_batch > order.count:
            raise UserError(f"batch: {global_batch} samples per step are more than the {order.count} of the set")
        if not 0 <= rank < processes:
            raise UserError(f"rank: {rank} is none of {processes} process(es); give 0 to {processes - 1}")
        self.order, self.global_batch, self.rank, self.processes = order, global_batch, rank, processes
        self._first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.order.count // self.global_batch

    def start_at(self, step: int) -> int:
        """Let the next pass begin with `step`; it goes to the end of that step's epoch. Returns: the epoch."""
        self._first_step = step
        return step // self.steps_per_epoch

    def __len__(self) -> int:
        """Steps of the next pass."""
        return self.steps_per_epoch - self._first_step % self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first_step = divmod(self._first_step, self.steps_per_epoch)
        share = self.global_batch // self.processes
        for step in range(first_step, self.steps_per_epoch):
            first = epoch * self.order.count + step * self.global_batch + self.rank * share
            yield [self.order(position) for position in range(first, first + share)]
