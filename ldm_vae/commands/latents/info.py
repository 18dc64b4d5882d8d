"""Show what a set of latent shards is: content, sizes, autoencoder, preprocessing, segments, classes, statistics.

Reads the manifest and the index only: a moment, whatever the size of the set. Of a set that is not finished it shows
how far it has come. Examples:

  ldm-vae latents info latents/mine
  ldm-vae latents info s3://bucket/latents/mine --json
"""

from __future__ import annotations

import argparse

SUMMARY = "show what a set is and where it comes from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", metavar="SET", help="the folder of a set, or its URL")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.latents.inspect import InfoConfig, show_info

    show_info(InfoConfig(args.set, args.json))
    return 0
