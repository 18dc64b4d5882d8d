"""Write the synthetic set as PNG files: ten kinds of toy objects, labelled, with every attribute known.

OUT gets one folder for each label and attributes.jsonl. With --defects, OUT-masks gets a black-and-white mask
for each image that has one. The same seed gives the same scenes at every resolution.

  ldm-vae synth toys --count 1000 --resolution 256
  ldm-vae synth parts --count 400 --defects 0.5
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

SUMMARY = "write the synthetic set as labelled image files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cores = min(8, os.cpu_count() or 1)
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="images (default 2000)")
    parser.add_argument("--resolution", type=int, default=512, metavar="R", help="side in pixels (default 512)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="decides the scenes (default 0)")
    parser.add_argument("--defects", type=float, default=0.0, metavar="F", help="fraction, 0 to 1 (default 0)")
    parser.add_argument("--workers", type=int, default=cores, metavar="W", help=f"processes (default {cores})")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.data.synthetic.source import SyntheticConfig, masks_folder, write_images
    from ldm_vae.errors import UserError
    from ldm_vae.utils.text import pluralize

    if args.workers < 1:
        raise UserError(f"--workers: {args.workers} processes; give 1 or more")
    try:
        config = SyntheticConfig(count=args.count, seed=args.seed, resolution=args.resolution, defects=args.defects)
    except ValueError as error:
        raise UserError(str(error).replace("synthetic.", "--")) from error
    out = Path(args.out)
    write_images(config, out, args.workers)
    masks = f", defect masks in {masks_folder(out)}" if config.defects > 0 else ""
    print(f"{out}: {pluralize(config.count, 'image')} and attributes.jsonl{masks}")
    print(f"train on them with: data.source=folder data.path={out}")
    return 0
