"""Where the time of a generated image goes, beside the same sampler on pixels.

    python -m benchmarks generate OUTPUT

The whole pipeline makes one image; its parts, a U-Net step and the decoding, take turns with it, and so does a step of
the same U-Net on the pixels of the same image (same patch, 64 times as many tokens), which the sampler would take as
many times. Random weights: they change no cost. How good images become is measured elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

SUMMARY = "the time of a generated image: U-Net, decoding, and the same sampler on pixels"

CHANNELS, DOWNSAMPLING = 4, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="side of the image (512)")
    parser.add_argument("--steps", type=int, default=30, help="of the sampler (30)")
    parser.add_argument("--preset", default="small", choices=("tiny", "small", "base"), help="of the U-Net (small)")
    parser.add_argument("--autoencoder", default="nano", metavar="PRESET", help="of the autoencoder (nano)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")


def measure(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Both precisions, one after the other."""
    import torch

    from ldm_vae.runtime import reuse_freed_memory

    reuse_freed_memory()
    found = []
    for precision in ("fp32", "bf16"):
        progress(f"{arguments.size}x{arguments.size}, {arguments.steps} steps, {precision} ...")
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        found.append({"precision": precision} | measure_precision(arguments, dtype))
    settings = {name: getattr(arguments, name) for name in ("size", "steps", "preset", "autoencoder", "rounds")}
    return settings | {"threads": torch.get_num_threads(), "device": arguments.device, "measured": found}


def measure_precision(arguments: argparse.Namespace, dtype: Any) -> dict[str, Any]:
    """Medians in seconds, and shares and ratios taken within a round."""
    import torch

    from benchmarks.rounds import alternating, ratio
    from ldm_vae.diffusion.unet import PRESETS, UNetConfig, build_unet

    device, side, steps = arguments.device, arguments.size // DOWNSAMPLING, arguments.steps
    torch.manual_seed(0)
    pipeline = random_pipeline(arguments.preset, arguments.autoencoder, side).to(device)
    for part in (pipeline.unet, pipeline.autoencoder):
        torch.nn.Module.to(part, dtype)
    patch = PRESETS[arguments.preset]["patch"]
    pixels = build_unet(UNetConfig(arguments.preset, prediction="velocity", patch=patch), 3).eval()  # type: ignore[arg-type]
    torch.nn.Module.to(pixels, device, dtype)
    noise = torch.randn(1, CHANNELS, side, side, device=device)
    image = torch.randn(1, 3, arguments.size, arguments.size, device=device)
    times = torch.full((1,), 0.5, device=device)

    @torch.no_grad()
    def step(unet: Any, noisy: Any) -> object:
        return unet(noisy, times)

    seconds = alternating(
        {
            "image": lambda: pipeline(num_inference_steps=steps, seed=0, output_type="pt"),
            "unet": lambda: step(pipeline.unet, noise),
            "decoding": lambda: pipeline.decode(noise),
            "pixels": lambda: step(pixels, image),
        },
        arguments.rounds,
        device=device,
    )
    sampling = [steps * one for one in seconds["unet"]]
    return {
        "image_seconds": median(seconds["image"]),
        "unet_step_seconds": median(seconds["unet"]),
        "decoding_seconds": median(seconds["decoding"]),
        "pixel_step_seconds": median(seconds["pixels"]),
        "unet_share": ratio(sampling, seconds["image"]).median,
        "decoding_share": ratio(seconds["decoding"], seconds["image"]).median,
        "pixels_over_latents": str(ratio([steps * one for one in seconds["pixels"]], seconds["image"])),
        "pixels_over_latents_median": ratio([steps * one for one in seconds["pixels"]], seconds["image"]).median,
    }


def random_pipeline(preset: str, autoencoder: str, side: int) -> Any:
    """A pipeline without classes, its weights random."""
    from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
    from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
    from ldm_vae.diffusion.samplers import flow_scheduler
    from ldm_vae.diffusion.unet import UNetConfig, build_unet
    from ldm_vae.latents.normalizer import LatentNormalizer

    pipeline = LatentDiffusionPipeline(
        build_autoencoder(AutoencoderConfig(preset=autoencoder, latent_channels=CHANNELS)).eval(),
        build_unet(UNetConfig(preset, prediction="velocity"), CHANNELS).eval(),  # type: ignore[arg-type]
        flow_scheduler(shift=1.0),
        normalizer=LatentNormalizer([0.0] * CHANNELS, [1.0] * CHANNELS).to_dict(),
        latent_size=(side, side),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text(found: dict[str, Any]) -> str:
    """`results.md`."""
    from benchmarks.rounds import bar, bars_table

    lines = [
        "# Generation", "",
        "| precision | an image | U-Net step | all steps | decoding | step on pixels | pixels over latents |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in found["measured"]:
        lines.append(
            f"| {one['precision']} | {one['image_seconds']:.2f} s | {one['unet_step_seconds']:.3f} s | "
            f"{one['unet_share']:.0%} of the time | {one['decoding_seconds']:.3f} s, {one['decoding_share']:.1%} | "
            f"{one['pixel_step_seconds']:.2f} s | {one['pixels_over_latents']} |"
        )
    size, steps = found["size"], found["steps"]
    bars = []
    for one in found["measured"]:
        name = one["precision"]
        bars.append(bar(f"time that is not decoding, {name}", 100 * (1 - one["decoding_share"]), 90, " %"))
        bars.append(bar(f"an image in latents over one in pixels, {name}", one["pixels_over_latents_median"], 20))
    note = (
        f"One image of {size}x{size} in {steps} steps without guidance, U-Net preset {found['preset']}, autoencoder "
        f"{found['autoencoder']}, random weights, {found['threads']} threads, on {found['device']}; medians of "
        f"{found['rounds']} rounds in which the image, its parts and the step on pixels take turns, ratios within a "
        f"round [quartiles]. In pixels one step was timed and counted {steps} times, so what surrounds the U-Net "
        "counts for the latents only. With guidance the U-Net runs twice a step in both spaces."
    )
    return "\n".join([*lines, "", *bars_table(bars), "", note, ""])
