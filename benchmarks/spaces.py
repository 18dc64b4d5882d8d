"""The claim of latent diffusion, measured: one U-Net family on latents and on pixels, at several image sizes.

    python -m benchmarks spaces OUTPUT

Three spaces. `latents`: c x h/8 x w/8. `pixels`: 3 x h x w through the same U-Net with the same patch, so with 64 times
as many tokens. `pixels, coarse`: patches 8 times as large, so as many tokens as `latents` has, of 48 times as many
values. For each space and size a fresh process builds the network with random weights and takes training steps
(forward, backward, AdamW, one image) and sampling steps, in float32 on the CPU: medians of as many as fit into a few
seconds after one that is not counted. Memory is the peak over that of the imported packages, GMAC the multiplications
of one forward pass, in thousand millions. What the latents cost on top, encoding and decoding, is measured as well.
Nothing is extrapolated. Draws spaces.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_vae.errors import UserError
from ldm_vae.runtime import gigamacs

SUMMARY = "what the same U-Net costs on latents and on pixels"
SIZES = (128, 256, 512)
"""Sides of the images in pixels."""
SECONDS = 3.0
"""Repetitions of a measurement end after so long, or after `REPETITIONS`; the first is always complete."""
REPETITIONS = 9
STEPS = 30
"""Sampling steps an image, as `ldm-vae generate` takes."""
LATENT_CHANNELS, DOWNSAMPLING = 4, 8


@dataclass(frozen=True)
class Space:
    """Where the U-Net works: `channels` for `divisor` x `divisor` pixels; patches `coarser` times the preset's."""

    channels: int
    divisor: int
    coarser: int


SPACES = {
    "latents": Space(LATENT_CHANNELS, DOWNSAMPLING, 1),
    "pixels": Space(3, 1, 1),
    "pixels, coarse": Space(3, 1, DOWNSAMPLING),
}
QUANTITIES = {
    "gigamacs": "GMAC of a forward pass",
    "training_seconds": "training step, s",
    "sampling_seconds": "sampling step, s",
    "training_megabytes": "peak memory of training, MB",
}


