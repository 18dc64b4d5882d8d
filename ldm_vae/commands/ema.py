"""Choose the length of the U-Net's moving average after training, from the snapshots of a finished run.

The length is the width of the average as a share of the run: 0.05 forgets quickly, 0.15 smooths much. Several lengths
are compared by their held-out flow loss; one length and --out write the pipeline with it. An early --step gives the
weaker U-Net that autoguidance needs.

  ldm-vae ema runs/diffusion --length 0.03 0.05 0.07 0.1 0.15
  ldm-vae ema runs/diffusion --length 0.07 --out runs/diffusion-0.07
"""

from __future__ import annotations

import argparse

SUMMARY = "choose the length of the U-Net's average after training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a finished run of `ldm-vae train-diffusion`")
    parser.add_argument("--length", type=float, nargs="+", required=True, metavar="L", help="0.01 to 0.28, one or more")
    parser.add_argument("--step", type=int, metavar="N", help="the average after this step (default: the last one)")
    parser.add_argument("--out", metavar="DIR", help="write the pipeline with this average; one length only")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.errors import UserError

    if args.out and len(args.length) > 1:
        raise UserError(f"--out: {len(args.length)} lengths were given; give the one whose pipeline shall be written")

    import torch

    from ldm_vae.diffusion.averages import HeldOut, finished_pipeline, write_pipeline
    from ldm_vae.diffusion.snapshots import put_into, synthesise

    pipeline = finished_pipeline(args.run)
    if args.out:
        average = synthesise(args.run, args.length[0], args.step)
        write_pipeline(pipeline, average, args.out)
        print(f"{args.out}: the pipeline, length {average.length} after step {average.step}{missing(average.left)}")
        return 0
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    held_out = HeldOut(args.run, pipeline, torch.device(name))
    print(f"the run's own average (training.ema_decay): held-out flow loss {held_out.loss(pipeline.unet):.4f}")
    for length in args.length:
        average = synthesise(args.run, length, args.step)
        put_into(pipeline.unet, average)
        loss = held_out.loss(pipeline.unet)
        print(f"length {length:g} after step {average.step}: held-out flow loss {loss:.4f}{missing(average.left)}")
    return 0


def missing(left: float) -> str:
    """A word of warning where the snapshots do not make up the wanted average."""
    return f"; {left:.0%} of its profile cannot be made from these snapshots" if left > 0.05 else ""
