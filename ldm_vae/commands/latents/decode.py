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
    from pathlib import Path

    from ldm_vae.autoencoder.models import load_autoencoder
    from ldm_vae.errors import UserError
    from ldm_vae.files import write_atomically
    from ldm_vae.latents.dataset import LatentDataset
    from ldm_vae.latents.format import open_set_folder, refuse_inside
    from ldm_vae.latents.inspect import check_autoencoder, choose, contact_sheet, decode_samples
    from ldm_vae.runtime import compute_device
    from ldm_vae.utils.text import pluralize

    output = Path(args.output)
    if output.suffix.lower() not in (".png", ".webp", ".jpg", ".jpeg"):
        raise UserError(f"--output: {output} is no name of a picture; let it end in .png")
    if output.exists() and not args.overwrite:
        raise UserError(f"--output: {output} is there already; give another name, or --overwrite")
    refuse_inside(output, "--output")
    if args.samples and (args.label or args.count):
        raise UserError("--samples: names the samples, so that --label and --count have no effect; leave those out")
    open_set_folder(args.set)
    dataset = LatentDataset(args.set)
    manifest = dataset.manifest
    numbers = choose(manifest, COUNT if args.count is None else args.count, parse_numbers(args.samples), args.label)
    autoencoder = load_autoencoder(args.autoencoder)
    check_autoencoder(manifest, autoencoder, f"--autoencoder {args.autoencoder}")
    autoencoder.to(compute_device(args.device))
    decoded = decode_samples(dataset, autoencoder, numbers, flipped=args.flipped, posterior=args.posterior)
    sheet = contact_sheet(decoded)
    write_atomically(output, sheet.save)
    for sample in decoded:
        print("  ".join(word for word in (str(sample.number), sample.label, sample.id) if word))
    print(f"{output}: {len(decoded)} of {pluralize(manifest.count, 'sample')}")
    return 0


def parse_numbers(text: str | None) -> list[int]:
    """`3,17,99` -> [3, 17, 99]; empty for None."""
    from ldm_vae.errors import UserError

    words = [word.strip() for word in text.split(",")] if text else []
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--samples: {text!r} is no list of numbers; give them as 3,17,99")
    return [int(word) for word in words]
