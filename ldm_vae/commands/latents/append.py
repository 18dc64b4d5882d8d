"""Add the images that a finished set does not hold yet: its source has grown, or there is another one.

The settings are those of `ldm-vae encode`, with the autoencoder and everything else as they were; an image is new when
its id (path below the folder, row of the dataset) is not in the set. The new latents get shards of their own; those
that are there stay as they are, and the set is the old one until the new one is complete. The same command continues
an interrupted job, and says so when nothing is new. Rows are known by their numbers: new files of a dataset that do not
sort behind the old ones have to be appended alone, with id_prefix. Examples:

  ldm-vae latents append autoencoder=runs/mine output=latents/mine data.source=folder data.path=~/images
  ldm-vae latents append ... data.path=~/more-images id_prefix=more/
  torchrun --nproc_per_node 4 -m ldm_vae.cli latents append autoencoder=runs/mine output=latents/mine ...
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "encode the images that a set does not hold yet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ldm_vae.latents.append import AppendConfig, append_images

    config = config_arguments.load(args, AppendConfig)
    if config is not None:
        append_images(config)
    return 0
