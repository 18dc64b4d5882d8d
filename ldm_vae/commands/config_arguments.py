"""What the commands with a configuration share: the YAML file, key=value overrides, --print-config, --dry-run."""

from __future__ import annotations

import argparse
from typing import TypeVar

Config = TypeVar("Config")

PLACEHOLDERS = ["output=OUTPUT", "autoencoder=AUTOENCODER", "latents=LATENTS", "directions=DIRECTIONS"]
"""What stands for required keys where nothing is read or written."""


def add_arguments(parser: argparse.ArgumentParser, example: str | None = None, dry_run: str | None = None) -> None:
    """`example`: a file to name; `dry_run`: what --dry-run does, for commands that have it."""
    what = f"a YAML file, for example {example}" if example else "a YAML file; key=value settings alone do as well"
    parser.add_argument("config", nargs="?", help=what)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help=dry_run)


def load(args: argparse.Namespace, schema: type[Config]) -> Config | None:
    """The configuration that the arguments describe; None when it was only to be printed.

    A first word `key=value` is an override, not a file.
    """
    import dataclasses

    from ldm_vae import config as configuration

    path, overrides = args.config, list(args.overrides)
    if path is not None and "=" in path:
        path, overrides = None, [path, *overrides]
    names = {field.name for field in dataclasses.fields(schema) if field.default == "???"}  # type: ignore[arg-type]
    placeholders = [word for word in PLACEHOLDERS if word.split("=")[0] in names]
    if args.print_config:
        print(configuration.to_yaml(configuration.load(schema, path, [*placeholders, *overrides])), end="")
        return None
    if getattr(args, "dry_run", False):
        overrides = [PLACEHOLDERS[0], *overrides]
    return configuration.load(schema, path, overrides)
