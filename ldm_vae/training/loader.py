"""The batches of a run, as a pure function of the step: the plan, the order of the samples, and the loading of them.

step -> `Plan.span` (batch sizes, position of the first sample) -> `Order` (position -> index of a sample)
     -> `Samples.sample` in worker processes -> `Batch` of micro-batches on the device

None of this is saved: a resumed run starts at its step.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ldm_vae.errors import UserError
from ldm_vae.random import generator, key_hash
from ldm_vae.training.distributed import TIMEOUT_SECONDS
from ldm_vae.training.watchdog import CONTINUES, obey_only_the_parent
from ldm_vae.utils.numbers import whole_number


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, final_fraction: float) -> float:
    """Linear warmup to `peak`, then a cosine decay to `final_fraction * peak` at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (final_fraction + (1 - final_fraction) * cosine)


@dataclass(frozen=True)
class Span:
    """A stretch of steps with the same batch and sample size.

    Args:
        steps: optimizer steps.
        global_batch: samples per step over all processes.
        micro_batch: samples per forward pass of one process; the accumulation follows from it.
        size: side of the samples in pixels (or positions); None for their own size.
    """

    steps: int
    global_batch: int
    micro_batch: int
    size: int | None = None


@dataclass(frozen=True)
class Plan:
    """The whole run: spans in order. Everything about a step follows from its number."""

    spans: tuple[Span, ...]

    @property
    def steps(self) -> int:
        return sum(span.steps for span in self.spans)

    @property
    def starts(self) -> list[int]:
        """The first step of each span but the first, counted from 1."""
        ends = itertools.accumulate(span.steps for span in self.spans[:-1])
        return [end + 1 for end in ends]

    def span(self, step: int) -> tuple[Span, int]:
        """The span that holds `step`, and the position (count of samples before it) of the step's first sample."""
        position = 0
        for span in self.spans:
            if step < span.steps:
                return span, position + step * span.global_batch
            step -= span.steps
            position += span.steps * span.global_batch
        raise IndexError("step beyond the plan")

    def check(self, processes: int) -> None:
        """Raises: UserError when a global batch does not divide into processes times micro-batches."""
        for span in self.spans:
            if span.global_batch % (processes * span.micro_batch):
                raise UserError(
                    f"batch: {span.global_batch} samples per step do not divide into {processes} process(es) of "
                    f"micro-batches of {span.micro_batch}; choose a multiple of {processes * span.micro_batch}"
                )


# The order of the samples.

ROUNDS = 8
"""Rounds of the permutation. The distance of two adjacent samples after it is uniform for 30 samples and more, tested
with 100,000 keys. With 6 rounds this needs 1000 samples; with 4 rounds it fails even there."""

_WORD = 2**64 - 1


class Order(Protocol):
    """Global position -> index of the sample. Each epoch, `count` positions, visits each of `count` samples once."""

    @property
    def count(self) -> int: ...

    def __call__(self, position: int) -> int: ...


@dataclass(frozen=True)
class GlobalOrder:
    """Shuffles the whole set in every epoch. Needs no memory and a few microseconds per position, for any `count`.

    Raises: UserError when there are no samples.
    """

    seed: int
    count: int

    def __post_init__(self) -> None:
        for name in ("seed", "count"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name))
        if self.count < 1:
            raise UserError(f"order: there are {self.count} samples to put in order; give a set that holds some")

    def __call__(self, position: int) -> int:
        epoch, place = divmod(int(position), self.count)
        return permuted(place, self.count, round_keys(self.seed, "order", epoch))


@lru_cache(maxsize=64)
def round_keys(seed: int, *keys: int | str) -> tuple[int, ...]:
    """The keys of one permutation, 64 bits a round."""
    return tuple(key_hash(seed, *keys, number, bits=64) for number in range(ROUNDS))


@overload
def permuted(places: int, count: int, keys: Sequence[int]) -> int: ...
@overload
def permuted(places: np.ndarray, count: int, keys: Sequence[int]) -> np.ndarray: ...
def permuted(places: Any, count: int, keys: Sequence[int]) -> Any:
    """Where the permutation of 0 ... `count` - 1 that belongs to `keys` takes `places`: an integer, or uint64 (n,).

    A Feistel network on the smallest near-square grid that holds them all (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"). Places outside the range, fewer than one in sqrt(count), are permuted again.
    """
    columns = math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    moved = _feistel(places, columns, rows, keys)
    if isinstance(places, np.ndarray):
        while (outside := moved >= count).any():
            moved[outside] = _feistel(moved[outside], columns, rows, keys)
    else:
        while moved >= count:
            moved = _feistel(moved, columns, rows, keys)
    return moved


