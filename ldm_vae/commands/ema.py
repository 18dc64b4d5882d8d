"""Choose the length of the U-Net's moving average after training, from the snapshots of a finished run.

The length is the width of the average as a share of the run: 0.05 forgets quickly, 0.15 smooths much. Several lengths
are compared by their held-out flow loss; one length and --out write the pipeline with it. An early --step gives the
weaker U-Net that autoguidance needs. With --kid they are compared by the KID of samples to the held-out images too.

  ldm-vae ema runs/diffusion --length 0.03 0.05 0.07 0.1 0.15
  ldm-vae ema runs/diffusion --length 0.05 0.1 --kid 1000 --images photos
  ldm-vae ema runs/diffusion --length 0.07 --out runs/diffusion-0.07
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

SUMMARY = "choose the length of the U-Net's average after training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a finished run of `ldm-vae train-diffusion`")
    parser.add_argument("--length", type=float, nargs="+", required=True, metavar="L", help="0.01 to 0.28, one or more")
    parser.add_argument("--step", type=int, metavar="N", help="the average after this step (default: the last one)")
    parser.add_argument(
        "--out", "--output", metavar="DIR", help="write the pipeline with this average; one length only"
    )
    parser.add_argument("--kid", type=int, default=0, metavar="N", help="compare by the KID of N samples as well")
    parser.add_argument(
        "--images", metavar="FOLDER", help="the encoded images, for --kid (default: kid.data of the run)"
    )
    parser.add_argument(
        "--inception-weights", metavar="FILE", help="for --kid (default: that of the run, or a download)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.errors import UserError

    if args.out and len(args.length) > 1:
        raise UserError(f"--out: {len(args.length)} lengths were given; give the one whose pipeline shall be written")
    if not args.kid and (args.images or args.inception_weights):
        raise UserError("--images, --inception-weights: have no effect without --kid; leave them out")

    import torch

    from ldm_vae.diffusion.posthoc_ema import copy_to, synthesize
    from ldm_vae.diffusion.training import HeldOutLoss, finished_pipeline, write_pipeline

    pipeline = finished_pipeline(args.run)
    if args.out:
        average = synthesize(args.run, args.length[0], args.step)
        write_pipeline(pipeline, average, args.out)
        print(f"{args.out}: the pipeline, length {average.length} after step {average.step}{missing(average.left)}")
        return 0
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    judge = kid_judge(args) if args.kid else None
    held_out = HeldOutLoss(args.run, pipeline, torch.device(name))

    def figures() -> str:
        words = f"held-out flow loss {held_out.loss(pipeline.unet):.4f}"
        if judge is not None:
            found = judge(pipeline.to(name)).items()
            words += "".join(f", {key.removeprefix('samples/')} {value:.5f}" for key, value in found)
        return words

    print(f"the run's own average (training.ema_decay): {figures()}")
    for length in args.length:
        average = synthesize(args.run, length, args.step)
        copy_to(pipeline.unet, average)
        print(f"length {length:g} after step {average.step}: {figures()}{missing(average.left)}")
    return 0


def kid_judge(args: argparse.Namespace) -> Callable[[Any], dict[str, float]]:
    """What compares samples with the images that the run held out."""
    from dataclasses import replace
    from pathlib import Path

    from ldm_vae import config as configuration
    from ldm_vae.data.sources import DataConfig
    from ldm_vae.diffusion.fid import make_sample_kid
    from ldm_vae.diffusion.training import TrainDiffusionConfig

    config = configuration.load(TrainDiffusionConfig, Path(args.run) / "config.yaml")
    data = DataConfig(source="folder", path=args.images) if args.images else config.kid.data
    weights = args.inception_weights or config.kid.inception_weights
    kid = replace(config.kid, samples=args.kid, data=data, inception_weights=weights)
    return make_sample_kid(kid, config.held_out)


def missing(left: float) -> str:
    """A word of warning where the snapshots do not make up the wanted average."""
    return f"; {left:.0%} of its profile cannot be made from these snapshots" if left > 0.05 else ""
