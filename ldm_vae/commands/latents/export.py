"""Write a set of latent shards as parquet for `datasets`, or as tar files for `webdataset`.

OUTPUT is a new folder, or the URL of one; the same command continues an interrupted export. Shards are compared with
their checksums on the way. docs/latent-exchange.md shows how to read the result. Examples:

  ldm-vae latents export latents/mine exported/mine --to parquet
  ldm-vae latents export latents/mine s3://bucket/mine --to webdataset --posterior mean
"""

from __future__ import annotations

import argparse

SUMMARY = "write them as parquet (datasets) or tar (webdataset)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", metavar="SET", help="the folder or URL of a finished set")
    parser.add_argument("output", metavar="OUTPUT", help="a new folder, or its URL")
    parser.add_argument("--to", required=True, choices=("parquet", "webdataset"))
    parser.add_argument(
        "--posterior", choices=("moments", "mean", "sample"), help="what is made of moments (default: as stored)"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="samples a file (default: about 200 MB)")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.latents.export import ExportConfig, export_latents

    export_latents(ExportConfig(args.set, args.output, args.to, args.posterior, args.rows))
    return 0
