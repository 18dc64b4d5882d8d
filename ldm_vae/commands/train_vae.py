"""Train an autoencoder: L1 + perceptual + KL at a rate that you choose, on one or many processes.

The same command resumes an interrupted run. Examples:

  ldm-vae train-vae configs/vae_f8c4_nano.yaml output=runs/mine data.source=folder data.path=~/images
  torchrun --nproc_per_node 4 scripts/train_vae.py configs/vae_f8c4_base.yaml output=runs/base
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_vae.commands import config_arguments

SUMMARY = "train an autoencoder on images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(
        parser,
        example="configs/vae_f8c4_nano.yaml",
        dry_run="build everything, do one step on random data, print parameters, GMACs, shapes and memory",
    )


def run(args: argparse.Namespace) -> int:
    from ldm_vae.autoencoder.train_config import TrainVaeConfig

    config = config_arguments.load(args, TrainVaeConfig)
    if config is None:
        return 0

    from ldm_vae.autoencoder.train_config import held_out_part, measured_batches, training_samples
    from ldm_vae.autoencoder.training import VaeModel
    from ldm_vae.training.run_directory import RunDirectory
    from ldm_vae.training.trainer import fit, make_accelerator

    if args.dry_run:
        from ldm_vae.training.trainer import dry_run

        accelerator = make_accelerator(config.training)
        model = VaeModel(config, held_out=None, device=accelerator.device)
        accelerator.print(dry_run(model, config.plan(accelerator.num_processes), config.training, accelerator))
        return 0
    samples, held_out = training_samples(config), held_out_part(config)
    accelerator = make_accelerator(config.training, Path(config.output))
    run_directory = RunDirectory(config.output, config, main_process=accelerator.is_main_process)
    model = VaeModel(config, held_out, accelerator.device)
    if model.measures_before_training and not any(run_directory.checkpoints.glob("step-*")):
        model.autoencoder.fit_statistics(measured_batches(config))
    plan = config.plan(accelerator.num_processes)
    return fit(model, samples, plan, config.training, run_directory, accelerator)
