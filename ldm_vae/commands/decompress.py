"""Decompress files of `ldm-vae compress` into PNG pictures.

Every file is checked first: one that is damaged, cut off or made with another autoencoder is refused, the others are
still decompressed, and the exit code is 2. --channels shows a preview from the first channels of a file that was
compressed with --progressive; only that part of it is read, so the rest may not have arrived yet.

  ldm-vae decompress small/*.ldmz --autoencoder runs/mine --output pictures
"""

from __future__ import annotations

import argparse

SUMMARY = "decompress files of compress into pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="files that `ldm-vae compress` wrote")
    parser.add_argument("--autoencoder", required=True, metavar="DIR", help="the autoencoder that compressed them")
    parser.add_argument("--entropy", metavar="FILE", help="the entropy model that compressed them, if there was one")
    parser.add_argument("--channels", type=int, metavar="N", help="a preview from so many first channels")
    parser.add_argument("--output", "--out", metavar="FOLDER", help="for the pictures (default: beside each file)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are there")


def run(args: argparse.Namespace) -> int:
    import sys
    from pathlib import Path

    from PIL import Image

    from ldm_vae.applications.codec import compression
    from ldm_vae.commands.compress import targets
    from ldm_vae.errors import EXIT_USER_ERROR, UserError
    from ldm_vae.files import write_png
    from ldm_vae.training.distributed import compute_device

    paths = [Path(text) for text in args.files]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; give files that `ldm-vae compress` wrote")
    goals = targets(args.output, [(path.stem, path) for path in paths], ".png", args.overwrite)
    codec = compression.open_codec(args.autoencoder, args.entropy, compute_device(args.device))
    refused = 0
    for path, goal in goals:
        try:
            image = Image.fromarray(compression.decompress_file(codec, path, args.channels))
        except UserError as error:
            print(f"ldm-vae decompress: {error}", file=sys.stderr)
            refused += 1
            continue
        write_png(goal, image)
        print(f"{goal}: {image.width} x {image.height}")
    return EXIT_USER_ERROR if refused else 0
