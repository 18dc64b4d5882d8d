"""Randomness as a pure function of its keys: no generator state is saved, so none can be restored wrongly.

`generator(seed, "posterior", step)` gives the same stream on every rank, at every restart, for any number of workers.
Draw for the *global* batch and slice, so that results do not depend on how the batch was split.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from ldm_vae.utils.numbers import whole_number

if TYPE_CHECKING:
    import numpy as np
    import torch


def key_hash(*keys: int | str, bits: int = 63) -> int:
    """A stable non-negative integer of `bits` bits from integers and strings (blake2b; equal on every machine).

    Integers of numpy and torch count as Python's. Raises: UserError for other keys, such as bools and floats.
    """
    text = "\x1f".join(f"str:{key}" if isinstance(key, str) else f"int:{whole_number(key, 'seed')}" for key in keys)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") >> (128 - bits)


def generator(seed: int, *keys: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator on `device`, seeded by (seed, *keys)."""
    import torch

    return torch.Generator(device=device).manual_seed(key_hash(seed, *keys))


def numpy_rng(seed: int, *keys: int | str) -> np.random.Generator:
    """A numpy generator (Philox, counter based) seeded by (seed, *keys)."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=key_hash(seed, *keys, bits=128)))
