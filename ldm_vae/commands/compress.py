"""Compress pictures into small files with an autoencoder.

Takes files and folders, any size. Writes NAME.ldmz beside each picture, or into --output. `decompress` needs the same
autoencoder, and the same --entropy file where one is given here.

  ldm-vae compress holiday.jpg portraits/ --autoencoder runs/mine --output small
  ldm-vae compress holiday.jpg --autoencoder runs/mine --entropy runs/codec.safetensors --target-bpp 0.3
"""

from __future__ import annotations

import argparse

SUMMARY = "compress pictures into small files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files and folders")
    parser.add_argument("--autoencoder", required=True, metavar="DIR", help="a run of `ldm-vae train-vae`, or its like")
    parser.add_argument("--entropy", metavar="FILE", help="a model of `ldm-vae codec-fit` (default: none is needed)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quality", type=float, metavar="N", help="1 to 100; 12 more halve the step (default 50)")
    size.add_argument("--target-bpp", type=float, metavar="BITS", help="the best file of at most BITS per pixel")
    parser.add_argument(
        "--progressive", metavar="N,N,...", help="numbers of first channels that `decompress --channels` can show alone"
    )
    parser.add_argument("--output", "--out", metavar="FOLDER", help="for the files (default: beside each picture)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.codec.compression import CompressConfig, compress

    words = [word.strip() for word in args.progressive.split(",")] if args.progressive else []
    settings = {key: value for key, value in vars(args).items() if key in CompressConfig.__dataclass_fields__}
    settings["progressive"] = [int(word) if word.isdecimal() else 0 for word in words]
    compress(CompressConfig(**settings), overwrite=args.overwrite)
    return 0
