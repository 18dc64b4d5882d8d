"""Which sample comes at which position: an order is a pure function of (seed, position), so none of it is ever stored.

Owns the keyed permutation and the global shuffle. The order that keeps to a few shards at a time is `latents.order`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, overload

import numpy as np

from ldm_vae.errors import UserError
from ldm_vae.random import key_hash

ROUNDS = 8
"""Of the permutation. How far apart two neighbours land is uniform, as far as 100,000 keys can show, from 30 samples
on; with 6 rounds it is from 1000 on, with 4 not even there."""

_WORD = 2**64 - 1


class Order(Protocol):
    """Global position -> index of the sample. Each epoch, `count` positions, visits each of `count` samples once."""

    @property
    def count(self) -> int: ...

    def __call__(self, position: int) -> int: ...


@dataclass(frozen=True)
class GlobalOrder:
    """Every epoch shuffles the whole set anew. Takes no memory, and a few microseconds a position, at any `count`.

    Raises: UserError when there are no samples.
    """

    seed: int
    count: int

    def __post_init__(self) -> None:
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
    arbitrary finite domains"): places that leave the range, fewer than one in sqrt(count), walk on until they are back.
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
    """32 random bits, a function of both (the multipliers of splitmix64; Steele et al. 2014). Arrays wrap by nature."""
    value = ((value ^ key) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 32)) * 0x94D049BB133111EB) & _WORD
    return value >> 32
