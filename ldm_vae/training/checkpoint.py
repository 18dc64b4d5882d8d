"""Atomic checkpoints: written to a temporary folder, hashed, fsynced, renamed. Tensors as safetensors, no pickle.

A checkpoint is a folder `step-000001234` with the weights, their EMA and the optimizer state of every module as
safetensors, `state.json`, and `MANIFEST.json` with a checksum of each (see `files`). Nothing in it is ever rewritten.
A run resumes from the newest checkpoint that verifies.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_vae.errors import DamagedFile, UserError
from ldm_vae.files import (
    check_model_folder,
    published_directory,
    remove_directory,
    remove_leftovers,
    system_errors_explained,
    vanished,
    verify_checksums,
    write_checksums,
    write_json,
)

STATE = "state.json"


@dataclass
class Checkpoint:
    """The complete state of a run at a step. `tensors`: file stem -> name -> tensor. `state`: JSON-able."""

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Publish a checkpoint in `folder`, then remove all but the newest `keep` (at least 2).

    Raises:
        UserError: a tensor is not finite, the disk is full, or the folder has become unwritable or has vanished. The
            earlier checkpoints stay.
    """
    _refuse_what_is_not_finite(checkpoint)
    final = folder / f"step-{checkpoint.step:09d}"
    with system_errors_explained(folder, "earlier checkpoints are intact, and the same command continues from them"):
        if not folder.is_dir():
            raise vanished()
        remove_leftovers(folder)  # before writing, since the new one may need their space
        with published_directory(final) as temporary:
            for stem, tensors in checkpoint.tensors.items():
                contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
                save_file(contiguous, temporary / f"{stem}.safetensors")
            write_json(temporary / STATE, {"step": checkpoint.step, **checkpoint.state})
            write_checksums(temporary)
        for old in sorted(folder.glob("step-*"))[: -max(2, keep)]:
            remove_directory(old)
    return final


def _refuse_what_is_not_finite(checkpoint: Checkpoint) -> None:
    for stem, tensors in checkpoint.tensors.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise UserError(
                    f"step {checkpoint.step}: {stem} tensor {name!r} is not finite, so nothing was saved; "
                    "resume from the last checkpoint with a lower training.learning_rate"
                )


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not.

    A damaged checkpoint is renamed: its files are kept, it is not counted as a checkpoint, and it is not tried again.

    Raises:
        UserError: there are checkpoints but none verifies, or one has a newer format.
    """
    damaged: dict[Path, str] = {}
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify_checksums(path)
        except DamagedFile as error:
            damaged[path] = error.what
        else:
            return path, [_set_aside(path, problem) for path, problem in damaged.items()]
    if damaged:
        raise UserError(
            f"{folder}: none of the checkpoints can be used ({'; '.join(f'{p.name}: {w}' for p, w in damaged.items())}"
            "); bring back one of them from a copy, or remove them to start again"
        )
    return None, []


def _set_aside(path: Path, problem: str) -> str:
    aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
    with system_errors_explained(path, "make the folder writable and run the same command again"):
        os.rename(path, aside)
    return f"{path}: {problem}; it is passed over, and is now called {aside.name}"


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a verified checkpoint, tensors on the CPU. Raises: UserError if its content is not that of a checkpoint."""
    check_model_folder(path)
    try:
        state = dict(json.loads((path / STATE).read_text()))
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return Checkpoint(step=state.pop("step"), tensors=tensors, state=state)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path}: is not a checkpoint ({type(error).__name__}: {error}); remove it") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": tensor for index, values in state.items() for name, tensor in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. The optimizer keeps its hyperparameters.

    Moments get the memory format of their parameters. The fused kernels read all of them in storage order, so they
    would silently apply the moments of a channels_last weight to the wrong elements.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
