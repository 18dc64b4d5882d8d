"""Say what is wrong with an autoencoder: collapse, dead or ignored channels, an idle KL term, smuggling, grids.

Works on any diffusers autoencoder. Writes health.json, health.md and index.html into the output folder; each verdict
comes with its threshold, its likely cause and the knob to turn. A finished report is not redone.

  ldm-vae diagnose runs/mine --data ~/images
  ldm-vae diagnose autoencoder=runs/mine data.source=folder data.path=~/images output=runs/mine/health
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "the health report: collapse, dead channels, smuggling, grids; with causes and cures"
DEFAULT_FOLDER = "health"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="an autoencoder's directory, or a YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parser.add_argument("--data", metavar="FOLDER", help="a folder of images: data.source=folder data.path=FOLDER")
    parser.add_argument(
        "--out", "--output", metavar="FOLDER", help="output=FOLDER; default: health/ in the autoencoder's directory"
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a verdict is of severity fail")
    parser.add_argument("--overwrite", action="store_true", help="replace a report of other settings")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")


def run(args: argparse.Namespace) -> int:
    translate(args)
    from ldm_vae.evaluation.diagnosis import DiagnoseConfig, diagnose, failed

    config = config_arguments.load(args, DiagnoseConfig)
    if config is None:
        return 0
    report = diagnose(config, overwrite=args.overwrite)
    return 1 if args.strict and failed(report) else 0


def translate(args: argparse.Namespace) -> None:
    """The short form becomes settings: DIR is autoencoder=DIR, --data and --out stand for their keys.

    Given settings come later, so that they win.
    """
    from pathlib import Path

    settings: list[str] = []
    first = args.config
    if first is not None and "=" not in first and Path(first).suffix not in (".yaml", ".yml"):
        settings.append(f"autoencoder={first}")
        if args.out is None and Path(first).is_dir():
            settings.append(f"output={Path(first) / DEFAULT_FOLDER}")
        args.config = None
    if args.data is not None:
        settings += ["data.source=folder", f"data.path={args.data}"]
    if args.out is not None:
        settings.append(f"output={args.out}")
    if args.config is not None and "=" in args.config:
        args.overrides, args.config = [args.config, *args.overrides], None
    args.overrides = [*settings, *args.overrides]
