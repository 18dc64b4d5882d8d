"""Measure how well an autoencoder reconstructs images that training never saw, beside a linear baseline.

Writes results.json, results.md, grid.png and examples/ into the output folder. A finished result is not
redone.

  ldm-vae evaluate autoencoder=runs/mine data.source=folder data.path=~/images output=runs/mine/evaluation
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "measure reconstructions: PSNR, SSIM, LPIPS, rate, and a linear baseline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a result of other settings")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.evaluation.reconstruction import EvaluateConfig, evaluate, markdown

    config = config_arguments.load(args, EvaluateConfig)
    if config is None:
        return 0
    results = evaluate(config, overwrite=args.overwrite)
    print(f"{config.output}:\n\n{markdown(results)}", end="")
    return 0
