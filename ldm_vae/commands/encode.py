"""Encode a dataset into latent shards, once, on one or many processes.

The same command continues an interrupted job, making only what is missing; a finished set is left as it is. Examples:

  ldm-vae encode autoencoder=runs/mine output=latents/mine data.source=folder data.path=~/images
  torchrun --nproc_per_node 4 scripts/encode_dataset.py autoencoder=runs/mine output=latents/mine resolution=256 ...
"""

from __future__ import annotations

import argparse

SUMMARY = "encode images into latent shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a YAML file; key=value settings alone do as well")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, over those of the file")
    parser.add_argument("--print-config", action="store_true", help="print the configuration and leave")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="open everything, time a few batches of noise, print sizes; write nothing",
    )


def run(args: argparse.Namespace) -> int:
    import signal

    from ldm_vae import config as configuration
    from ldm_vae.latents.encode import EncodeConfig, encode_dataset, make_accelerator

    path, overrides = args.config, args.overrides
    if path is not None and "=" in path:
        path, overrides = None, [path, *overrides]
    if args.print_config:
        overrides = ["autoencoder=AUTOENCODER", "output=OUTPUT", *overrides]
        print(configuration.to_yaml(configuration.load(EncodeConfig, path, overrides)), end="")
        return 0
    if args.dry_run:
        from ldm_vae.latents.dry_run import dry_run

        config = configuration.load(EncodeConfig, path, ["output=unused", *overrides])
        return dry_run(config, make_accelerator(config))

    from ldm_vae.training.signals import die_with_launcher

    config = configuration.load(EncodeConfig, path, overrides)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # shards are published whole: leaving is always safe
    die_with_launcher()
    accelerator = make_accelerator(config)
    try:
        return encode_dataset(config, accelerator)
    finally:
        accelerator.end_training()
