"""Train several kinds of autoencoder (KL, plain, VQ, FSQ ...) on the same images and budget, and put them side by side.

Every kind is `ldm-vae train-vae` and `ldm-vae evaluate` in its own folder. The same command continues; several launches
may share the folder. Writes comparison.json, comparison.md, grid.png and index.html.

  ldm-vae compare configs/compare_kinds.yaml output=runs/compare 'overrides=[data.path=~/images]'
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "train several kinds of autoencoder and compare them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser, example="configs/compare_kinds.yaml")


def run(args: argparse.Namespace) -> int:
    import signal

    from ldm_vae.evaluation.comparison import CompareConfig, compare

    config = config_arguments.load(args, CompareConfig)
    if config is None:
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the trainings save, then everything leaves
    found = compare(config)
    return 1 if any(one["status"] == "failed" for one in found["missing"]) else 0
