"""Move pictures along a direction: every strength as a picture, a strip for each image and one contact sheet.

Images keep their size. Strengths are in standard deviations of the latents that the direction was fitted to; 0 is the
reconstruction. A mask or a box limits the edit, softly at its edge.

  ldm-vae directions apply runs/directions brightness holiday.jpg --autoencoder runs/mine --out brighter
  ldm-vae directions apply runs/directions cat/probe portraits/ --autoencoder runs/mine --strengths=-3,0,3 --out cats
  ldm-vae directions apply runs/directions red_green room.jpg --autoencoder runs/mine --mask sofa.png --out red
  ldm-vae directions apply runs/directions pca/1 --latents runs/latents --samples 3,17 --autoencoder runs/vae --out pca
"""

from __future__ import annotations

import argparse

SUMMARY = "move pictures along one, everywhere or in a mask"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directions", metavar="DIRECTIONS", help="the folder that `directions fit` wrote")
    parser.add_argument("direction", metavar="NAME", help="a direction, or an attribute: then its difference of means")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files and folders")
    parser.add_argument("--autoencoder", required=True, metavar="DIR", help="with the encoder of the fit")
    parser.add_argument("--out", "--output", required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument(
        "--strengths", default="-2,-1,0,1,2", metavar="S,S,...", help="default -2,-1,0,1,2; write --strengths=-3,0,3"
    )
    parser.add_argument("--mask", metavar="IMAGE", help="change only where this picture of the same size is white")
    parser.add_argument("--box", metavar="L,T,R,B", help="change only in this box: left, top, right, bottom in pixels")
    parser.add_argument(
        "--feather", type=float, metavar="N", help="softness of the edge in latent positions (default 1)"
    )
    parser.add_argument("--size", type=int, metavar="N", help="first scale and crop the images to N x N pixels")
    parser.add_argument("--latents", metavar="SET", help="samples of latent shards instead of images")
    parser.add_argument("--samples", metavar="N,N,...", help="these samples of the set (default: 8 of them)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.directions.apply import ApplyDirectionConfig, apply_direction
    from ldm_vae.latents.inspect import parse_numbers

    settings = {key: value for key, value in vars(args).items() if key in ApplyDirectionConfig.__dataclass_fields__}
    settings["output"] = args.out
    settings["samples"] = parse_numbers(args.samples)
    settings["strengths"] = parse_strengths(args.strengths)
    settings["box"] = parse_box(args.box)
    apply_direction(ApplyDirectionConfig(**settings), overwrite=args.overwrite)
    return 0


def parse_strengths(text: str) -> list[float]:
    """`-2,0,2` -> [-2.0, 0.0, 2.0]."""
    from ldm_vae.errors import UserError

    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"strengths: {text!r} is not a list of numbers; give them as -2,0,2") from None


def parse_box(text: str | None) -> list[int] | None:
    """`8,8,64,64` -> four numbers."""
    from ldm_vae.errors import UserError

    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"box: {text!r} is not a box; give left,top,right,bottom in pixels, as 8,8,64,64")
    return [int(word) for word in words] or None
