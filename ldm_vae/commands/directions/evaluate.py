"""Measure what directions change: the target against the drift of everything else, on images that the fit never saw.

Writes results.json, results.md, index.html and run.json. Classes, tables and scenes are read off the edited pictures
by a small network that is trained first; what it cannot read is said to be so.

  ldm-vae directions evaluate directions=runs/directions autoencoder=runs/mine data.source=folder \\
      data.path=~/images output=runs/judged
  ldm-vae directions evaluate directions=runs/directions autoencoder=runs/vae 'attributes_from=[scene]' output=judged
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "measure what they change, and what else"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a result of other settings")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.directions.evaluation import EvaluateDirectionsConfig, evaluate_directions

    config = config_arguments.load(args, EvaluateDirectionsConfig)
    if config is not None:
        evaluate_directions(config, overwrite=args.overwrite)
    return 0
