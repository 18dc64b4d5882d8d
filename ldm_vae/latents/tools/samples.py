"""Which samples of a set a tool looks at, and the labels of all of them, read without the latents."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ldm_vae.errors import UserError
from ldm_vae.latents.index import shard_name
from ldm_vae.latents.manifest import Manifest
from ldm_vae.latents.output import READERS
from ldm_vae.latents.sidecar import MAKE_AGAIN

HEADER_BYTES = 1 << 12
"""Read at first, with the indices and labels that follow; where they lie elsewhere, a second read finds them."""

MOST_SHARDS = 256
"""That samples are taken from: behind a URL each is fetched whole."""


def spread(counts: np.ndarray, samples: int, shards: int = MOST_SHARDS) -> list[int]:
    """At most `samples` numbers of samples, evenly spread over at most `shards` shards, which are evenly spread."""
    filled = np.flatnonzero(counts)
    chosen = filled[evenly(len(filled), shards)]
    before, ends = np.cumsum(counts)[chosen] - counts[chosen], np.cumsum(counts[chosen])
    picks = evenly(int(ends[-1]) if len(ends) else 0, samples)
    place = np.searchsorted(ends, picks, side="right")
    return (before[place] + picks - ends[place] + counts[chosen][place]).tolist()


def evenly(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the numbers below `count`, in the middle of as many equal parts."""
    wanted = min(count, wanted)
    return (2 * np.arange(wanted) + 1) * count // (2 * max(1, wanted))


def read_labels(manifest: Manifest) -> np.ndarray:
    """(count,) int64 in the order of the samples, -1 for none. Raises: UserError for a missing or damaged shard."""
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
    """The name of a class; `class 7` where it has none, empty for no label."""
    if label < 0:
        return ""
    return manifest.label_names[label] if label < len(manifest.label_names) else f"class {label}"
