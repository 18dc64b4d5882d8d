"""See and touch the latent space in a browser: a local page, whose address is printed.

Shows a map of the latents that decodes the point under the mouse, two autoencoders side by side, every stage of the
network with its activations, sliders, and the training. Works offline; Ctrl-C ends it. --export writes the map of a
vector model as one file that can be mailed, instead.

  ldm-vae explore checkpoints/digits-vae-2d --compare checkpoints/digits-ae-2d
  ldm-vae explore checkpoints/digits-vae-2d --compare checkpoints/digits-ae-2d --export digits.html
  ldm-vae explore runs/mine --data ~/images --size 256 --directions runs/mine/directions
"""

from __future__ import annotations

import argparse

SUMMARY = "see and touch the latent space in a browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run of `train-vae`, a diffusers directory, or a hub id")
    parser.add_argument("--compare", metavar="OTHER", help="another autoencoder on the same images, side by side")
    parser.add_argument(
        "--data", metavar="DATA", help="a folder of images, a .parquet file, or `synthetic` (default: the model's own)"
    )
    parser.add_argument("--directions", metavar="DIR", help="what `ldm-vae directions fit` wrote, for its sliders")
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="images on the map (default 2000)")
    parser.add_argument(
        "--size", type=int, metavar="N", help="images are scaled and cropped to N x N (default: their own, or 128)"
    )
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of 127.0.0.1 (default 0: a free one)")
    parser.add_argument("--export", metavar="FILE.html", help="write one self-contained page and leave")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --export")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")


def run(args: argparse.Namespace) -> int:
    import os
    import sys

    from ldm_vae.training.watchdog import StopRequest

    with StopRequest(at_once=True):
        from ldm_vae.applications.explorer.explored import ExploreConfig
        from ldm_vae.applications.explorer.server import explore

        settings = {key: value for key, value in vars(args).items() if key in ExploreConfig.__dataclass_fields__}
        explore(ExploreConfig(autoencoder=args.model, **settings), overwrite=args.overwrite)
        if args.export is None:
            sys.stdout.flush()
            os._exit(0)  # nothing is left to do, and an interpreter that ends around a thread inside torch may abort
    return 0
