"""Compress pictures into small files with an autoencoder.

Takes files and folders, any size. Writes NAME.ldmz beside each picture, or into --output. `decompress` needs the same
autoencoder, and the same --entropy file where one is given here.

  ldm-vae compress holiday.jpg portraits/ --autoencoder runs/mine --output small
  ldm-vae compress holiday.jpg --autoencoder runs/mine --entropy runs/codec.safetensors --target-bpp 0.3
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SUMMARY = "compress pictures into small files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files and folders")
    parser.add_argument("--autoencoder", required=True, metavar="DIR", help="a run of `ldm-vae train-vae`, or its like")
    parser.add_argument("--entropy", metavar="FILE", help="a model of `ldm-vae codec-fit` (default: none is needed)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quality", type=float, metavar="N", help="1 to 100; 12 more halve the step (default 50)")
    size.add_argument("--target-bpp", type=float, metavar="BITS", help="the best file of at most BITS per pixel")
    parser.add_argument(
        "--progressive", metavar="N,N,...", help="numbers of first channels that `decompress --channels` can show alone"
    )
    parser.add_argument("--output", "--out", metavar="FOLDER", help="for the files (default: beside each picture)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.codec import compression
    from ldm_vae.applications.codec.entropy_models import step_of
    from ldm_vae.applications.codec.format import SUFFIX
    from ldm_vae.data.decoding import ImageRejected, decode_image, read_regular_file
    from ldm_vae.errors import UserError
    from ldm_vae.evaluation.reconstruct_images import find_pictures
    from ldm_vae.files import write_bytes
    from ldm_vae.training.distributed import compute_device

    if args.target_bpp is not None and not 0 < args.target_bpp < 100:
        raise UserError(f"--target-bpp: {args.target_bpp:g} is no number of bits per pixel; 0.1 to 1 is usual")
    step = step_of(50.0 if args.quality is None else args.quality)
    goals = targets(args.output, find_pictures(args.images), SUFFIX, args.overwrite)
    codec = compression.open_codec(args.autoencoder, args.entropy, compute_device(args.device))
    parts = parse_parts(args.progressive, codec.channels)
    written = 0
    for path, goal in goals:
        try:
            image = decode_image(read_regular_file(path))
        except ImageRejected as error:
            print(f"{path}: left out ({error})")
            continue
        picture = compression.analyse(codec, image, str(path))
        if args.target_bpp is not None:
            data = compression.compress_within(codec, picture, args.target_bpp, parts).data
        else:
            data = compression.compress(codec, picture, step, parts).data
        write_bytes(goal, data)
        print(f"{goal}: {len(data)} bytes, {8 * len(data) / (picture.width * picture.height):.3f} bits per pixel")
        written += 1
    if not written:
        raise UserError(f"{args.images[0]}: no image could be decoded; give other files")
    return 0


def targets(
    output: str | None, named: Sequence[tuple[str, Path]], suffix: str, overwrite: bool
) -> list[tuple[Path, Path]]:
    """(file, where its result goes) for (name, file). Raises: UserError when something is there, or two go there."""
    from pathlib import Path

    from ldm_vae.errors import UserError

    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"--output: {output} is a file; give a folder")
    found: dict[Path, Path] = {}
    for name, path in named:
        goal = path.with_suffix(suffix) if output is None else Path(output) / f"{name}{suffix}"
        if goal in found:
            raise UserError(f"{goal}: {found[goal]} and {path} would both become it; give them one by one")
        if goal.exists() and not overwrite:
            raise UserError(f"{goal}: is there already; give another --output, or --overwrite")
        found[goal] = path
    return [(path, goal) for goal, path in found.items()]


def parse_parts(text: str | None, channels: int) -> list[int]:
    """`4,8` -> [4, 8]; empty for None. Raises: UserError."""
    from ldm_vae.errors import UserError

    words = [word.strip() for word in text.split(",")] if text else []
    parts = [int(word) if word.isdecimal() else 0 for word in words]
    if parts != sorted(set(parts)) or any(not 0 < part <= channels for part in parts) or len(parts) > 63:
        raise UserError(
            f"--progressive: {text!r} is no rising list of channel counts up to {channels}; give for example 4,8"
        )
    return parts
