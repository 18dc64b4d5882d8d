"""How fast latents are read: ours, HF `datasets`, a webdataset tar, one `.npy` per image, and a plain numpy memmap.

    python -m benchmarks read OUTPUT

Every reader gets the same samples, float16 (8, 64, 64): mean and log-variance of a 512 x 512 image, 64 KiB. They are
random, in a temporary folder, and few enough to stay in the page cache. What counts is a torch tensor with memory of
its own, single or as a batch of 64. The limit is the memory copy: the same bytes from one array into a batch that is
there already. One process, one thread. The readers take turns, so that what disturbs the machine meets all of them, and
ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rounds import bar, bars_table, rotated
from ldm_vae.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latent_readers import Pass, Reader

SUMMARY = "how fast stored latents are read, beside HF `datasets`, webdataset and numpy"


@dataclass(frozen=True)
class Cell:
    """What is measured: stored moments, or posterior samples drawn from them ("latents")."""

    content: str
    size: str
    order: str


CELLS = [Cell("moments", size, order) for size in ("single", "batch") for order in ("sequential", "random")]
CELLS += [Cell("latents", size, "random") for size in ("single", "batch")]  # drawing takes most of the time

Rates = dict[Cell, dict[str, list[float]]]
"""Cell -> reader -> samples per second in each round."""
PEERS = ("HF `datasets`, `Array3D`, torch format", "webdataset, tar of `.npy`")
"""Those that the promise names."""


def stream(reader: Reader, cell: Cell) -> Iterator[Tensor]:
    """Tensors without end."""
    if cell.content == "moments":
        return forever(reader.moments, cell)
    return forever(reader.latents, cell) if reader.latents else drawn(forever(reader.moments, cell))


def forever(one_pass: Pass, cell: Cell) -> Iterator[Tensor]:
    while True:
        yield from one_pass(cell.size, cell.order)


def drawn(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    """Posterior samples as a user writes them, from stored moments."""
    import torch

    for moments in tensors:
        mean, logvar = moments.float().chunk(2, dim=-3)
        yield mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)


def rate_of(tensors: Iterator[Tensor], samples_each: int, seconds: float) -> float:
    """Samples per second. As in training, a batch is alive until the next one is there."""
    count, started = 0, time.perf_counter()
    for _ in tensors:
        count += samples_each
        if (elapsed := time.perf_counter() - started) >= seconds:
            return count / elapsed
    raise AssertionError("an endless stream has ended")


def measure_all(readers: dict[str, Reader], rounds: int, seconds: float) -> Rates:
    """Rounds in which every reader has its turn, each round begun by another one; the first is not counted."""
    from benchmarks.latent_readers import BATCH, LIMIT

    streams = {cell: {name: stream(reader, cell) for name, reader in readers.items()} for cell in CELLS}
    for cell in CELLS:
        if (cell.content, cell.size) == ("moments", "single"):  # the limit is one number an order
            del streams[cell][LIMIT]
    rates: Rates = {cell: {name: [] for name in turns} for cell, turns in streams.items()}
    for number in range(rounds + 1):
        for cell, turns in streams.items():
            for name in rotated(list(turns), number):
                rate = rate_of(turns[name], BATCH if cell.size == "batch" else 1, seconds)
                if number:
                    rates[cell][name].append(rate)
    return rates


def summary(rates: Rates, missing: dict[str, str]) -> dict[str, Any]:
    """`results.json`: of every cell and reader the rates, and quartiles of what was compared within a round."""
    from benchmarks.latent_readers import BATCH, LIMIT, OURS, SAMPLE_BYTES

    cells = []
    for cell, found in rates.items():
        limit = rates[Cell("moments", "batch", cell.order)][LIMIT]
        for name, measured in found.items():
            median = statistics.median(measured)
            one: dict[str, Any] = {"reader": name, **asdict(cell), "samples_per_second": median, "rounds": measured}
            if cell.content == "moments":
                one["gigabytes_per_second"] = median * SAMPLE_BYTES / 1e9
                one["fraction_of_limit"] = quartiles([rate / most for rate, most in zip(measured, limit)])
            if name != OURS and (name, cell.content) != (LIMIT, "moments"):
                one["ours_over_this"] = quartiles([ours / rate for ours, rate in zip(found[OURS], measured)])
            cells.append(one)
    return {"sample_bytes": SAMPLE_BYTES, "batch": BATCH, "measured": cells, "missing": missing}


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def text(found: dict[str, Any]) -> str:
    """`results.md`."""
    from benchmarks.latent_readers import LIMIT, OURS, READERS
    from ldm_vae.utils.text import markdown_table

    table = {(one["content"], one["size"], one["order"], one["reader"]): one for one in found["measured"]}

    def row(name: str, cells: Sequence[Cell], show: Callable[[dict[str, Any]], str]) -> list[str]:
        if name in found["missing"]:
            return [name, *[found["missing"][name]] * len(cells)]
        ones = [table.get((cell.content, cell.size, cell.order, name)) for cell in cells]
        return [name, *("–" if one is None else show(one) for one in ones)]

    raw, sampled = CELLS[:4], CELLS[4:]
    others = [name for name in READERS if name not in (OURS, LIMIT)]
    headings = ["reader", *(f"{cell.size}, {cell.order}" for cell in raw)]
    lines = ["# Reading latents", "", "Stored moments: samples per second (GB/s, fraction of the limit).", ""]
    lines += markdown_table(headings, [row(name, raw, show_speed) for name in READERS])
    lines += ["", f"{OURS} over each other reader in the same round: median [quartiles].", ""]
    lines += markdown_table(headings, [row(name, raw, show_ratio) for name in others])
    lines += ["", f"Posterior samples per second ({OURS} over this reader). The others draw after reading.", ""]
    headings = ["reader", *(f"{cell.size}, {cell.order}" for cell in sampled)]
    lines += markdown_table(headings, [row(name, sampled, show_both) for name in (OURS, *others, LIMIT)])
    lines += ["", *bars_table(bars(table))]
    return "\n".join([*lines, "", note(found["samples"], found["rounds"], found["seconds"]), ""])


def bars(table: Mapping[tuple[str, str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised, over the peers that were there."""
    from benchmarks.latent_readers import LIMIT, OURS

    found = []
    for size in ("single", "batch"):
        rate = table["moments", size, "random", OURS]["samples_per_second"]
        found.append(bar(f"random samples a second, {size}", rate, 60_000, ""))
        for name in PEERS:
            if one := table.get(("moments", size, "random", name)):
                found.append(bar(f"over {name}, {size}, random", one["ours_over_this"][1], 15))
        drawn_share = table["latents", size, "random", LIMIT]["ours_over_this"][1]
        found.append(bar(f"posterior samples over the arithmetic alone, {size}", drawn_share, 0.5))
    return found


