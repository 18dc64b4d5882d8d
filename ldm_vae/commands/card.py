"""Write a model card, README.md, into the directory of an autoencoder or a pipeline, from recorded results only.

MODEL is a run of `train-vae` or `train-diffusion`, the model in it, or a directory that `ldm-vae convert` wrote. What
the card says comes from its files and from the folders given here; what is not recorded is said to be missing.
The command that made the model is repeated as it was typed, with its paths.

  ldm-vae card runs/mine --evaluation runs/evaluation --intended-use "Latents of flower photographs."
  ldm-vae card runs/diffusion --pictures runs/samples --seen seen.md --data-credits sources.yaml --license cc0-1.0
"""

from __future__ import annotations

import argparse

SUMMARY = "write a model card from recorded results, and upload the model if asked"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run of `train-vae` or `train-diffusion`, or its model")
    parser.add_argument("--evaluation", metavar="FOLDER", help="a folder that `ldm-vae evaluate` wrote")
    parser.add_argument("--health", metavar="FOLDER", help="a folder with health.json (default: that of --evaluation)")
    parser.add_argument("--intended-use", metavar="TEXT", help="what the model is for, in your words")
    parser.add_argument("--not-for", metavar="TEXT", help="what it is not good for, in your words")
    parser.add_argument(
        "--data-credits",
        metavar="FILE",
        help="origin and licence of the training images: a text, or a YAML list of name, images, licence, credits, url",
    )
    parser.add_argument(
        "--pictures", metavar="FOLDER", help="show pictures of this folder of `evaluate`, for a pipeline of `generate`"
    )
    parser.add_argument("--seen", metavar="FILE", help="text: what you saw in the pictures, good and bad")
    parser.add_argument(
        "--watts", type=float, metavar="W", help="of the machine that trained, to guess energy (CPU: 10 a core)"
    )
    parser.add_argument("--license", help="of the weights, as an identifier of the Hugging Face hub, e.g. apache-2.0")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a README.md that says more, or is of another origin"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload the directory to this hub id (OWNER/NAME)")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.diffusion.generation import has_pipeline
    from ldm_vae.evaluation.model_card import CardConfig, push, write_card, write_pipeline_card

    config = CardConfig(
        model=args.model,
        evaluation=args.evaluation,
        health=args.health,
        intended_use=args.intended_use,
        not_for=args.not_for,
        data_credits=args.data_credits,
        pictures=args.pictures,
        seen=args.seen,
        watts=args.watts,
        license=args.license,
        overwrite=args.overwrite,
    )
    path, missing = (write_pipeline_card if has_pipeline(args.model) else write_card)(config)
    print(f"{path}: written" + (f"; not recorded: {', '.join(missing)}" if missing else ""))
    if args.push_to_hub:
        print(f"uploaded: {push(path.parent, args.push_to_hub)}")
    return 0
