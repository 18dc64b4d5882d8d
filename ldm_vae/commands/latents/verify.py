"""Find what is wrong with a set of latent shards, and which samples are affected.

Reads every file once and compares it with what the others say of it: flipped bits, cut, missing and foreign files,
statistics and counts that do not fit, values that are not finite. Changes nothing; needs no images, no autoencoder.
Exit code 0: whole; 1: something is wrong; 2: there is no set, none that is finished, or it cannot be reached. Examples:

  ldm-vae latents verify latents/mine
  ldm-vae latents verify s3://bucket/latents/mine --quick
  ldm-vae latents verify latents/mine --report damage.json
"""

from __future__ import annotations

import argparse

SUMMARY = "find damage in a set, and the samples that it affects"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", metavar="SET", help="the folder of a set, or its URL")
    parser.add_argument("--quick", action="store_true", help="sizes, headers, index and manifest only; reads no shard")
    parser.add_argument("--report", metavar="FILE", help="write everything, with all samples, as JSON to FILE")


def run(args: argparse.Namespace) -> int:
    from ldm_vae.latents.verify import VerifyConfig, verify_latents

    return verify_latents(VerifyConfig(args.set, args.quick, args.report)).exit_code
