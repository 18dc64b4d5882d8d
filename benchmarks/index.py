"""How a set of a hundred million samples opens: its manifest and index as they would be, without any latents.

    python -m benchmarks index OUTPUT

For each size of set a folder with plan, index and manifest is written as `ldm-vae encode` writes them; then a fresh
process opens it as `LatentDataset` and looks samples up, as a trainer does, up to the point where a shard would be
opened. Times are medians of three such processes, memory is what the process has more than before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_vae.errors import UserError

SUMMARY = "how sets of up to a thousand million samples open"
SETS = ((100_000_000, 256), (100_000_000, 4096), (1_000_000_000, 4096))
"""Samples and shard size of each set."""
CHANNELS, SIDE = 4, 64
LOOKUPS = 20_000
PROCESSES = 3


def write_set(folder: Path, samples: int, shard_size: int) -> None:
    """Plan, index and manifest of a set whose shards are not there."""
    import numpy as np

    from ldm_vae.latents.format import (
        Manifest,
        Origin,
        ShardIndex,
        manifest_statistics,
        write_index,
        write_manifest,
        write_plan,
    )
    from ldm_vae.storage import open_folder

    shards = -(-samples // shard_size)
    rng = np.random.default_rng(0)
    first = np.arange(shards, dtype=np.int64) * shard_size
    last = np.minimum(first + shard_size, samples) - 1
    counts = last - first + 1
    positions = (counts * SIDE * SIDE).astype(np.float64)[:, None, None]
    moments = np.array([0.1, 1.0, 0.05])[:, None] * rng.normal(1, 0.01, (shards, 3, CHANNELS))
    origin = Origin(
        autoencoder={"fingerprint": "sha256:0", "encoder_fingerprint": "sha256:0", "class": "none", "config": {}},
        preprocessing={"height": 512, "width": 512}, content="moments", dtype="float16",
        latent_shape=(CHANNELS, SIDE, SIDE), flipped=False, encoding={"shard_size": shard_size},
        dataset={"source": "simulated", "count": samples, "label_names": []},
    )  # fmt: skip
    index = ShardIndex(
        {
            "count": counts, "rejected": np.zeros(shards, np.int64), "first_index": first, "last_index": last,
            "size_bytes": counts * origin.layout.sample_bytes,
            "checksum": rng.integers(0, 256, (shards, 16), np.uint8),
            "sidecar_checksum": rng.integers(0, 256, (shards, 16), np.uint8),
            "sums": moments * positions,
        }
    )  # fmt: skip
    where = open_folder(folder)
    write_plan(where, origin)
    segment = origin.dataset | {"first_shard": 0, "first_index": 0, "plan": origin.digest}
    manifest = Manifest(
        autoencoder=origin.autoencoder, preprocessing=origin.preprocessing, content="moments", dtype="float16",
        latent_shape=origin.latent_shape, flipped=False, encoding=origin.encoding, datasets=(segment,), label_names=(),
        count=samples, rejected=0, shards=shards, index=write_index(where, index),
        statistics=manifest_statistics(index, origin.layout, None), where=where,
    )  # fmt: skip
    write_manifest(where, manifest)


def open_set(folder: str) -> dict[str, float]:
    """Open a set in this process and look samples up. Seconds and megabytes."""
    import numpy as np

    from ldm_vae.latents.dataset import LatentDataset, ShardBlockOrder
    from ldm_vae.training.loader import GlobalOrder

    def peak_megabytes() -> float:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports does not count
    before, started = peak_megabytes(), time.perf_counter()
    dataset = LatentDataset(folder)
    opened = time.perf_counter() - started
    memory = peak_megabytes() - before
    positions = np.random.default_rng(0).integers(0, len(dataset), LOOKUPS).tolist()
    found = {"open_seconds": opened, "memory_megabytes": memory}
    blocks = ShardBlockOrder(0, dataset.shard_counts, 64)
    blocks(0)  # the epoch's shards are shuffled once
    for name, order in (("global", GlobalOrder(0, len(dataset))), ("blocks", blocks)):
        started = time.perf_counter()
        for position in positions:
            dataset.locate(order(position))
        found[f"{name}_lookup_microseconds"] = (time.perf_counter() - started) / LOOKUPS * 1e6
    return found | {"memory_with_orders_megabytes": peak_megabytes() - before}


def simulate(samples: int, shard_size: int) -> dict[str, Any]:
    """Measurements for one size of a set: its size on disk, and medians of new processes that open it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder, samples, shard_size)
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        runs = []
        for _ in range(PROCESSES):
            command = [sys.executable, __file__, name]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    index = [size for name, size in sizes.items() if name.startswith("index-")]
    return {
        "samples": samples,
        "shard_size": shard_size,
        "shards": -(-samples // shard_size),
        "index_files": len(index),
        "index_bytes": sum(index),
        "manifest_bytes": sizes["manifest.json"],
        **{key: statistics.median(run[key] for run in runs) for key in runs[0]},
    }


def text(found: dict[str, Any]) -> str:
    """`results.md`."""
    from ldm_vae.utils.text import markdown_table

    headings = ["samples", "shard size", "shards", "index", "manifest.json", "opens in", "memory",
                "lookup, global shuffle", "lookup, shard blocks"]  # fmt: skip
    rows = [
        [
            f"{one['samples']:,}", f"{one['shard_size']:,}", f"{one['shards']:,}",
            f"{one['index_bytes'] / 1e6:.0f} MB in {one['index_files']} files",
            f"{one['manifest_bytes'] / 1e3:.1f} kB", f"{one['open_seconds']:.2f} s",
            f"{one['memory_megabytes']:.0f} MB ({one['memory_with_orders_megabytes']:.0f} with both orders)",
            f"{one['global_lookup_microseconds']:.1f} us", f"{one['blocks_lookup_microseconds']:.1f} us",
        ]
        for one in found["sets"]
    ]  # fmt: skip
    note = (
        f"Simulated: plan, index and manifest as they would be, no latents. Latents {CHANNELS}x{SIDE}x{SIDE}; memory "
        "is the peak over that of the imported packages; a lookup goes from a position of the shuffle to a shard and a "
        f"row in it; medians of {PROCESSES} fresh processes."
    )
    return "\n".join(["# Opening large sets", "", *markdown_table(headings, rows), "", note, ""])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sets", nargs="+", metavar="SAMPLES/SHARD_SIZE", help="sizes of sets to simulate")


def measure(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Every size of set, one after the other. Raises: UserError."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sets = [parsed(words) for words in arguments.sets] if arguments.sets else SETS
    found = []
    for samples, shard_size in sets:
        progress(f"{samples:,} samples in shards of {shard_size:,} ...")
        found.append(simulate(samples, shard_size))
    return {"sets": found}


def parsed(words: str) -> tuple[int, int]:
    """ "1000/16" -> (1000, 16). Raises: UserError."""
    numbers = words.split("/")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise UserError(f"--sets: {words!r} is not SAMPLES/SHARD_SIZE; give for example 1000000/256")
    return int(numbers[0]), int(numbers[1])


if __name__ == "__main__":  # the fresh process of `simulate`
    print(json.dumps(open_set(sys.argv[1])))
