"""Checkpoints that are complete or absent: written beside, hashed, fsynced, renamed. Tensors as safetensors, no pickle.

A checkpoint is a folder `step-000001234` with the weights, their EMA and the optimizer state of every module as
safetensors, `state.json`, and `MANIFEST.json` with a checksum of each. Nothing in it is ever rewritten; the newest one
that verifies is the one to resume from.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_vae.errors import UserError
from ldm_vae.files import checksum, publish_directory, temporary_directory, write_json

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"


@dataclass
class Checkpoint:
    """Everything that a run is at a step. `tensors`: file stem -> name -> tensor. `state`: JSON-able."""

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Publish a checkpoint in `folder`, then remove all but the newest `keep` (at least 2) others.

    Raises:
        UserError: when a tensor is not finite (the run's earlier checkpoints stay), or the disk is full.
    """
    for stem, tensors in checkpoint.tensors.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise UserError(
                    f"step {checkpoint.step}: {stem} tensor {name!r} is not finite, so nothing was saved; "
                    "resume from the last checkpoint with a lower training.learning_rate"
                )
    final = folder / f"step-{checkpoint.step:09d}"
    temporary = temporary_directory(final)
    try:
        for stem, tensors in checkpoint.tensors.items():
            contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary / f"{stem}.safetensors")
        write_json(temporary / "state.json", {"step": checkpoint.step, **checkpoint.state})
        files = {path.name: checksum(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
        publish_directory(temporary, final)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if "No space left" in str(error):
            raise UserError(f"{folder}: no space left on the device; earlier checkpoints are intact") from error
        raise
    for old in sorted(folder.glob("step-*"))[: -max(2, keep)]:
        shutil.rmtree(old)
    for leftover in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def verify(path: Path) -> str | None:
    """None when every file of the checkpoint is as it was written, else what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format_version"] > FORMAT_VERSION:
            return f"has format version {manifest['format_version']}, newer than {FORMAT_VERSION}; update ldm_vae"
        for name, expected in manifest["files"].items():
            if checksum(path / name) != expected:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not."""
    problems: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = verify(path)
        if problem is None:
            return path, problems
        problems.append(f"{path}: {problem}; it is passed over")
    return None, problems


def load(path: Path) -> Checkpoint:
    """Read a checkpoint that was verified. Tensors come to the CPU."""
    state = json.loads((path / "state.json").read_text())
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(step=state.pop("step"), tensors=tensors, state=state)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": tensor for index, values in state.items() for name, tensor in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; hyper-parameters stay those of the optimizer.

    Moments get the memory format of their parameters: the fused kernels walk all of them in storage order, so the
    moments of a channels_last weight would be applied to the wrong elements, without a word.
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
