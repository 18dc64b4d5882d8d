"""How long a command takes before it works: `--help`, and the way to the first step of `generate`.

    python -m benchmarks startup OUTPUT

Every turn is a fresh process, its processor time counted (user and system, all threads), so that a busy machine changes
little. `generate` on a small pipeline stops the clock as its first U-Net step begins; the bare imports are those that
any such program needs (torch, diffusers' pipeline and model classes, accelerate, Pillow), with nothing of ours but the
repair of a torchvision that does not fit its torch (`compat.py`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

SUMMARY = "processor time of `--help`, and of `generate` before its first step"

BARE = """
from ldm_vae.runtime import repair_torchvision
repair_torchvision()
import torch, accelerate, PIL.Image
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
import os; os._exit(0)
"""
"""Neither program is asked to clean up."""
FIRST_STEP = """
import os, sys
from ldm_vae.diffusion import unet
unet.LatentUNet.forward = lambda *args, **kwargs: os._exit(0)
from ldm_vae.cli import main
sys.exit(main(["generate", sys.argv[1], "--out", sys.argv[2], "--count", "1"]))
"""
"""The clock stops where the first step would begin. `unet` needs nothing that `generate` does not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")


def measure(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Processor seconds of each program in each round."""
    from benchmarks.generate import random_pipeline

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_pipeline("tiny", "pico", 8).save_pretrained(folder / "pipeline")
        programs: dict[str, list[str]] = {
            "ldm-vae --help": ["-m", "ldm_vae.cli", "--help"],
            "ldm-vae train-vae --help": ["-m", "ldm_vae.cli", "train-vae", "--help"],
            "the bare imports": ["-c", BARE],
            "ldm-vae generate, first step": ["-c", FIRST_STEP, str(folder / "pipeline")],
        }
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for number in range(arguments.rounds + 1):
            progress(f"round {number} of {arguments.rounds} ...")
            for program, words in programs.items():
                out = [str(folder / f"out-{number}")] if "generate" in program else []
                taken = processor_seconds([sys.executable, *words, *out])
                if number:  # the first reads the files from the disk
                    seconds[program].append(taken)
    return {"rounds": arguments.rounds, "seconds": seconds}


def processor_seconds(command: Sequence[str]) -> float:
    """User and system time of a process, one thread."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stderr is not None
    words = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[1:3]} failed: {words.decode(errors='replace')[-500:]}")
    return usage.ru_utime + usage.ru_stime


def text(found: dict[str, Any]) -> str:
    """`results.md`."""
    from benchmarks.rounds import bar, bars_table, ratio

    seconds = found["seconds"]
    lines = ["# Start-up", "", "| program | processor seconds |", "|---|---|"]
    lines += [f"| {program} | {median(values):.3f} |" for program, values in seconds.items()]
    way = ratio(seconds["ldm-vae generate, first step"], seconds["the bare imports"])
    slowest = max(median(values) for program, values in seconds.items() if program.endswith("--help"))
    bars = bars_table(
        [
            bar("0.3 s over the slower `--help`", 0.3 / slowest, 1),
            bar("1.5 bare imports over the way to the first step", 1.5 / way.median, 1),
        ]
    )
    note = (
        f"Medians of {found['rounds']} rounds of fresh processes, files cached, one thread. `generate` needs "
        f"{way} times the processor time of the bare imports until its first step, loading a small pipeline included; "
        "the bare imports are torch, accelerate, Pillow and diffusers' UNet2DModel, DiffusionPipeline "
        "and FlowMatchEulerDiscreteScheduler."
    )
    return "\n".join([*lines, "", *bars, "", note, ""])
