"""Fit an entropy model to latents: compressed pictures get smaller than with `compress` alone.

The model is a small file that belongs to the autoencoder. Compressing and decompressing both need it, and a picture
names the one it was compressed with. `kind=context` trains small networks that predict each level from its decoded
neighbours; `kind=static` keeps one distribution a channel.

  ldm-vae codec-fit autoencoder=runs/mine latents=runs/latents output=runs/codec.safetensors
"""

from __future__ import annotations

import argparse

from ldm_vae.commands import config_arguments

SUMMARY = "fit an entropy model to latents: smaller compressed pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments.add_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.codec.fitting import CodecFitConfig, fit_codec

    config = config_arguments.load(args, CodecFitConfig)
    if config is not None:
        fit_codec(config, overwrite=args.overwrite)
    return 0
