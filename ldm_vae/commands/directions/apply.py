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
    from ldm_vae.applications.directions.apply import ApplySettings, apply_direction
    from ldm_vae.commands.latents.decode import parse_numbers
    from ldm_vae.errors import UserError

    if bool(args.images) == bool(args.latents):
        raise UserError("give images, or --latents SET, and not both")
    if args.latents and (args.mask or args.size):
        raise UserError("--latents: has no pictures to mask by a file or to crop; use --box, or give images")
    if args.samples and not args.latents:
        raise UserError("--samples: has no effect without --latents; leave it out")
    settings = ApplySettings(
        directions=args.directions,
        autoencoder=args.autoencoder,
        direction=args.direction,
        strengths=tuple(parse_strengths(args.strengths)),
        mask=args.mask,
        box=parse_box(args.box),
        feather=args.feather,
        size=args.size,
    )
    count, rejected = apply_direction(
        settings,
        args.out,
        inputs=args.images,
        latents=args.latents,
        samples=parse_numbers(args.samples),
        device=args.device,
        overwrite=args.overwrite,
    )
    for name, reason in rejected:
        print(f"{name}: left out ({reason})")
    print(f"{args.out}: {count} pictures at {len(settings.strengths)} strengths, their strips, and sheet.png")
    return 0


def parse_strengths(text: str) -> list[float]:
    """`-2,0,2` -> [-2.0, 0.0, 2.0]."""
    from ldm_vae.errors import UserError

    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--strengths: {text!r} is no list of numbers; give them as -2,0,2") from None


def parse_box(text: str | None) -> tuple[int, int, int, int] | None:
    """`8,8,64,64` -> four numbers."""
    from ldm_vae.errors import UserError

    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if len(words) != 4 or not all(word.isdecimal() for word in words):
        raise UserError(f"--box: {text!r} is no box; give left,top,right,bottom in pixels, as 8,8,64,64")
    left, top, right, bottom = (int(word) for word in words)
    return left, top, right, bottom
