"""How cost grows: with processes, with the size and the number of images, with the batch; and what memory does.

    python -m benchmarks scaling OUTPUT

Processes have one thread each and decode their images themselves, so that two of them use two cores and one uses one;
their rates are those of the run records, without the start. Exponents are fits of log seconds over log pixels: 1 is
linear. Memory is the peak of a fresh process. Weights are random: they change no cost.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ldm_vae.errors import UserError

SUMMARY = "cost over processes, image size, batch and number of images; memory"

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
LATENT_CHANNELS, DOWNSAMPLING = 4, 8
SMALL_SIDE = 128
"""Side of the images for the dependence on their number and on the batch size."""
MORE = 10
"""Times as many images: their memory."""
TILED_MEGABYTES = 4096
TRAINED_BATCH = 16
POLL_SECONDS = 0.02
LOG_LINES = 4
"""Number of log lines of a training; the first is not counted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024], help="sides of images in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="images a pass")
    parser.add_argument("--images", type=int, default=128, help="encoded for the memory, and ten times as many (128)")
    parser.add_argument("--size", type=int, default=256, help="of the images that processes share (256)")
    parser.add_argument("--shared-images", type=int, default=512, help="that processes encode (512)")
    parser.add_argument("--steps", type=int, default=40, help="of a training (40)")
    parser.add_argument("--tiled", type=int, default=4096, help="side of the image decoded in tiles (4096)")
    parser.add_argument("--preset", default="nano", help="of the autoencoder (nano)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")


def measure(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Each part in fresh processes. Raises: UserError."""
    from benchmarks.dataset import write_autoencoder, write_images

    names = ("sizes", "batches", "images", "size", "shared_images", "steps", "tiled", "preset", "rounds")
    found: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_autoencoder(folder / "autoencoder", "wavelet", arguments.preset)
        write_images(folder / "images", arguments.shared_images, arguments.size)
        write_images(folder / "few", arguments.images, SMALL_SIDE)
        repeat(folder / "few", folder / "many")
        progress("one process and two ...")
        found["processes"] = measure_processes(arguments, folder)
        progress("image size and batch ...")
        found["passes"] = measure_passes(arguments)
        progress(f"{arguments.images} images and {MORE} times as many ...")
        found["sets"] = [
            measure_set(folder, arguments.images * times, few) for times, few in ((1, "few"), (MORE, "many"))
        ]
        progress(f"{arguments.tiled}x{arguments.tiled} in tiles ...")
        started = time.monotonic()
        peak = peak_of([sys.executable, __file__, arguments.preset, str(arguments.tiled)])
        found["tiled_decoding"] = {"megabytes": peak, "seconds": time.monotonic() - started}
    return found


def repeat(few: Path, many: Path) -> None:
    """`MORE` times the files of a folder."""
    many.mkdir()
    for path in few.iterdir():
        for number in range(MORE):
            shutil.copy(path, many / f"{number}-{path.name}")


def peak_of(command: Sequence[str]) -> float:
    """Megabytes that a program used at most, looked up while it runs. Raises: UserError when it fails.

    What the system says at its end (`ru_maxrss`) begins with the memory of this process, from which it was forked.
    """
    environment, peak = {**os.environ, "OMP_NUM_THREADS": "1"}, 0.0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            words = status.read_text().split("VmHWM:")
            peak = float(words[1].split()[0]) / 1024 if len(words) == 2 else peak  # it has none once it has ended
            time.sleep(POLL_SECONDS)
        if process.returncode:
            said.seek(0)
            last = (said.read().decode(errors="replace").strip().splitlines() or ["killed, probably for memory"])[-1]
            raise UserError(f"{' '.join(command[-3:])}: failed with {process.returncode} ({last})")
    return peak


def launched(script: str, processes: int, settings: Sequence[str]) -> list[str]:
    """The command that runs a script of this package in this number of processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *launcher, str(SCRIPTS / script), *settings]


def encoding(folder: Path, images: str, size: int, output: Path) -> list[str]:
    return [
        f"autoencoder={folder / 'autoencoder'}", f"output={output}", "data.source=folder",
        f"data.path={folder / images}", f"resolution={size}", "shard_size=32", "workers=0", "threads=1", "device=cpu",
    ]  # fmt: skip


