"""Generate images with a trained latent diffusion model, by class label or without.

The same command completes an interrupted folder. Without --label a model with classes makes every class in turn.

  ldm-vae generate runs/quickstart/diffusion --count 40 --out samples
  ldm-vae generate runs/mine --label cat --label 3 --guidance 4 --size 512x768 --out cats
  ldm-vae generate runs/mine --grid --count 4 --sampler heun --steps 15 --out grid
  ldm-vae generate runs/mine --interpolate cat dog --count 8 --out between
  ldm-vae generate runs/mine --label dog --init cat.jpg --strength 0.5 --count 4 --out variations
  ldm-vae generate runs/mine --label dog --init room.jpg --mask sofa.png --out room
"""

from __future__ import annotations

import argparse

SUMMARY = "generate images with a trained latent diffusion model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a pipeline directory, or a run of `ldm-vae train-diffusion`")
    parser.add_argument("--out", "--output", required=True, metavar="DIR", help="folder for the images")
    parser.add_argument("--label", action="append", default=[], metavar="NAME", help="class name or id; repeatable")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="images (default 16)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="decides the noise of each image (default 0)")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="steps of the sampler (default 30)")
    parser.add_argument("--sampler", metavar="NAME", help="euler, heun, dpm++ or unipc (default: as saved, euler)")
    parser.add_argument("--guidance", type=float, metavar="W", help="how closely to follow the label (default 3)")
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="times at which guidance acts, 1 being pure noise (default 0 1)",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="S",
        help="0 to 1, against the strong colors of strong guidance (default 0; 0.7 is usual)",
    )
    parser.add_argument(
        "--autoguidance",
        type=float,
        default=1.0,
        metavar="W",
        help="away from the model's second U-Net (default 1: off)",
    )
    parser.add_argument("--grid", action="store_true", help="every label from the same noise, --count times")
    parser.add_argument(
        "--interpolate", nargs=2, metavar=("A", "B"), help="--count images from A to B: two seeds, or two labels"
    )
    parser.add_argument("--init", metavar="IMAGE", help="start from this image, scaled and cropped to the size")
    parser.add_argument(
        "--strength", type=float, metavar="S", help="how much of it may change, up to 1 (default 0.6; with --mask 1)"
    )
    parser.add_argument("--mask", metavar="IMAGE", help="change --init only where this one is white")
    parser.add_argument("--size", metavar="N", help="pixels: 512, or height x width as 512x768 (default: as trained)")
    parser.add_argument(
        "--neighbours",
        metavar="LATENTS",
        help="the latents of the training: neighbours.png shows the nearest to each image, and the copy rate is said",
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images at a time (default 8)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the networks (default fp32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace the images of another call in DIR")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.diffusion.generation import GenerateConfig, generate

    config = GenerateConfig(
        model=args.model,
        output=args.out,
        labels=tuple(args.label),
        count=args.count,
        seed=args.seed,
        steps=args.steps,
        sampler=args.sampler,
        guidance=args.guidance,
        guidance_interval=(args.guidance_interval[0], args.guidance_interval[1]),
        guidance_rescale=args.guidance_rescale,
        autoguidance=args.autoguidance,
        grid=args.grid,
        interpolate=(args.interpolate[0], args.interpolate[1]) if args.interpolate else None,
        init=args.init,
        strength=args.strength,
        mask=args.mask,
        size=args.size,
        precision=args.precision,
        batch=args.batch,
        device=args.device,
        neighbours=args.neighbours,
    )
    generate(config, overwrite=args.overwrite)
    return 0
