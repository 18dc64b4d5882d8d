"""Train an autoencoder at several target rates (and channel counts), measure each, and say which rate is worth it.

Every point is `ldm-vae train-vae` and `ldm-vae evaluate` in its own folder. The same command continues; several
launches may share the folder, points that another one works on are left to it. Writes frontier.json,
frontier.md, frontier.svg and index.html.

  ldm-vae frontier configs/frontier_nano.yaml output=runs/frontier 'overrides=[data.path=~/images]'
  ldm-vae frontier vae=configs/vae_quickstart.yaml output=runs/frontier 'targets_nats=[1,2,3,4]' steps=300
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "train at several rates and draw rate against distortion"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser, example="configs/frontier_nano.yaml")


def run(args: argparse.Namespace) -> int:
    import signal

    from ldm_vae.evaluation.rate_distortion import FrontierConfig, frontier

    config = config_arguments.load(args, FrontierConfig)
    if config is None:
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the trainings save, then everything leaves
    found = frontier(config)
    return 1 if any(one["status"] == "failed" for one in found["missing"]) else 0