def training(arguments: argparse.Namespace, folder: Path, output: Path) -> list[str]:
    phase = f"{{steps: {arguments.steps}, crop: 64, batch: {TRAINED_BATCH}}}"
    every = max(1, arguments.steps // LOG_LINES)
    never = [f"training.{name}_every={arguments.steps + 1}" for name in ("validate", "preview", "save")]
    return [
        f"output={output}", "data.source=folder", f"data.path={folder / 'images'}", "data.cache_megabytes=500",
        f"autoencoder.preset={arguments.preset}", f"phases=[{phase}]", "training.workers=0", "training.device=cpu",
        "training.tracker=none", f"training.log_every={every}", *never,
    ]  # fmt: skip


def measure_processes(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Images per second of one and of two processes, in turn."""
    rates: dict[str, dict[str, list[float]]] = {job: {"1": [], "2": []} for job in ("encoding", "training")}
    for number in range(arguments.rounds):
        for processes in ((1, 2), (2, 1))[number % 2]:
            for job, found in rates.items():
                output = folder / "output"
                shutil.rmtree(output, ignore_errors=True)
                if job == "encoding":
                    words = encoding(folder, "images", arguments.size, output)
                    peak_of(launched("encode_dataset.py", processes, words))
                    rate = json.loads((output / "run.json").read_text())["images_per_second"]
                else:
                    peak_of(launched("train_vae.py", processes, training(arguments, folder, output)))
                    rate = rate_of(output / "metrics.jsonl")
                found[str(processes)].append(rate)
    return rates


def rate_of(metrics: Path) -> float:
    """Images per second of a training, its first log line aside."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    rates = [line["time/images_per_second"] for line in lines if "time/images_per_second" in line]
    return median(rates[1:])


def measure_passes(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of encoding and decoding in one thread: of an image of each size, of each batch of small images."""
    import torch

    from benchmarks.rounds import alternating
    from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder

    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(preset=arguments.preset)).eval()

    def both(count: int, side: int) -> Callable[[], object]:
        images = torch.rand(count, 3, side, side) * 2 - 1
        return lambda: model.reconstruct(images)

    actions = {f"size {side}": both(1, side) for side in arguments.sizes}
    actions |= {f"batch {count}": both(count, SMALL_SIDE) for count in arguments.batches}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = alternating(actions, arguments.rounds, seconds=0.1)
    finally:
        torch.set_num_threads(threads)
    return {
        "size": {str(side): median(seconds[f"size {side}"]) for side in arguments.sizes},
        "batch": {str(count): median(seconds[f"batch {count}"]) for count in arguments.batches},
    }


def measure_set(folder: Path, count: int, images: str) -> dict[str, float]:
    """Encoding a set of small images: seconds without the start, peak megabytes."""
    output = folder / "set"
    shutil.rmtree(output, ignore_errors=True)
    words = encoding(folder, images, SMALL_SIDE, output)
    peak = peak_of([sys.executable, str(SCRIPTS / "encode_dataset.py"), *words])
    rate = json.loads((output / "run.json").read_text())["images_per_second"]
    return {"images": count, "seconds": count / rate, "megabytes": peak}


def decode_tiled(preset: str, side: int) -> None:
    """Decode one image in tiles, in this process."""
    import torch

    from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
    from ldm_vae.diffusion.editing import TILE, decode_in_tiles

    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(preset=preset)).eval()
    latents = torch.randn(1, LATENT_CHANNELS, side // DOWNSAMPLING, side // DOWNSAMPLING)
    decode_in_tiles(
        lambda tile: model.decode_images(tile), latents, DOWNSAMPLING, model.decoder_context, TILE
    )  # fmt: skip


def exponent(seconds: dict[str, float], power: int = 1) -> float:
    """Slope of the best line through log seconds over log (number ** power)."""
    import numpy as np

    numbers = power * np.log([float(number) for number in seconds])
    return float(np.polyfit(numbers, np.log(list(seconds.values())), 1)[0])


def text(found: dict[str, Any]) -> str:
    """`results.md`."""
    from benchmarks.rounds import bar, bars_table, ratio

    lines = ["# Scaling", "", "| job | images/s, 1 process | 2 processes | ratio |", "|---|---|---|---|"]
    bars = []
    for (job, rates), least in zip(found["processes"].items(), (1.8, 1.6), strict=True):
        gain = ratio(rates["2"], rates["1"])
        lines.append(f"| {job} | {median(rates['1']):.2f} | {median(rates['2']):.2f} | {gain} |")
        bars.append(bar(f"2 processes over 1, {job}", gain.median, least))
    passes, (few, many) = found["passes"], found["sets"]
    of_sets = {str(one["images"]): one["seconds"] for one in (few, many)}
    fits = {
        "pixels of an image": (passes["size"], exponent(passes["size"], 2)),
        "images of a batch": (passes["batch"], exponent(passes["batch"])),
        "images of a set": (of_sets, exponent(of_sets)),
    }
    lines += ["", "| cost over | seconds | exponent |", "|---|---|---|"]
    for name, (seconds, fitted) in fits.items():
        listed = ", ".join(f"{number}: {value:.3g}" for number, value in seconds.items())
        lines.append(f"| {name} | {listed} | {fitted:.2f} |")
        bars.append(bar(f"1 over the exponent of cost over {name}", 1 / fitted, 0.9))
    tiled = found["tiled_decoding"]
    bars.append(
        bar(f"memory of a set over that of one {MORE} times as large", few["megabytes"] / many["megabytes"], 0.9)
    )
    bars.append(
        bar(f"{TILED_MEGABYTES} MB over the memory of decoding in tiles", TILED_MEGABYTES / tiled["megabytes"], 1)
    )
    note = (
        f"Wavelet {found['preset']}, random weights. Processes: encoding {found['shared_images']} JPEG files of "
        f"{found['size']}x{found['size']}, training {found['steps']} steps of {TRAINED_BATCH} crops of 64x64 in all, "
        f"medians of {found['rounds']} rounds in turn. Cost over pixels and batch: encoding and decoding, one thread; "
        f"sizes are sides, batches are of {SMALL_SIDE}x{SMALL_SIDE}. Sets: peak memory {few['megabytes']:.0f} MB for "
        f"{few['images']} images and {many['megabytes']:.0f} MB for {many['images']}. An image of "
        f"{found['tiled']}x{found['tiled']} decoded in tiles: {tiled['megabytes']:.0f} MB, {tiled['seconds']:.0f} s, "
        "the start of Python included."
    )
    return "\n".join([*lines, "", *bars_table(bars), "", note, ""])


if __name__ == "__main__":  # the fresh process that decodes
    decode_tiled(sys.argv[1], int(sys.argv[2]))
