"""Gather a finished run into one HTML page that needs no other file.

RUN_ROOT holds the folders of the stages: vae, latents, diffusion, evaluation, samples. Missing ones are
left out.

  ldm-vae report runs/quickstart
"""

from __future__ import annotations

import argparse

SUMMARY = "one self-contained page about a whole run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_root", metavar="RUN_ROOT", help="the folder that holds the stages' folders")
    parser.add_argument("--out", "--output", help="the HTML file (default: RUN_ROOT/report.html)")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.evaluation.report import write_report

    page = write_report(args.run_root, args.out)
    print(f"{page}: {page.stat().st_size / 2**20:.1f} MB, opens in any browser")
    return 0
