"""Power-function averages of the U-Net's weights, updated in training and stored at intervals.

Karras et al. 2024 (EDM2, arXiv:2312.02696), section 3.1. After t steps the average weights the weights of step tau by
the profile tau^gamma. Its standard deviation is a fixed share `sigma_rel` of the run so far, called its length. Names
as in EDM2: sigma_rel (std), gamma (exp), beta. `posthoc_ema` makes averages of other lengths from the stored ones.

The folder `snapshots/` of a run has one safetensors file for each 5 % of the run, with the averages of every length in
half precision. Its metadata holds the format version, step, lengths and a checksum for each length. Running averages
are float32 and part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json, write_atomically
from ldm_vae.training.trainer import Engine

FOLDER = "snapshots"
METADATA = "snapshot"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class EmaConfig:
    """Power-function averages, in addition to the exponential one of previews and the exported pipeline.

    Attributes:
        lengths: sigma_rel of each, the width of its profile as a share of the run so far. Two are enough to make any
            other length.
        snapshots: number of files over the whole run, each of two bytes per parameter and length; 0: no such averages.
    """

    lengths: tuple[float, ...] = (0.05, 0.10)
    snapshots: int = 20

    def __post_init__(self) -> None:
        if self.snapshots < 0:
            raise UserError(f"ema.snapshots: {self.snapshots} is below 0; 0 stores none")
        if self.snapshots and (not self.lengths or len(set(self.lengths)) < len(self.lengths)):
            raise UserError(f"ema.lengths: {list(self.lengths)} must be different lengths, at least one")
        for length in self.lengths:
            check_sigma_rel(length, "ema.lengths")


def check_sigma_rel(sigma_rel: float, where: str) -> None:
    """Raises: UserError for a length outside the range of power-function averages."""
    try:
        std_to_exp(sigma_rel)
    except ValueError:
        raise UserError(
            f"{where}: {sigma_rel} is not the length of an average; give a share of the run, 0.01 to 0.28"
        ) from None


def std_to_exp(sigma_rel: float) -> float:
    """gamma of the profile with standard deviation `sigma_rel`, in units of the run so far (EDM2, algorithm 2).

    The root of sigma_rel^2 = (gamma + 1) (gamma + 2)^-2 (gamma + 3)^-1, eq. 123. Raises: ValueError for sigma_rel
    outside (0, 0.28]; that of the plain mean is 0.289.
    """
    if not 0 < sigma_rel <= 0.28:
        raise ValueError(f"EMA length {sigma_rel} is outside 0 to 0.28")
    precision = sigma_rel**-2
    return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())


def power_function_beta(step: int, gamma: float) -> float:
    """beta = (1 - 1 / t)^(gamma + 1) of update t = step + 1: the weight of the average before it (EDM2, eq. 127)."""
    return (1 - 1 / (step + 1)) ** (gamma + 1)


class PowerFunctionEma:
    """The power-function average of a module's parameters at one length."""

    def __init__(self, module: nn.Module, sigma_rel: float) -> None:
        self.sigma_rel = sigma_rel
        self.gamma = std_to_exp(sigma_rel)
        self.tensors: dict[str, Tensor] = {}
        self._module = module

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move toward the current weights; `step` counts finished optimizer steps from 0, where it is a copy."""
        if not self.tensors:  # a checkpoint without this average starts it with the current weights
            self.load({name: parameter.detach() for name, parameter in self._module.named_parameters()})
        weights = [parameter.detach() for parameter in self._module.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - power_function_beta(step, self.gamma))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the average to `tensors`, copied to the parameters' device and memory format."""
        parameters = self._module.named_parameters()
        self.tensors = {name: torch.empty_like(p, requires_grad=False).copy_(tensors[name]) for name, p in parameters}


class EmaSnapshots:
    """The averages of a running training, and the files that it has written."""

    def __init__(self, config: EmaConfig, module: nn.Module, folder: Path | None) -> None:
        """`folder`: folder for the files; None writes none, as in a dry run."""
        self.config = config
        self.emas = [PowerFunctionEma(module, length) for length in config.lengths] if config.snapshots else []
        self.folder = folder
        self.written: list[int] = []

    def update(self, step: int, engine: Engine) -> None:
        """Update after optimizer step `step`, counted from 0; writes a file if it is due."""
        for ema in self.emas:
            ema.update(step)
        finished, count = step + 1, self.config.snapshots
        if self.emas and finished * count // engine.steps > step * count // engine.steps:
            self.written.append(finished)
            if self.folder is not None and engine.accelerator.is_main_process:
                self._write(self.folder, finished)

    def _write(self, folder: Path, step: int) -> None:
        """Publish the file of `step`; remove later files of an interrupted attempt."""
        values: dict[str, Tensor] = {}
        record: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "checksums": {}}
        for ema in self.emas:
            halves = {name: tensor.half().cpu().contiguous() for name, tensor in ema.tensors.items()}
            values |= {f"{ema.sigma_rel}/{name}": tensor for name, tensor in halves.items()}
            record["checksums"][str(ema.sigma_rel)] = tensors_checksum(halves)
        metadata = {METADATA: canonical_json(record)}
        try:
            write_atomically(folder / snapshot_name(step), lambda path: save_file(values, path, metadata))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder}: a snapshot cannot be written ({error}); make room, or set ema.snapshots=0 in a new run"
            ) from error
        for path in set(folder.glob("*.safetensors")) - {folder / snapshot_name(number) for number in self.written}:
            path.unlink()

    def state_dict(self) -> dict[str, Any]:
        return {"written": self.written}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {f"unet-power-{ema.sigma_rel}": ema.tensors for ema in self.emas}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Averages that are not in the checkpoint start with its weights."""
        self.written = list(state.get("written", []))
        for ema in self.emas:
            saved = tensors.get(f"unet-power-{ema.sigma_rel}")
            if saved is not None:
                ema.load(saved)


def snapshot_name(step: int) -> str:
    return f"step-{step:09d}.safetensors"


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """xxh3_128, 32 hex digits, of names, shapes and half-precision bytes in the order of the names."""
    import xxhash

    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