def _feistel(places: Any, columns: int, rows: int, keys: Sequence[int]) -> Any:
    row, column = places // columns, places % columns
    for even, odd in zip(keys[::2], keys[1::2]):
        column = (column + _scramble(row, even)) % columns
        row = (row + _scramble(column, odd)) % rows
    return row * columns + column


def _scramble(value: Any, key: int) -> Any:
    """32 random bits, a function of both (the multipliers of splitmix64; Steele et al. 2014). Arrays wrap around."""
    value = ((value ^ key) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 32)) * 0x94D049BB133111EB) & _WORD
    return value >> 32


# The samples and the micro-batches of a step.

LOADER_SHARE = 0.8
"""Share of the timeout that the wait for a batch may take: its error says more than the timeout of other processes."""

STACKS_SECONDS = 0.5
"""The signal at which the workers show what they are doing."""


class Samples(Protocol):
    """A finite set of training samples. All randomness of a sample depends on its global `position` only."""

    def __len__(self) -> int: ...

    def sample(self, index: int, position: int, size: int | None) -> dict[str, Any]:
        """Sample `index` as tensors and plain values; `size` is the span's sample size."""
        ...

    def id(self, index: int) -> str:
        """The name of sample `index` for messages."""
        ...


@runtime_checkable
class StreamedSamples(Protocol):
    """Samples without random access or a known number, chosen by position alone."""

    def batches(self, keys: Iterable[list[Key]]) -> IterableDataset:
        """A list of samples for each list of keys, whose positions increase."""
        ...


@dataclass(frozen=True)
class InOrder:
    """Samples with an order of their own in place of the global shuffle."""

    samples: Samples
    order: Order

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int, position: int, size: int | None) -> dict[str, Any]:
        return self.samples.sample(index, position, size)

    def id(self, index: int) -> str:
        return self.samples.id(index)


@dataclass(frozen=True)
class Key:
    """Which sample to make: its source index, its global position, its size."""

    index: int
    position: int
    size: int | None


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass: stacked tensors, and their rows in the global batch."""

    data: dict[str, Any]
    rows: slice

    def __getitem__(self, name: str) -> Tensor:
        return self.data[name]


@dataclass(frozen=True)
class Batch:
    """This process's share of one step. `first_index`: index of the global batch's first sample; -1 for a stream."""

    parts: tuple[MicroBatch, ...]
    global_size: int
    first_index: int = -1


class WorkerLost(UserError):
    """A loading process hangs or was killed."""


class _Keyed(Dataset):
    """A sample for each key. A `UserError` is passed as an item: torch would pass only its text to the main process."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, key: Key) -> dict[str, Any] | UserError:
        try:
            return self.samples.sample(key.index, key.position, key.size)
        except UserError as error:
            return error


class ErrorsAsItems(IterableDataset):
    """The items of a stream. A `UserError` that ends it is the last item, which `from_workers` raises."""

    def __init__(self, items: IterableDataset) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.items
        except UserError as error:
            yield error


class _MicroBatchKeys:
    """The keys of every micro-batch of this rank from a step on. `order` None: a stream, where the index is unknown."""

    def __init__(self, plan: Plan, order: Order | None, first_step: int, rank: int, processes: int) -> None:
        self.plan, self.order, self.first_step = plan, order, first_step
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.first_step, self.plan.steps):
            span, first = self.plan.span(step)
            for rows in rank_rows(span.global_batch, span.micro_batch, self.rank, self.processes):
                positions = range(first + rows.start, first + rows.stop)
                yield [Key(self._index(position), position, span.size) for position in positions]

    def _index(self, position: int) -> int:
        return -1 if self.order is None else self.order(position)


def rank_rows(global_batch: int, micro_batch: int, rank: int, processes: int) -> list[slice]:
    """The rows of the global batch that a rank's micro-batches take: one contiguous share a rank."""
    share = global_batch // processes
    starts = range(rank * share, (rank + 1) * share, micro_batch)
    return [slice(start, start + micro_batch) for start in starts]


