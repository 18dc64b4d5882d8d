"""The keyed permutation: a bijection at every count, and as even as chance."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
from scipy.stats import chi2

from ldm_vae.errors import UserError
from ldm_vae.training.loader import ROUNDS, GlobalOrder, permuted, round_keys

UNLIKELY = 1e-6


def chance(values: np.ndarray, cells: int) -> float:
    """Probability that values uniform on 0 ... cells - 1 are at least as uneven as these, by chi-square."""
    expected = len(values) / cells
    seen = np.bincount(np.asarray(values, np.int64), minlength=cells)
    return float(chi2.sf(((seen - expected) ** 2 / expected).sum(), cells - 1))


def epoch_of(count: int, *keys: int) -> np.ndarray:
    return permuted(np.arange(count, dtype=np.uint64), count, round_keys(0, "order", *keys)).astype(np.int64)


@pytest.mark.parametrize("count", [*range(1, 40), 255, 256, 257, 1000, 65_537, 300_000])
def test_each_epoch_visits_every_sample_once(count):
    assert np.array_equal(np.sort(epoch_of(count, 0)), np.arange(count))


def test_the_order_of_single_positions_is_that_of_arrays_and_goes_on_through_the_epochs():
    order = GlobalOrder(seed=0, count=1000)
    assert [order(position) for position in range(3000)] == [*epoch_of(1000, 0), *epoch_of(1000, 1), *epoch_of(1000, 2)]
    assert order(np.int64(1500)) == order(1500)


def test_an_order_never_changes():
    """Recorded: a run that is resumed with a newer version goes on in the same order."""
    order = GlobalOrder(seed=7, count=10**8)
    assert [order(position) for position in (0, 1, 99_999_999, 10**8, 5 * 10**9 + 3)] == [
        67134137, 87340798, 82502897, 20035938, 89167659,
    ]  # fmt: skip
    assert pickle.loads(pickle.dumps(order)) == order


def test_seeds_and_epochs_are_unrelated():
    count = 100_000
    for other in (epoch_of(count, 1), permuted(np.arange(count, dtype=np.uint64), count, round_keys(1, "order", 0))):
        assert chance((other.astype(np.int64) - epoch_of(count, 0)) % count * 100 // count, 100) > UNLIKELY


@pytest.mark.parametrize("count", [1000, 65_536, 1_000_000])
def test_within_an_epoch_neighbours_land_anywhere(count):
    order = epoch_of(count, 0)
    for distance in (1, 2, round(count**0.5), round(count**0.5) + 1):
        apart = (order - np.roll(order, distance)) % count
        assert chance(apart * 50 // count, 50) > UNLIKELY, distance
    place = np.arange(count) * 10 // count  # joint with where they came from
    assert chance(place * 10 + order * 10 // count, 100) > UNLIKELY


@pytest.mark.parametrize("count", [2, 10, 36, 100])
def test_over_many_epochs_a_sample_comes_anywhere(count):
    assert chance(permuted_by_each(1, count), count) > UNLIKELY


@pytest.mark.parametrize("count", [36, 100, 1000])
def test_over_many_epochs_neighbours_come_anywhere(count):
    """Also those above each other in the grid of the network."""
    first = permuted_by_each(1, count)
    for neighbour in (2, 1 + round(count**0.5)):
        apart = (permuted_by_each(neighbour, count) - first) % count
        assert chance(apart - 1, count - 1) > UNLIKELY, neighbour


def permuted_by_each(place: int, count: int, permutations: int = 20_000) -> np.ndarray:
    """Where each of many permutations takes one place: int64 (permutations,)."""
    keys = np.random.default_rng(0).integers(0, 2**64, (permutations, ROUNDS), np.uint64).tolist()
    return np.array([permuted(place, count, row) for row in keys], np.int64)


def test_small_sets_meet_all_their_orders():
    orders = {tuple(epoch_of(4, epoch)) for epoch in range(1000)}
    assert len(orders) == 24


def test_nothing_is_held_at_a_hundred_million_samples():
    order = GlobalOrder(0, 10**8)
    order(0)
    tracemalloc.start()
    for position in range(0, 10**8, 10**6):
        order(position)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_no_samples_are_refused():
    with pytest.raises(UserError, match="0 samples"):
        GlobalOrder(0, 0)
