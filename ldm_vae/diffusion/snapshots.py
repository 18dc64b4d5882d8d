"""Power-function averages of the U-Net's weights, stored now and then, so that the length is chosen after training.

Owns the folder `snapshots/` of a run: one safetensors file each 5 % of it, which holds the averages of every length in
half precision. The mathematics is `training.ema`'s; running averages are float32 and part of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json, write_atomically
from ldm_vae.training.ema import PowerEma, combination, gamma_of
from ldm_vae.training.engine import Engine

FOLDER = "snapshots"
METADATA = "snapshot"
NEGLIGIBLE = 1e-6
"""A coefficient below this is not worth reading a file for."""


@dataclass(frozen=True)
class EmaConfig:
    """Power-function averages beside the exponential one that previews and the exported pipeline use.

    Attributes:
        lengths: sigma_rel of each, the width of its profile as a share of the run so far. Two make any other one.
        snapshots: files over the whole run, each of two bytes per parameter and length; 0: no such averages.
    """

    lengths: tuple[float, ...] = (0.05, 0.10)
    snapshots: int = 20

    def __post_init__(self) -> None:
        if self.snapshots < 0:
            raise UserError(f"ema.snapshots: {self.snapshots} is below 0; 0 stores none")
        if self.snapshots and (not self.lengths or len(set(self.lengths)) < len(self.lengths)):
            raise UserError(f"ema.lengths: {list(self.lengths)} must be different lengths, at least one")
        for length in self.lengths:
            check_length(length, "ema.lengths")


def check_length(length: float, where: str) -> None:
    """Raises: UserError for a length that no power-function average has."""
    try:
        gamma_of(length)
    except ValueError:
        raise UserError(
            f"{where}: {length} is no length of an average; give a share of the run, 0.01 to 0.28"
        ) from None


class Snapshots:
    """The averages of a run that goes on, and which files it has written."""

    def __init__(self, config: EmaConfig, module: nn.Module, folder: Path | None) -> None:
        """`folder`: where the files go; None writes none, as in a dry run."""
        self.config = config
        self.emas = [PowerEma(module, length) for length in config.lengths] if config.snapshots else []
        self.folder = folder
        self.written: list[int] = []

    def update(self, step: int, engine: Engine) -> None:
        """After the optimizer's step number `step`, counted from 0; writes a file when one is due."""
        for ema in self.emas:
            ema.update(step)
        finished, count = step + 1, self.config.snapshots
        if self.emas and finished * count // engine.steps > step * count // engine.steps:
            self.written.append(finished)
            if self.folder is not None and engine.accelerator.is_main_process:
                self._write(self.folder, finished)

    def _write(self, folder: Path, step: int) -> None:
        """Publish the file of `step`; remove what an attempt left that was broken off and continued otherwise."""
        values = {
            f"{ema.length}/{name}": tensor.half().cpu().contiguous()
            for ema in self.emas
            for name, tensor in ema.tensors.items()
        }
        metadata = {METADATA: canonical_json({"step": step, "lengths": [ema.length for ema in self.emas]})}
        try:
            write_atomically(folder / file_name(step), lambda path: save_file(values, path, metadata))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder}: a snapshot cannot be written ({error}); make room, or set ema.snapshots=0 in a new run"
            ) from error
        for path in set(folder.glob("*.safetensors")) - {folder / file_name(number) for number in self.written}:
            path.unlink()

    def state_dict(self) -> dict[str, Any]:
        return {"written": self.written}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {f"unet-power-{ema.length}": ema.tensors for ema in self.emas}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Averages that the checkpoint does not have begin with the weights that it has."""
        self.written = list(state.get("written", []))
        for ema in self.emas:
            saved = tensors.get(f"unet-power-{ema.length}")
            if saved is not None:
                ema.load(saved)


def file_name(step: int) -> str:
    return f"step-{step:09d}.safetensors"


@dataclass(frozen=True)
class Average:
    """A synthesised average: its weights by parameter name, float32, and what is left of its profile (0: exact)."""

    step: int
    length: float
    weights: dict[str, Tensor]
    left: float


def synthesise(run: str | Path, length: float, step: int | None = None) -> Average:
    """The power-function average of any length after `step` steps, from what a run has stored.

    Args:
        run: A run directory of `train-diffusion`.
        length: sigma_rel; between and near the stored lengths it is nearly exact.
        step: Of a snapshot; None: the last one.

    Raises:
        UserError: no snapshots, an impossible length, or a step without a snapshot.
    """
    check_length(length, "length")
    stored = stored_averages(Path(run) / FOLDER)
    steps = sorted({number for number, _ in stored})
    step = steps[-1] if step is None else step
    if step not in steps:
        near = min(steps, key=lambda number: abs(number - step))
        raise UserError(f"{run}: no snapshot of step {step}; {near} is the nearest of {len(steps)}")
    stored = {key: path for key, path in stored.items() if key[0] <= step}
    coefficients, left = combination(list(stored), (step, length))
    weights: dict[str, Tensor] = {}
    for coefficient, (_, source), path in zip(coefficients, stored, stored.values()):
        if abs(coefficient) < NEGLIGIBLE:
            continue
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                if key.startswith(f"{source}/"):
                    name = key.split("/", 1)[1]
                    values = file.get_tensor(key).float() * coefficient
                    weights[name] = weights[name].add_(values) if name in weights else values
    return Average(step, length, weights, left)


def stored_averages(folder: Path) -> dict[tuple[int, float], Path]:
    """(step, length) -> file of each stored average, in the order of steps. Raises: UserError where there are none."""
    found: dict[tuple[int, float], Path] = {}
    for path in sorted(folder.glob("step-*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                record = json.loads(file.metadata()[METADATA])
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path}: is no snapshot ({error}); remove it, the others do without it") from error
        found |= {(int(record["step"]), float(length)): path for length in record["lengths"]}
    if not found:
        raise UserError(f"{folder}: holds no snapshots; train with ema.snapshots above 0")
    return found


@torch.no_grad()
def put_into(module: nn.Module, average: Average) -> None:
    """Give the module's parameters the averaged values. Raises: UserError when it is not the module of the run."""
    parameters = dict(module.named_parameters())
    if {name: p.shape for name, p in parameters.items()} != {name: t.shape for name, t in average.weights.items()}:
        raise UserError("snapshots: their weights are not those of this U-Net; give the run that holds both")
    for name, parameter in parameters.items():
        parameter.copy_(average.weights[name])