def order_of(samples: Samples, seed: int) -> Order:
    """The order of the samples: their own, or the global shuffle."""
    return samples.order if isinstance(samples, InOrder) else GlobalOrder(seed, len(samples))


def collate(samples: list[dict[str, Any] | UserError] | UserError) -> dict[str, Any] | UserError:
    """Stack tensors, make tensors of numbers, join lists. If there are errors, the first one is returned instead."""
    if isinstance(samples, UserError):
        return samples
    made = [sample for sample in samples if not isinstance(sample, UserError)]
    if len(made) < len(samples):
        return next(sample for sample in samples if isinstance(sample, UserError))
    collated: dict[str, Any] = {}
    for name, first in made[0].items():
        values = [sample[name] for sample in made]
        if isinstance(first, Tensor):
            collated[name] = torch.stack(values)
        elif isinstance(first, list):
            collated[name] = [item for value in values for item in value]
        else:
            collated[name] = torch.tensor(values)
    return collated


def from_workers(loader: Iterable[Any]) -> Generator[Any, None, None]:
    """The items of a data loader; an error of a worker is raised so that the program can end.

    torch raises it from frames that hold the loader's iterator in a reference cycle. If that is collected late, torch
    waits for the workers before it stops them, and since they ignore signals, the program would hang at its end. A
    worker that hangs is killed, since torch would end it by a signal that it ignores.

    Raises:
        UserError: an item that is one.
        WorkerLost: a worker hangs, or was killed.
    """
    iterator = iter(loader)
    workers = getattr(iterator, "_workers", [])
    for worker in workers:
        worker.terminate = worker.kill
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            lost = lost_worker(error)
            if lost:
                show_and_kill(workers)
            traceback.clear_frames(error.__traceback__)
            del iterator
            if lost:
                raise lost from None
            raise
        if isinstance(item, UserError):
            del iterator
            raise item
        yield item


def lost_worker(error: BaseException) -> WorkerLost | None:
    """The error to raise instead of torch's for a worker that hangs or was killed, which has no class of its own."""
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader "):
        return None
    if "timed out" in str(error):
        what = f"no batch from the loading processes ({error}); what they were doing is above"
        return WorkerLost("data", what, f"look at the disk or the network there, or raise timeout_seconds; {CONTINUES}")
    cure = "usually because memory ran out: lower workers, or give the container more shared memory"
    return WorkerLost("data", f"a loading process was killed ({str(error).splitlines()[0]})", f"{cure}; {CONTINUES}")


def show_and_kill(workers: list[Any]) -> None:
    """Let each worker show on stderr what it is doing, if it can, then kill it."""
    for worker in workers:
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGUSR1)
    time.sleep(STACKS_SECONDS)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # else torch's handler raises an error for each, at any point of the program
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
        worker.join(STACKS_SECONDS)
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler)


def batches(
    samples: Samples | StreamedSamples,
    plan: Plan,
    *,
    seed: int,
    first_step: int = 0,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    timeout_seconds: int = TIMEOUT_SECONDS,
) -> Generator[Batch, None, None]:
    """The batches of steps `first_step` ... on `device`. Samples are made in `workers` processes."""
    device = torch.device(device)
    place = (first_step, rank, processes)
    source: dict[str, Any]
    order: Order | None = None
    if isinstance(samples, StreamedSamples):
        keyed = samples.batches(_MicroBatchKeys(plan, None, *place))
        source = {"dataset": ErrorsAsItems(keyed), "batch_size": None}
    else:
        order = order_of(samples, seed)
        keys = _MicroBatchKeys(plan, order, *place)
        source = {"dataset": _Keyed(samples), "batch_sampler": keys}
    loader: DataLoader[Any] = DataLoader(
        **source,
        collate_fn=collate,
        num_workers=workers,
        generator=generator(seed, "loader"),  # else every iter() draws from the global generator
        worker_init_fn=obey_only_the_parent,
        timeout=LOADER_SHARE * timeout_seconds if workers else 0,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    collated = from_workers(loader)
    for step in range(first_step, plan.steps):
        span, position = plan.span(step)
        parts = []
        for rows in rank_rows(span.global_batch, span.micro_batch, rank, processes):
            data = {
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in next(collated).items()
            }
            parts.append(MicroBatch(data, rows))
        yield Batch(tuple(parts), span.global_batch, int(order(position)) if order else -1)
