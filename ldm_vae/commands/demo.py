"""See it work: compress and reconstruct your own images, and generate new ones, with the models in checkpoints/.

Takes files and folders; without any, eight synthetic images. Each is scaled and cropped to --size. Writes index.html,
which is one file with everything in it, demo.webp, the reconstructions, the compressed files and the samples. The same
command continues an interrupted one.

  ldm-vae demo
  ldm-vae demo holiday.jpg portraits/ --out seen
  ldm-vae demo --autoencoder runs/vae --pipeline runs/diffusion --out mine
"""

from __future__ import annotations

import argparse

SUMMARY = "see it work: your images through the shipped models, on one page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files and folders (default: synthetic ones)")
    parser.add_argument("--out", "--output", default="demo", metavar="DIR", help="folder for everything (default demo)")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="images to generate (default 16)")
    parser.add_argument("--size", type=int, default=512, metavar="N", help="pixels of your images (default 512)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of the sampler (default 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the noise (default 0)")
    parser.add_argument("--autoencoder", metavar="DIR", help="another than checkpoints/vae-f8c4-nano")
    parser.add_argument("--pipeline", metavar="DIR", help="another than checkpoints/ldm-emoji-512")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16", help="of the networks that generate (default bf16)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace a result of other settings")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.applications.demo import DemoConfig, demo

    settings = {key: value for key, value in vars(args).items() if key in DemoConfig.__dataclass_fields__}
    demo(DemoConfig(**settings, output=args.out), overwrite=args.overwrite)
    return 0
