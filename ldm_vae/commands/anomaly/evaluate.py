"""Measure which scores find known anomalies, which fail, and why.

Normal images are those with a label in `normal`; of the synthetic set those without a defect. With masks, heat maps are
judged as well. `baseline=DIR` puts another autoencoder, fitted to the same images, beside it. Writes results.json,
results.md, index.html and grid.png. Examples:

  ldm-vae anomaly evaluate detector=runs/detector autoencoder=runs/mine data.source=folder data.path=parts/test \\
    normal=[good] masks=parts/masks output=runs/anomaly
  ldm-vae anomaly evaluate detector=runs/detector autoencoder=runs/mine baseline=runs/plain data.synthetic.seed=2 \\
    data.synthetic.count=400 data.synthetic.defects=0.5 output=runs/anomaly
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "measure on known anomalies which scores work"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a result of other settings")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.anomaly.evaluation import EvaluateDetectorConfig, evaluate_detector

    config = config_arguments.load(args, EvaluateDetectorConfig)
    if config is not None:
        evaluate_detector(config, overwrite=args.overwrite)
    return 0