def median_seconds(function: Callable[[], object]) -> float:
    """After one call that is not counted."""
    function()
    times: list[float] = []
    while not times or (sum(times) < SECONDS and len(times) < REPETITIONS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_megabytes() -> float:
    """Peak memory of this process since the last `forget_peak`."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_space(name: str, size: int, preset: str) -> dict[str, Any]:
    """One space at one size, in this process; the memory counts only in a fresh one, where none is used again."""
    import torch

    from ldm_vae.diffusion import flow
    from ldm_vae.diffusion.unet import PRESETS, UNetConfig, build_unet

    space, side = SPACES[name], size // SPACES[name].divisor
    torch.manual_seed(0)
    forget_peak()
    before = peak_megabytes()
    patch = PRESETS[preset]["patch"] * space.coarser
    unet = build_unet(UNetConfig(preset, prediction="velocity", patch=patch), space.channels).eval()  # type: ignore[arg-type]
    clean, noise = torch.randn(2, 1, space.channels, side, side)
    times = torch.tensor([0.5])

    @torch.no_grad()
    def sample() -> None:
        unet(noise, times)

    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "tokens": (side // patch) ** 2,
        "gigamacs": gigamacs(sample),
        "sampling_seconds": median_seconds(sample),
        "sampling_megabytes": peak_megabytes() - before,
    }
    optimizer = torch.optim.AdamW(unet.train().parameters())

    def train() -> None:
        velocity = unet(flow.interpolate(clean, noise, times), times)
        flow.velocity_loss(velocity, flow.velocity_target(clean, noise)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    found["training_seconds"] = median_seconds(train)
    return found | {"training_megabytes": peak_megabytes() - before, "threads": torch.get_num_threads()}


def measure_autoencoder(size: int, preset: str) -> dict[str, Any]:
    """Encoding and decoding one image, in this process."""
    import torch

    from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder

    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(preset=preset, latent_channels=LATENT_CHANNELS)).eval()
    images = torch.rand(1, 3, size, size) * 2 - 1
    latents = torch.randn(1, LATENT_CHANNELS, size // DOWNSAMPLING, size // DOWNSAMPLING)
    work = {
        "encoding": lambda: model.encode_moments(images),
        "decoding": lambda: model.decode_images(latents),
    }
    return {f"{name}_gigamacs": gigamacs(function) for name, function in work.items()} | {
        f"{name}_seconds": median_seconds(function) for name, function in work.items()
    }


def in_fresh_process(what: str, size: int, preset: str) -> dict[str, Any]:
    command = [sys.executable, __file__, what, str(size), preset]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        words = (result.stderr.strip().splitlines() or ["killed, probably for memory"])[-1]
        raise UserError(f"{what} at {size}: failed with {result.returncode} ({words}); give smaller --sizes")
    return json.loads(result.stdout)


def measure(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Everything, one fresh process after the other. Raises: UserError."""
    sizes, preset, autoencoder = sorted(arguments.sizes), arguments.preset, arguments.autoencoder
    if any(size < 64 or size % 64 for size in sizes):
        raise UserError(f"--sizes: {sizes} are not all multiples of 64, which every space can divide")
    spaces: list[dict[str, Any]] = []
    coders: list[dict[str, Any]] = []
    for size in sizes:
        for name in SPACES:
            progress(f"{name}, {size}x{size} ...")
            spaces.append({"space": name, "size": size} | in_fresh_process(name, size, preset))
        coders.append({"size": size} | in_fresh_process("autoencoder", size, autoencoder))
    return {"preset": preset, "autoencoder": autoencoder, "spaces": spaces, "autoencoders": coders}


def image_seconds(row: dict[str, Any], found: dict[str, Any]) -> float:
    """Time of `STEPS` sampling steps, and of decoding if there are latents to decode."""
    decoding = {coder["size"]: coder["decoding_seconds"] for coder in found["autoencoders"]}
    return STEPS * row["sampling_seconds"] + (decoding[row["size"]] if row["space"] == "latents" else 0.0)


def text(found: dict[str, Any]) -> str:
    """`results.md`."""
    from ldm_vae.utils.text import markdown_table

    headings = ["images", "space", "tokens", "GMAC", "training step", "sampling step", "memory, training",
                "memory, sampling", f"an image in {STEPS} steps"]  # fmt: skip
    latents = {row["size"]: row for row in found["spaces"] if row["space"] == "latents"}
    rows = []
    for row in found["spaces"]:
        base = latents[row["size"]]

        def times(key: str, text: str, row: dict = row, base: dict = base) -> str:
            return text if row is base else f"{text} ({row[key] / base[key]:.1f}x)"

        rows.append(
            [
                f"{row['size']}x{row['size']}", row["space"], f"{row['tokens']:,}",
                times("gigamacs", f"{row['gigamacs']:.2f}"),
                times("training_seconds", f"{row['training_seconds']:.3f} s"),
                times("sampling_seconds", f"{row['sampling_seconds']:.3f} s"),
                times("training_megabytes", f"{row['training_megabytes']:,.0f} MB"),
                f"{row['sampling_megabytes']:,.0f} MB", f"{image_seconds(row, found):.1f} s",
            ]
        )  # fmt: skip
    coders = [
        f"{coder['size']}x{coder['size']}: encoding {coder['encoding_gigamacs']:.2f} GMAC and "
        f"{coder['encoding_seconds']:.3f} s, decoding {coder['decoding_gigamacs']:.2f} GMAC and "
        f"{coder['decoding_seconds']:.3f} s"
        for coder in found["autoencoders"]
    ]
    threads = found["spaces"][0]["threads"]
    note = (
        f"U-Net preset {found['preset']}, unconditional, prediction velocity, random weights, float32 on {threads} CPU "
        "thread(s), one image a step; in brackets the multiple of `latents`. `pixels, coarse` has patches 8 times as "
        "large, so as many tokens as `latents`, and has to draw the pixels of each token itself. The image in the last "
        "column includes decoding. These are costs; how good the images become is not measured here."
    )
    extra = f"Encoding, once for each image of the set, and decoding (preset {found['autoencoder']}): "
    lines = ["# Latents or pixels", "", *markdown_table(headings, rows), "", note, "", extra + "; ".join(coders) + "."]
    return "\n".join([*lines, ""])


def draw(found: dict[str, Any], output: Path) -> None:
    """Cost over image size, a panel for each quantity and a line for each space."""
    from matplotlib.ticker import LogLocator, NullLocator

    from ldm_vae.evaluation.plots import legend, new_figure, save_svg

    figure, panels = new_figure(width=3.1, height=2.9, columns=len(QUANTITIES))
    for axes, (key, title) in zip(panels, QUANTITIES.items()):
        for name in SPACES:
            rows = [row for row in found["spaces"] if row["space"] == name]
            dashes = "--" if name == "pixels, coarse" else "-"
            axes.plot([row["size"] for row in rows], [row[key] for row in rows], dashes, marker="o", label=name)
        sizes = sorted({row["size"] for row in found["spaces"]})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("side of the image, pixels")
        axes.set_title(title)
    panels[0].margins(y=0.4)  # room for the legend
    legend(panels[0])
    output.mkdir(parents=True, exist_ok=True)
    save_svg(
        figure, output / "spaces.svg", "Cost of the same U-Net on latents and on pixels over the size of the image"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), metavar="PIXELS", help="sides of images")
    parser.add_argument("--preset", default="small", choices=("tiny", "small", "base"), help="of the U-Net (small)")
    parser.add_argument("--autoencoder", default="nano", metavar="PRESET", help="of the autoencoder (nano)")


if __name__ == "__main__":  # the fresh process of `in_fresh_process`
    what, side, of_preset = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    one = measure_autoencoder(side, of_preset) if what == "autoencoder" else measure_space(what, side, of_preset)
    print(json.dumps(one))
