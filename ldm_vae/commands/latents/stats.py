"""What the latents and labels of a set look like: a table, and with --output plots on a page.

Mean and std are exact and recomputed from the shards: exit code 1 where they do not agree. Everything else is measured
on samples that are spread evenly over the set.

  ldm-vae latents stats runs/latents
  ldm-vae latents stats s3://bucket/latents --samples 20000 --output runs/latents-stats
"""

from __future__ import annotations

import argparse
import sys

SUMMARY = "what the latents, codes and labels look like; plots"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", metavar="SET", help="a folder that `ldm-vae encode` wrote, or its URL")
    parser.add_argument("--samples", type=int, default=4096, metavar="N", help="measured samples (default 4096)")
    parser.add_argument(
        "--output", "--out", metavar="FOLDER", help="for stats.json and index.html; earlier ones are replaced"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.evaluation.latent_set_page import show_statistics
    from ldm_vae.latents.stats import Disagreement, StatsConfig

    try:
        show_statistics(StatsConfig(args.set, args.samples, args.output, args.json))
    except Disagreement as error:
        print(f"ldm-vae latents stats: {error}", file=sys.stderr)
        return 1
    return 0
