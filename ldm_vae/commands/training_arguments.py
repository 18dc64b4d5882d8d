"""What the two training commands share: configuration, overrides, --print-config, --dry-run."""

from __future__ import annotations

import argparse
from typing import TypeVar

Config = TypeVar("Config")


def add_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("config", nargs="?", help=f"a YAML file, for example {example}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, do one step on random data, print parameters, GMACs, shapes and memory",
    )


def load(args: argparse.Namespace, schema: type[Config]) -> Config:
    """The configuration that the arguments describe. A first word `key=value` is an override, not a file."""
    from ldm_vae import config as configuration

    path, overrides = args.config, list(args.overrides)
    if path is not None and "=" in path:
        path, overrides = None, [path, *overrides]
    if args.dry_run or args.print_config:
        overrides = ["output=unused", *overrides]  # nothing will be written
    return configuration.load(schema, path, overrides)
