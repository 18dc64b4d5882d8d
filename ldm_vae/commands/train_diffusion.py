"""Train a latent U-Net on the shards that `ldm-vae encode` wrote; ends with a pipeline that generates images.

The same command resumes an interrupted run; `ldm-vae ema` chooses another length of its average afterwards. Example:

  ldm-vae train-diffusion configs/diffusion_small.yaml output=runs/diffusion latents=runs/latents \\
      autoencoder=runs/vae/autoencoder

With kid.samples=1000 kid.data.source=folder kid.data.path=IMAGES the KID of samples to the images held out is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_vae.commands import config_arguments

SUMMARY = "train a latent U-Net on latent shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(
        parser,
        example="configs/diffusion_small.yaml",
        dry_run="build everything, do one step on random data, print parameters, GMACs, shapes and memory",
    )


def run(args: argparse.Namespace) -> int:
    from ldm_vae.diffusion.posthoc_ema import FOLDER
    from ldm_vae.diffusion.training import DiffusionModel, TrainDiffusionConfig, open_latents, ordered_samples

    config = config_arguments.load(args, TrainDiffusionConfig)
    if config is None:
        return 0

    from ldm_vae.training.run_directory import RunDirectory
    from ldm_vae.training.trainer import fit, make_accelerator

    samples, held_out = open_latents(config)
    accelerator = make_accelerator(config.training, None if args.dry_run else Path(config.output))
    plan = config.plan(accelerator.num_processes)
    snapshots = None if args.dry_run else Path(config.output) / FOLDER
    judge = None
    if config.kid.samples and not args.dry_run:
        from ldm_vae.diffusion.fid import make_sample_kid

        judge = make_sample_kid(config.kid, config.held_out)
    model = DiffusionModel(config, samples, held_out, snapshots, judge)
    if args.dry_run:
        from ldm_vae.training.trainer import dry_run

        accelerator.print(dry_run(model, plan, config.training, accelerator))
        return 0
    run_directory = RunDirectory(config.output, config, main_process=accelerator.is_main_process)
    return fit(model, ordered_samples(config, samples), plan, config.training, run_directory, accelerator)