def show_rate(one: dict[str, Any]) -> str:
    return f"{float(format(one['samples_per_second'], '.3g')):,.0f}"


def show_speed(one: dict[str, Any]) -> str:
    return f"{show_rate(one)} ({one['gigabytes_per_second']:.2f} GB/s, {100 * one['fraction_of_limit'][1]:.0f} %)"


def show_ratio(one: dict[str, Any]) -> str:
    low, middle, high = one["ours_over_this"]
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def show_both(one: dict[str, Any]) -> str:
    return show_rate(one) + (f" ({show_ratio(one)})" if "ours_over_this" in one else "")


def note(samples: int, rounds: int, seconds: float) -> str:
    """What the figures hold for."""
    from benchmarks.latent_readers import BATCH, OURS, SAMPLE_BYTES, SHUFFLE_BUFFER

    packages = []
    for name in ("numpy", "datasets", "pyarrow", "webdataset"):
        try:
            packages.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return (
        f"{samples:,} samples of {SAMPLE_BYTES // 1024} KiB, random float16, in the page cache; one process, one "
        f"thread; batches of {BATCH}; medians of {rounds} rounds, in which the readers take turns of {seconds} s. "
        f"Every reader ends with a torch tensor that has its own memory; {OURS} gives label and source index too. "
        f"A tar has no random access: there, random is a shuffle buffer of {SHUFFLE_BUFFER}. The limit, also of single "
        f"samples, copies the same bytes from one array into a batch that is there already; for samples of the "
        f"posterior it is the arithmetic on such a batch. {', '.join(packages)}."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples", type=int, default=8192, help="64 KiB each, seven times on disk (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.15, help="of a reader's turn (default: %(default)s)")
    parser.add_argument("--files", type=Path, help="where the temporary folder is made")


def measure(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Write the formats and let the readers take turns. Raises: UserError."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch, which read it once, are there
    import numpy as np
    import pyarrow
    import torch
    from datasets import disable_progress_bars

    from benchmarks.latent_readers import BATCH, SHAPE, open_readers

    if arguments.samples < BATCH or arguments.samples % BATCH:
        raise UserError(f"--samples: {arguments.samples} are not whole batches; give a multiple of {BATCH}")
    if arguments.rounds < 2:
        raise UserError(f"--rounds: {arguments.rounds} shows no spread; give 2 or more")
    disable_progress_bars()
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    moments = np.random.default_rng(0).standard_normal((arguments.samples, *SHAPE), np.float32).astype(np.float16)
    with tempfile.TemporaryDirectory(dir=arguments.files) as folder:
        progress(f"writing {arguments.samples:,} samples in every format ...")
        readers, missing = open_readers(Path(folder), moments)
        progress(f"{arguments.rounds} rounds of {len(readers)} readers ...")
        found = summary(measure_all(readers, arguments.rounds, arguments.seconds), missing)
    return found | {"samples": arguments.samples, "rounds": arguments.rounds, "seconds": arguments.seconds}
