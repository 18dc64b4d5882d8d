"""Measure this codec against JPEG, WebP and AVIF: bytes of whole files, PSNR, MS-SSIM, LPIPS, BD-rate, curves.

Writes results.json, results.md, index.html and the curves as SVG into the output folder. A finished result is not
redone. Give the entropy models that `codec-fit` made for this autoencoder to see what they gain.

  ldm-vae codec-bench autoencoder=runs/mine data.source=folder data.path=~/images output=runs/mine/codec
  ldm-vae codec-bench autoencoder=runs/mine "entropy=[runs/codec.safetensors]" output=runs/mine/codec ...
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "measure the codec against JPEG, WebP and AVIF"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a result of other settings")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.codec.bench import CodecBenchConfig, bench_codec

    config = config_arguments.load(args, CodecBenchConfig)
    if config is not None:
        bench_codec(config, overwrite=args.overwrite)
    return 0
