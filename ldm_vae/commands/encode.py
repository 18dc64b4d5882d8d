"""Encode a dataset into latent shards, once, on one or many processes.

The same command continues an interrupted job, making only what is missing; a finished set is left as it is. Examples:

  ldm-vae encode autoencoder=runs/mine output=latents/mine data.source=folder data.path=~/images
  torchrun --nproc_per_node 4 scripts/encode_dataset.py autoencoder=runs/mine output=latents/mine resolution=256 ...
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "encode images into latent shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(
        parser, dry_run="open everything, time a few batches of noise, print sizes; write nothing"
    )


def run(args: argparse.Namespace) -> int:
    from ldm_vae.latents.encode import EncodeConfig, encode_dataset

    config = config_arguments.load(args, EncodeConfig)
    if config is not None:
        encode_dataset(config, dry_run=args.dry_run)
    return 0
