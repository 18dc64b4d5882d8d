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
    from ldm_vae.applications.codec.compression import DecompressConfig, decompress

    settings = {key: value for key, value in vars(args).items() if key in DecompressConfig.__dataclass_fields__}
    decompress(DecompressConfig(**settings), overwrite=args.overwrite)
    return 0
