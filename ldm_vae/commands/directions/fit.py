"""Find directions for attributes of images (difference of means, linear probe) and without attributes (PCA, SeFa).

Attributes come from the pixels, from labels, from a table or from the scenes of the synthetic set. Writes directions/,
results.md and run.json into the output folder.

  ldm-vae directions fit autoencoder=runs/mine data.source=folder data.path=~/images output=runs/directions
  ldm-vae directions fit autoencoder=runs/mine data.source=folder data.path=~/images \\
      'attributes_from=[pixels,labels,~/images/attributes.csv]' output=runs/directions
  ldm-vae directions fit autoencoder=runs/vae latents=runs/latents 'attributes_from=[labels]' output=runs/directions
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "find directions, with attributes and without"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace directions of another fit")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.directions.fitting import FitDirectionsConfig, fit_directions

    config = config_arguments.load(args, FitDirectionsConfig)
    if config is not None:
        fit_directions(config, overwrite=args.overwrite)
    return 0
