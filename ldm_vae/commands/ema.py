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
    from ldm_vae.diffusion.posthoc_ema import PosthocEmaConfig, posthoc_ema

    posthoc_ema(
        PosthocEmaConfig(
            model=args.run,
            lengths=tuple(args.length),
            output=args.out,
            step=args.step,
            kid=args.kid,
            images=args.images,
            inception_weights=args.inception_weights,
            device=args.device,
        )
    )
    return 0
