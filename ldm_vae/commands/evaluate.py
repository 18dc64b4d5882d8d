"""Measure how well an autoencoder reconstructs images that training never saw, beside a linear baseline.

Writes results.json, results.md, grid.png and examples/ into the output folder. A finished result is not
redone.

  ldm-vae evaluate autoencoder=runs/mine data.source=folder data.path=~/images output=runs/mine/evaluation
"""

from __future__ import annotations

import argparse

SUMMARY = "measure reconstructions: PSNR, SSIM, LPIPS, rate, and a linear baseline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a YAML file; key=value settings alone do as well")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, over those of the file")
    parser.add_argument("--print-config", action="store_true", help="print the configuration and leave")
    parser.add_argument("--overwrite", action="store_true", help="replace a result of other settings")


def run(args: argparse.Namespace) -> int:
    from ldm_vae import config as configuration
    from ldm_vae.evaluation.reconstruction import EvaluateConfig, evaluate, markdown

    path, overrides = args.config, args.overrides
    if path is not None and "=" in path:
        path, overrides = None, [path, *overrides]
    if args.print_config:
        overrides = ["autoencoder=AUTOENCODER", "output=OUTPUT", *overrides]
        print(configuration.to_yaml(configuration.load(EvaluateConfig, path, overrides)), end="")
        return 0
    config = configuration.load(EvaluateConfig, path, overrides)
    results = evaluate(config, overwrite=args.overwrite)
    print(f"{config.output}:\n\n{markdown(results)}", end="")
    return 0
