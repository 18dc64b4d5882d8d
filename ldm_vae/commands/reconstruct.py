"""Encode images and decode them again: see what an autoencoder keeps of your own pictures.

Takes files and folders, any size; the original size is kept. Writes NAME.png and NAME_beside.png (original
left, reconstruction right).

  ldm-vae reconstruct runs/mine holiday.jpg portraits/ --out seen
"""

from __future__ import annotations

import argparse

SUMMARY = "encode and decode pictures, original beside reconstruction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("autoencoder", help="a run of `ldm-vae train-vae`, a diffusers directory, or a hub id")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files and folders")
    parser.add_argument("--out", "--output", required=True, help="folder for the pictures")
    parser.add_argument("--size", type=int, metavar="N", help="first resize and crop the centre to N x N pixels")
    parser.add_argument("--sample", action="store_true", help="decode a posterior sample instead of the mean")
    parser.add_argument("--seed", type=int, default=0, help="of the posterior samples (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.errors import UserError
    from ldm_vae.evaluation.reconstruction import reconstruct_pictures
    from ldm_vae.utils.text import pluralize

    if args.size is not None and args.size < 1:
        raise UserError(f"--size: {args.size} is not above 0")
    written, rejected = reconstruct_pictures(
        args.autoencoder,
        args.images,
        args.out,
        size=args.size,
        sample=args.sample,
        seed=args.seed,
        device=args.device,
        overwrite=args.overwrite,
    )
    for name, reason in rejected:
        print(f"{name}: left out ({reason})")
    left_out = f", {len(rejected)} left out" if rejected else ""
    print(f"{args.out}: {pluralize(len(written), 'reconstruction')}{left_out}")
    return 0
