"""Score images: each with its percentile among the held-out normal images and a verdict; a page, the strangest first.

Writes scores.csv, scores.json and index.html with heat maps into the output folder. Needs the autoencoder (and, where
they were used, the pipeline and the perceptual weights) that the detector was fitted with. Example:

  ldm-vae anomaly score detector=runs/detector autoencoder=runs/mine data.source=folder data.path=~/new output=runs/new
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "score images: percentile, verdict, heat maps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a result of other settings")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.anomaly.scoring import ScoreImagesConfig, score_images

    config = config_arguments.load(args, ScoreImagesConfig)
    if config is not None:
        score_images(config, overwrite=args.overwrite)
    return 0
