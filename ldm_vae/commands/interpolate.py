"""Show and measure what lies between two images: in pixels, in latents, through a diffusion model's noise.

Several pairs, or a folder, are measured together. Writes animations, frames, sheet.png, results.json, results.md
and index.html. --compare puts another autoencoder beside it, a plain one for instance; --prior decodes draws from
the prior.

  ldm-vae interpolate a.jpg b.jpg --autoencoder runs/mine --out between
  ldm-vae interpolate ~/images --pairs 16 --size 256 --autoencoder runs/vae --compare runs/plain --prior 6 --out between
  ldm-vae interpolate a.jpg b.jpg --pipeline runs/diffusion --size 512 --animation gif --out between
"""

from __future__ import annotations

import argparse

SUMMARY = "what lies between two images, in latents and through diffusion"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="A B, or A B C D ..., or folders")
    parser.add_argument("--autoencoder", metavar="DIR", help="a run of `train-vae`, a diffusers directory, or a hub id")
    parser.add_argument("--pipeline", metavar="DIR", help="a diffusion model, for the ways through its noise")
    parser.add_argument("--compare", metavar="DIR", help="another autoencoder, on the same pairs")
    parser.add_argument("--out", "--output", required=True, metavar="DIR", help="folder for everything")
    parser.add_argument("--pairs", type=int, metavar="N", help="so many pairs of the images, evenly spread")
    parser.add_argument("--size", type=int, metavar="N", help="first scale and crop the images to N x N pixels")
    parser.add_argument("--frames", type=int, default=13, metavar="N", help="of every way, odd (default 13)")
    parser.add_argument("--prior", type=int, default=0, metavar="N", help="decode N draws from the prior (default 0)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of the diffusion model (default 20)")
    parser.add_argument(
        "--strength", type=float, default=0.6, metavar="S", help="share of them for noised latents (default 0.6)"
    )
    parser.add_argument("--animation", choices=("webp", "gif"), default="webp", help="kind of file (default webp)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the noise (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace a result of other settings")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.interpolation import InterpolateConfig, interpolate

    settings = {key: value for key, value in vars(args).items() if key in InterpolateConfig.__dataclass_fields__}
    interpolate(InterpolateConfig(**settings, output=args.out), overwrite=args.overwrite)
    return 0
