"""Train an autoencoder: L1 + perceptual + KL at a rate that you choose, on one or many processes.

The same command resumes an interrupted run. Examples:

  ldm-vae train-vae configs/vae_f8c4_nano.yaml output=runs/mine data.source=folder data.path=~/images
  torchrun --nproc_per_node 4 scripts/train_vae.py configs/vae_f8c4_base.yaml output=runs/base
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "train an autoencoder on images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(
        parser,
        example="configs/vae_f8c4_nano.yaml",
        dry_run="build everything, do one step on random data, print parameters, GMACs, shapes and memory",
    )


def run(args: argparse.Namespace) -> int:
    from ldm_vae.autoencoder.train_config import TrainVaeConfig

    config = config_arguments.load(args, TrainVaeConfig)
    if config is None:
        return 0

    from ldm_vae.autoencoder.training import train_vae

    result = train_vae(config, dry_run=args.dry_run)
    return result if isinstance(result, int) else 0
