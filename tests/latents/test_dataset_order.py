"""Shard blocks and the sampler: every sample once an epoch, few shards at a time, and the same step on any machine."""

from __future__ import annotations

import pickle
import tracemalloc
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ldm_vae.errors import UserError
from ldm_vae.latents.dataset import LatentDataset, OrderedSampler, ShardBlockOrder
from ldm_vae.training.loader import GlobalOrder

COUNTS = np.array([5, 0, 3, 7, 0, 0, 1, 6, 4, 2, 0], np.int64)


def epochs(order, number: int) -> np.ndarray:
    """Indices (number, count)."""
    return np.array([order(position) for position in range(number * order.count)]).reshape(number, -1)


def shards_of(indices: np.ndarray) -> np.ndarray:
    return np.searchsorted(COUNTS.cumsum(), indices, side="right")


@pytest.mark.parametrize("block", [1, 2, 3, 5, 11, 100])
def test_every_epoch_visits_each_sample_once_in_a_new_order(block):
    found = epochs(ShardBlockOrder(0, COUNTS, block), 4)
    assert np.array_equal(np.sort(found, axis=1), np.tile(np.arange(28), (4, 1)))
    assert len({tuple(epoch) for epoch in found}) == 4


@pytest.mark.parametrize("counts", [[1], [0, 1], [4], [0, 0, 3, 0]])
def test_tiny_sets(counts):
    order = ShardBlockOrder(0, np.array(counts, np.int64), 2)
    assert np.array_equal(np.sort(epochs(order, 5), axis=1), np.tile(np.arange(sum(counts)), (5, 1)))


@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_block_is_read_to_its_end_before_the_next(block):
    for epoch in shards_of(epochs(ShardBlockOrder(0, COUNTS, block), 3)):
        shards = list(dict.fromkeys(epoch.tolist()))  # in the order of their first touch
        last_touch = {shard: np.flatnonzero(epoch == shard)[-1] for shard in shards}
        for position, shard in enumerate(epoch):
            open_ones = [s for s in shards if np.flatnonzero(epoch == s)[0] <= position <= last_touch[s]]
            assert len(open_ones) <= block, (position, shard)


def test_samples_are_mixed_inside_a_block():
    order = ShardBlockOrder(0, np.full(64, 50, np.int64), 16)
    found = np.array([order(position) for position in range(3200)])
    assert [len(set(found[start : start + 800] // 50)) for start in range(0, 3200, 800)] == [16] * 4
    assert all(len(set(found[start : start + 40] // 50)) >= 11 for start in range(0, 800, 40))  # 14.8 expected
    assert (np.diff(found) == 1).mean() < 0.01


def test_one_block_of_all_shards_is_a_shuffle_of_the_whole():
    found = epochs(ShardBlockOrder(0, np.full(10, 100, np.int64), 10), 1)[0]
    cells = np.bincount(np.arange(1000) // 100 * 10 + found // 100, minlength=100)
    assert ((cells - 10) ** 2 / 10).sum() < 160  # chi-square with 81 degrees of freedom; 1 in 10^6 is above 155


def test_a_part_of_a_set_is_read_shard_by_shard(latents):
    dataset = LatentDataset(latents, part="train", held_out=0.3)
    order = ShardBlockOrder(0, dataset.shard_counts, 1)
    shards = [dataset[index]["index"] // 4 for index in epochs(order, 1)[0]]  # shards of 4 images
    assert [shard for shard, before in zip(shards[1:], shards) if shard != before] == list(dict.fromkeys(shards))[1:]
    assert order.count == len(dataset) < 24


def test_positions_may_be_asked_for_in_any_order_and_elsewhere():
    order = ShardBlockOrder(3, COUNTS, 2)
    expected = [order(position) for position in range(100)]
    assert [order(position) for position in reversed(range(100))] == expected[::-1]
    copy = pickle.loads(pickle.dumps(order))
    assert [copy(np.int64(position)) for position in range(100)] == expected
    assert [ShardBlockOrder(4, COUNTS, 2)(position) for position in range(100)] != expected


def test_an_order_never_changes():
    """Recorded: a run that is resumed with a newer version goes on in the same order."""
    order = ShardBlockOrder(7, COUNTS, 3)
    assert [order(position) for position in range(12)] == [3, 4, 15, 2, 0, 1, 25, 23, 24, 22, 26, 27]


def test_memory_is_that_of_the_shards():
    order = ShardBlockOrder(0, np.full(400_000, 256, np.int64), 64)  # 102 million samples
    tracemalloc.start()
    found = [order(position) for position in range(1000)]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 7e6  # two numbers a shard
    assert peak < 30e6
    assert len({index // 256 for index in found}) <= 64


def test_what_cannot_be_put_in_order_is_refused():
    with pytest.raises(UserError, match="block of 0 shards"):
        ShardBlockOrder(0, COUNTS, 0)
    with pytest.raises(UserError, match="2 shards hold no samples"):
        ShardBlockOrder(0, np.zeros(2, np.int64), 1)


@pytest.mark.parametrize("order", [GlobalOrder(0, 28), ShardBlockOrder(0, COUNTS, 3)], ids=["global", "blocks"])
def test_a_step_holds_the_same_samples_on_any_number_of_processes(order):
    whole = list(OrderedSampler(order, 8))
    assert len(whole) == 3
    for processes in (2, 4):
        shares = [list(OrderedSampler(order, 8, rank=rank, processes=processes)) for rank in range(processes)]
        assert [list(chain(*step)) for step in zip(*shares)] == whole


def test_passes_go_to_the_end_of_the_epoch_from_any_step():
    sampler = OrderedSampler(GlobalOrder(0, 28), 8)
    steps = []
    for epoch in range(4):
        assert sampler.start_at(3 * epoch) == epoch
        assert len(sampler) == 3
        steps += list(sampler)
    for epoch in range(4):
        visited = list(chain(*steps[3 * epoch : 3 * epoch + 3]))
        assert len(set(visited)) == len(visited) == 24
    assert sampler.start_at(7) == 2
    assert len(sampler) == 2
    assert list(sampler) == list(sampler) == steps[7:9]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_resumes_with_the_same_latents(latents, workers):
    def steps(first: int, last: int) -> list[torch.Tensor]:
        dataset = LatentDataset(latents)
        sampler = OrderedSampler(GlobalOrder(0, len(dataset)), 9)
        loader = DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0, prefetch_factor=None
        )
        found: list[torch.Tensor] = []
        while first + len(found) < last:
            dataset.set_epoch(sampler.start_at(first + len(found)))
            found += [batch["latent"] for batch in loader]
        return found

    whole = steps(0, 6)
    assert len(whole) == 6
    assert all(map(torch.equal, steps(3, 6), whole[3:]))
    assert all(map(torch.equal, steps(1, 6), whole[1:]))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"global_batch": 9, "processes": 2}, "multiple of 2"),
        ({"global_batch": 0}, "multiple of 1"),
        ({"global_batch": 32}, "more than the 28"),
        ({"global_batch": 8, "rank": 2, "processes": 2}, "rank: 2 is not one of 2 process"),
    ],
)
def test_batches_that_do_not_fit_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        OrderedSampler(GlobalOrder(0, 28), **arguments)
