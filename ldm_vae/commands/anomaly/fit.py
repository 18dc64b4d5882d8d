"""Fit a detector to normal images: statistics of their latents, and a threshold for every score.

Takes any autoencoder. The images are split by their ids as in training: the held-out part sets the thresholds, for a
false-positive rate that it can support (n images none below 1 / (n + 1)). OUTPUT becomes a small folder that works with
this autoencoder only. Examples:

  ldm-vae anomaly fit autoencoder=runs/mine data.source=folder data.path=parts/good output=runs/detector
  ldm-vae anomaly fit autoencoder=runs/mine pipeline=runs/diffusion resolution=512 regret_steps=5 \\
    data.synthetic.seed=1 data.synthetic.count=400 data.held_out=0.5 output=runs/detector
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "learn from normal images, and set the thresholds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a detector of other settings")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.anomaly.detector import FitDetectorConfig, fit_detector

    config = config_arguments.load(args, FitDetectorConfig)
    if config is not None:
        fit_detector(config, overwrite=args.overwrite)
    return 0
