"""Make a set of latent shards of latents that another project extracted.

SRC is a local folder in the layout of LightningDiT's extract_features.py (latents_rank00_shard000.safetensors ...).
Those files do not say which autoencoder made them: you do, and the set records it as your word. What can be checked is
checked: channels and size, and latents_stats.pt against the data. The same command continues an interrupted import, and
makes damaged shards again.
Afterwards look at some of them with `ldm-vae latents decode`: only pictures show whether it is the right autoencoder.
Example:

  ldm-vae latents import vavae_f16d32/imagenet_train_256 latents/imagenet --from lightningdit --autoencoder models/vavae
"""

from __future__ import annotations

import argparse

SUMMARY = "make a set of another project's latents (LightningDiT)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a local folder of .safetensors files")
    parser.add_argument("output", metavar="OUTPUT", help="a new folder, or its URL")
    parser.add_argument("--from", dest="layout", required=True, choices=("lightningdit",), help="layout of SRC")
    parser.add_argument(
        "--autoencoder", required=True, metavar="DIR", help="the autoencoder, or the run, that made the latents"
    )
    parser.add_argument("--resolution", default="256", metavar="N", help="of the images, N or HEIGHTxWIDTH (256)")
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one a line (default: their numbers)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="to store (default: as it is)")
    parser.add_argument("--shard-size", type=int, default=256, metavar="N", help="rows a shard (256)")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.latents.import_lightningdit import ImportConfig, import_latents

    import_latents(
        ImportConfig(
            args.source, args.output, args.autoencoder, args.resolution, args.labels, args.dtype, args.shard_size
        )
    )
    return 0
