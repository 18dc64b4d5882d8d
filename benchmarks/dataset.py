"""From JPEG files to stored latents: `ldm-vae encode` with our small autoencoder, and the script that a user writes.

    python -m benchmarks dataset OUTPUT

The files are synthetic scenes with a grain, so that they are as large as photographs. That script opens one file after
the other with PIL, resizes and normalizes it by torchvision, encodes it with an autoencoder of Stable Diffusion's size
in float32 and saves one `.npy` an image. Weights are random: they change no cost. Nothing is said of what the latents
are worth.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

SUMMARY = "from JPEG files to latent shards, beside the script that a user writes"

GRAIN = 6.0
"""Standard deviation in gray levels."""
QUALITY = 90
HOUR = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="side of the images (512)")
    parser.add_argument("--images", type=int, default=256, help="of a run of ours (%(default)s)")
    parser.add_argument("--peer-images", type=int, default=2, help="of a turn of the script (%(default)s)")
    parser.add_argument("--preset", default="nano", help="of ours (nano)")
    parser.add_argument("--peer-preset", default="sd", help="of the AutoencoderKL (sd)")
    parser.add_argument("--workers", type=int, default=1, help="that decode (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")


def measure(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Runs of ours in both precisions and turns of the script, in turn."""
    import torch

    from benchmarks.rounds import rotated
    from ldm_vae.runtime import reuse_freed_memory

    reuse_freed_memory()  # as the command does; the script profits from it too
    names = ("size", "images", "peer_images", "preset", "peer_preset", "workers", "rounds")
    found: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    contestants = ("ours, bf16", "ours, fp32", "script, fp32")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    busy: dict[str, list[float]] = {name: [] for name in contestants[:2]}
    waited: dict[str, list[float]] = {name: [] for name in contestants[:2]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress(f"{arguments.images} images ...")
        found["bytes_per_image"] = write_images(folder / "images", arguments.images, arguments.size)
        ours, theirs = folder / "ours", folder / "theirs"
        write_autoencoder(ours, "wavelet", arguments.preset)
        write_autoencoder(theirs, "sd", arguments.peer_preset)
        script = Script(theirs, arguments.size)
        files = sorted((folder / "images").glob("*.jpg"))
        for number in range(arguments.rounds + 1):
            progress(f"round {number} of {arguments.rounds} ...")
            for contestant in rotated(contestants, number):
                if contestant == "script, fp32":
                    taken = script.run(files[: arguments.peer_images], folder / "arrays")
                else:
                    record = encode(ours, folder, contestant[-4:], arguments)
                    taken = 1 / record["images_per_second"]
                if not number:
                    continue
                seconds[contestant].append(taken)
                if contestant in busy:
                    busy[contestant].append(record["model_busy"])
                    waited[contestant].append(record["waited_for_images_seconds"])
    return found | {"threads": torch.get_num_threads(), "seconds": seconds, "busy": busy, "waited_seconds": waited}


def write_images(folder: Path, count: int, size: int) -> float:
    """Returns: bytes of a file, on average."""
    import numpy as np
    from PIL import Image

    from ldm_vae.data.synthetic.source import SyntheticConfig, SyntheticSource

    folder.mkdir()
    source = SyntheticSource(SyntheticConfig(count=count, resolution=size))
    rng = np.random.default_rng(0)
    sizes = []
    for number in range(count):
        picture = source.read(number)
        grain = rng.normal(0, GRAIN, picture.shape[:2])[..., None]
        path = folder / f"{number:06d}.jpg"
        Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    return sum(sizes) / count


def write_autoencoder(folder: Path, architecture: Any, preset: str) -> None:
    import torch

    from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder

    torch.manual_seed(0)
    build_autoencoder(AutoencoderConfig(architecture=architecture, preset=preset)).save_pretrained(folder)


def encode(autoencoder: Path, folder: Path, precision: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """`ldm-vae encode` in this process, its start not counted. Returns: its run record."""
    import shutil

    from ldm_vae.data.sources import DataConfig
    from ldm_vae.latents.encode import EncodeConfig, encode_dataset

    output = folder / "latents"
    shutil.rmtree(output, ignore_errors=True)
    config = EncodeConfig(
        autoencoder=str(autoencoder), output=str(output), resolution=str(arguments.size), precision=precision,
        data=DataConfig(source="folder", path=str(folder / "images")), workers=arguments.workers, device="cpu",
    )  # fmt: skip
    encode_dataset(config)
    record: dict[str, Any] = json.loads((output / "run.json").read_text())
    return record


class Script:
    """What a user writes: an image at a time, a file an image."""

    def __init__(self, autoencoder: Path, size: int) -> None:
        from ldm_vae import runtime

        runtime.repair_torchvision()
        from diffusers import AutoencoderKL
        from torchvision import transforms

        self.autoencoder: Any = AutoencoderKL.from_pretrained(autoencoder)
        steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
        self.transform: Any = transforms.Compose([*steps, transforms.Normalize([0.5], [0.5])])

    def run(self, files: Sequence[Path], output: Path) -> float:
        """Seconds an image."""
        import numpy as np
        import torch
        from PIL import Image

        output.mkdir(exist_ok=True)
        started = time.perf_counter()
        for path in files:
            with Image.open(path) as image:
                picture = self.transform(image.convert("RGB"))
            with torch.no_grad():
                posterior = self.autoencoder.encode(picture[None]).latent_dist
            np.save(output / f"{path.stem}.npy", posterior.parameters[0].numpy())
        return (time.perf_counter() - started) / len(files)


def text(found: dict[str, Any]) -> str:
    """`results.md`."""
    from benchmarks.rounds import bar, bars_table, ratio

    seconds, script = found["seconds"], found["seconds"]["script, fp32"]
    headings = "| contestant | images/s | images/s a core | hours a million images | model busy | script over this |"
    lines = ["# Encoding a dataset", "", headings, "|---|---|---|---|---|---|"]
    bars = []
    for name, values in seconds.items():
        rate, over = 1 / median(values), ratio(script, values)
        share = f"{median(found['busy'][name]):.1%}" if name in found["busy"] else "–"
        hours = 1e6 / rate / HOUR
        lines.append(f"| {name} | {rate:.3g} | {rate / found['threads']:.3g} | {hours:,.1f} | {share} | {over} |")
        if name in found["busy"]:
            bars.append(bar(f"time that the model is busy, {name}", 100 * median(found["busy"][name]), 90, " %"))
            bars.append(bar(f"the script's time over ours, {name}", over.median, 20))
    note = (
        f"JPEG files of {found['size']}x{found['size']} pixels, {found['bytes_per_image'] / 1000:.0f} kB each. Ours: "
        f"`ldm-vae encode` of {found['images']} of them to shards, wavelet {found['preset']}, {found['workers']} "
        f"decoding process(es) beside {found['threads']} computing threads, from the first batch asked for to the "
        "last shard written, the start of Python not counted. The script: an AutoencoderKL "
        f"(`{found['peer_preset']}`), image by image, {found['peer_images']} a turn. Medians of {found['rounds']} "
        "rounds in which they take turns, ratios within a round [quartiles]. Where the model is not busy, a computing "
        "thread waits for images; decoding competes with it for the same cores."
    )
    return "\n".join([*lines, "", *bars_table(bars), "", note, ""])
