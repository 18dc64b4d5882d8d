"""`generate` on two processes, of which the second looks at the folder long after the first; run by torchrun."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState

from ldm_vae.diffusion.generation import GenerateConfig, generate
from ldm_vae.errors import UserError
from ldm_vae.training.distributed import Place, check_same_data

RANK = int(os.environ.get("RANK", "0"))


def different_data_ends_both(processes: Place) -> bool:
    check_same_data(processes, "same")
    try:
        check_same_data(processes, f"of {RANK}")
    except UserError as error:
        return "process 1 and process 0 see other files" in str(error)
    return False


def main(model: str, output: str, answers: str) -> None:
    torch.set_num_threads(1)
    ended = different_data_ends_both(PartialState(cpu=True))
    if RANK == 1:
        exists = Path.exists

        def late(path: Path) -> bool:
            if path.suffix == ".png":
                time.sleep(1.0)
            return exists(path)

        Path.exists = late  # type: ignore[assignment, method-assign]
    result = generate(GenerateConfig(model=model, output=output, count=6, steps=1, batch=1, device="cpu"))
    Path(answers, str(RANK)).write_text(f"{ended} {result.made}")


if __name__ == "__main__":
    main(*sys.argv[1:])
