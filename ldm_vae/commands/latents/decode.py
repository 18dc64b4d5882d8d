"""Decode samples of a set into a contact sheet: see that the latents are still the pictures they came from.

The autoencoder must be the one that made the latents; its decoder may have been trained further.

  ldm-vae latents decode runs/latents --autoencoder runs/vae --output sheet.png
  ldm-vae latents decode runs/latents --autoencoder runs/vae --output cats.png --label cat --count 30
  ldm-vae latents decode runs/latents --autoencoder runs/vae --output three.png --samples 3,17,99 --flipped
"""

from __future__ import annotations

import argparse

SUMMARY = "decode samples into a contact sheet"
COUNT = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", metavar="SET", help="a folder that `ldm-vae encode` wrote, or its URL")
    parser.add_argument("--autoencoder", required=True, metavar="DIR", help="the autoencoder that made the latents")
    parser.add_argument("--output", "--out", required=True, metavar="PNG", help="the sheet, a .png, .webp or .jpg file")
    parser.add_argument("--count", type=int, metavar="N", help=f"samples, evenly spread (default {COUNT})")
    parser.add_argument("--samples", metavar="N,N,...", help="these samples, by their numbers in the set")
    parser.add_argument("--label", metavar="NAME", help="samples of this class")
    parser.add_argument("--flipped", action="store_true", help="the stored mirror images")
    parser.add_argument("--posterior", choices=("mean", "sample"), help="of stored moments (default mean)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier sheet")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.latents.inspect import DecodeConfig, decode_latents

    config = DecodeConfig(
        args.set, args.autoencoder, args.output, args.count, args.samples, args.label, args.flipped, args.posterior,
        args.device,
    )  # fmt: skip
    decode_latents(config, overwrite=args.overwrite)
    return 0
