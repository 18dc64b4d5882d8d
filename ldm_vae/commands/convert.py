"""Convert a model: to give it away, to stock diffusers, to a CompVis checkpoint, ONNX or TorchScript.

SOURCE is a run of `ldm-vae train-vae`, a diffusers directory, a hub id, or a .ckpt or .safetensors file in the CompVis
layout (kl-f4 to kl-f32, vq-f4 to vq-f16, Stable Diffusion, SDXL; whole models too, of which the autoencoder is taken).
A .ckpt with anything but tensors in it is refused.

  ldm-vae convert vae-ft-mse-840000-ema-pruned.safetensors models/sd-vae --to diffusers
  ldm-vae convert runs/mine mine.safetensors --to compvis
  ldm-vae convert runs/mine exported/mine --to onnx --latents runs/latents

With --to diffusers-pipeline SOURCE is a run of `ldm-vae train-diffusion`, or its pipeline/; what is written runs in
stock diffusers, without this package. That takes an autoencoder of architecture sd and a U-Net of patch 1 and
prediction velocity.

  ldm-vae convert runs/diffusion exported/diffusion --to diffusers-pipeline

With --to checkpoint SOURCE is a run of `train-vae` or `train-diffusion`; what is written loads in every command. The
weights are in half precision in files below 16 MiB, the records of the training beside them without folders of this
machine. Measure that copy: its fingerprint is another one.

  ldm-vae convert runs/mine checkpoints/mine --to checkpoint
  ldm-vae convert runs/diffusion checkpoints/generator --to checkpoint --autoencoder runs/decoder-trained-further
"""

from __future__ import annotations

import argparse

SUMMARY = "convert a model: to give away, stock diffusers, CompVis checkpoint, ONNX, TorchScript"
PIPELINE, CHECKPOINT = "diffusers-pipeline", "checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a run, a diffusers directory, a hub id, .ckpt, .safetensors")
    parser.add_argument(
        "target", metavar="TARGET", help="a new directory; for compvis a name that ends in .safetensors"
    )
    parser.add_argument(
        "--to", required=True, choices=("diffusers", "compvis", "onnx", "torchscript", PIPELINE, CHECKPOINT)
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        help="of the weights (default fp32; of a checkpoint to give away fp16)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    parser.add_argument(
        "--autoencoder", metavar="DIR", help="in a pipeline to give away: another decoder of the same encoder"
    )
    parser.add_argument("--size", type=int, default=256, metavar="N", help="example side for onnx, torchscript (256)")
    parser.add_argument(
        "--latents",
        metavar="FOLDER",
        help="latent shards, whose statistics onnx and torchscript record and diffusers folds into the autoencoder",
    )
    parser.add_argument("--config", metavar="YAML", help="LDM configuration of a checkpoint file (scale_factor)")
    parser.add_argument("--channels", type=int, metavar="N", help="keep the first N latent channels (nested training)")
    parser.add_argument(
        "--prefix", default="", help="before the names in a compvis file, for example first_stage_model."
    )


def run(args: argparse.Namespace) -> int:
    from ldm_vae.diffusion.export import ConvertConfig, convert

    config = ConvertConfig(
        model=args.source,
        output=args.target,
        to=args.to,
        precision=args.dtype,
        autoencoder=args.autoencoder,
        size=args.size,
        latents=args.latents,
        config=args.config,
        channels=args.channels,
        prefix=args.prefix,
    )
    convert(config, overwrite=args.overwrite)
    return 0
