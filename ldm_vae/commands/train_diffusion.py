"""Train a latent U-Net on the shards that `ldm-vae encode` wrote; ends with a pipeline that generates images.

The same command resumes an interrupted run; `ldm-vae ema` chooses another length of its average afterwards. Example:

  ldm-vae train-diffusion configs/diffusion_small.yaml output=runs/diffusion latents=runs/latents \\
      autoencoder=runs/vae/autoencoder

With kid.samples=1000 kid.data.source=folder kid.data.path=IMAGES the KID of samples to the images held out is measured.
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "train a latent U-Net on latent shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(
        parser,
        example="configs/diffusion_small.yaml",
        dry_run="build everything, do one step on random data, print parameters, GMACs, shapes and memory",
    )


def run(args: argparse.Namespace) -> int:
    from ldm_vae.diffusion.training import TrainDiffusionConfig, train_diffusion

    config = config_arguments.load(args, TrainDiffusionConfig)
    result = 0 if config is None else train_diffusion(config, dry_run=args.dry_run)
    return result if isinstance(result, int) else 0
