"""What the two training commands share: configuration, overrides, --print-config, --dry-run."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("config", nargs="?", help=f"a YAML file, for example {example}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, do one step on random data, print parameters, GMACs, shapes and memory",
    )


def overrides(args: argparse.Namespace) -> list[str]:
    """The key=value words. A first word of that form is an override too, not a file. A dry run needs no output."""
    words = list(args.overrides)
    if args.config is not None and "=" in args.config:
        words, args.config = [args.config, *words], None
    if args.dry_run or args.print_config:
        words = ["output=unused", *words]
    return words
