"""Measure how well an autoencoder reconstructs images that training never saw, beside a linear baseline.

Baselines on the same pixels: a linear transform with as many numbers, bicubic scaling, JPEG and WebP at equal bytes.
Writes results.json, results.md, grid.png and examples/ into the output folder. A finished result is not redone, and
the result is the same for any number of processes.

  ldm-vae evaluate autoencoder=runs/mine data.source=folder data.path=~/images output=runs/mine/evaluation
  torchrun --nproc_per_node 4 scripts/evaluate.py autoencoder=runs/mine output=runs/mine/evaluation ...
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "measure reconstructions: PSNR, SSIM, LPIPS, rate; baselines, KID and FID"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a result of other settings")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.evaluation.reconstruction import EvaluateConfig, evaluate

    config = config_arguments.load(args, EvaluateConfig)
    if config is not None:
        evaluate(config, overwrite=args.overwrite)
    return 0
