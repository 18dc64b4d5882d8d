"""Mend a set of latent shards: encode again what is damaged or missing, derive again what follows from the rest.

The words are those of the `ldm-vae encode` command that made the set (for shards that were appended, those of that
`ldm-vae latents append`). Verifies first; a set that is whole is left as it is. Settings, autoencoder and images are
compared with the plan before anything is changed, and only damaged files are replaced. Exit code 0: whole now; 1:
something is left; 2: the settings do not fit, and nothing was changed. Examples:

  ldm-vae latents repair autoencoder=runs/mine output=latents/mine data.source=folder data.path=~/images
  ldm-vae latents repair ... --remove-foreign
  torchrun --nproc_per_node 4 -m ldm_vae.cli latents repair autoencoder=runs/mine output=latents/mine ...
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "make damaged and missing shards again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser)
    parser.add_argument("--remove-foreign", action="store_true", help="delete shards and plans of other sets")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ldm_vae.latents.repair import RepairConfig, repair_latents

    config = config_arguments.load(args, RepairConfig)
    return 0 if config is None else repair_latents(replace(config, remove_foreign=args.remove_foreign)).exit_code
