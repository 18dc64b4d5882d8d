"""Power-function averages of the U-Net's weights, stored now and then, so that the length is chosen after training.

Owns the folder `snapshots/` of a run: one safetensors file each 5 % of it, which holds the averages of every length in
half precision, and in its metadata the format version, step, lengths and a checksum for each length. The mathematics is
`training.ema`'s; running averages are float32 and part of the checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json, check_tensor_file, write_atomically
from ldm_vae.training.trainer import Engine

FOLDER = "snapshots"
METADATA = "snapshot"
FORMAT_VERSION = 1
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
            check_sigma_rel(length, "ema.lengths")


def check_sigma_rel(length: float, where: str) -> None:
    """Raises: UserError for a length that no power-function average has."""
    try:
        std_to_exp(length)
    except ValueError:
        raise UserError(
            f"{where}: {length} is no length of an average; give a share of the run, 0.01 to 0.28"
        ) from None


class EmaSnapshots:
    """The averages of a run that goes on, and which files it has written."""

    def __init__(self, config: EmaConfig, module: nn.Module, folder: Path | None) -> None:
        """`folder`: where the files go; None writes none, as in a dry run."""
        self.config = config
        self.emas = [PowerFunctionEma(module, length) for length in config.lengths] if config.snapshots else []
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
        values: dict[str, Tensor] = {}
        record: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "checksums": {}}
        for ema in self.emas:
            halves = {name: tensor.half().cpu().contiguous() for name, tensor in ema.tensors.items()}
            values |= {f"{ema.length}/{name}": tensor for name, tensor in halves.items()}
            record["checksums"][str(ema.length)] = tensors_checksum(halves)
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
        return {f"unet-power-{ema.length}": ema.tensors for ema in self.emas}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Averages that the checkpoint does not have begin with the weights that it has."""
        self.written = list(state.get("written", []))
        for ema in self.emas:
            saved = tensors.get(f"unet-power-{ema.length}")
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


@dataclass(frozen=True)
class PosthocEma:
    """A synthesised average: its weights by parameter name, float32, and what is left of its profile (0: exact)."""

    step: int
    length: float
    weights: dict[str, Tensor]
    left: float


def synthesize(run: str | Path, length: float, step: int | None = None) -> PosthocEma:
    """The power-function average of any length after `step` steps, from what a run has stored.

    Args:
        run: A run directory of `train-diffusion`.
        length: sigma_rel; between and near the stored lengths it is nearly exact.
        step: Of a snapshot; None: the last one.

    Raises:
        UserError: no snapshots, a damaged one, an impossible length, or a step without a snapshot.
    """
    check_sigma_rel(length, "length")
    stored = stored_averages(Path(run) / FOLDER)
    steps = sorted({number for number, _ in stored})
    step = steps[-1] if step is None else step
    if step not in steps:
        near = min(steps, key=lambda number: abs(number - step))
        raise UserError(f"{run}: no snapshot of step {step}; {near} is the nearest of {len(steps)}")
    stored = {key: path for key, path in stored.items() if key[0] <= step}
    coefficients, left = solve_posthoc_coefficients(list(stored), (step, length))
    weights: dict[str, Tensor] = {}
    for coefficient, (_, source), path in zip(coefficients, stored, stored.values()):
        if abs(coefficient) < NEGLIGIBLE:
            continue
        for name, tensor in read_average(path, source).items():
            values = tensor.float() * coefficient
            weights[name] = weights[name].add_(values) if name in weights else values
    return PosthocEma(step, length, weights, left)


def read_average(path: Path, length: float) -> dict[str, Tensor]:
    """The average of one of a file's lengths, by parameter name, float16. Raises: UserError when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            names = [key for key in file.keys() if key.startswith(f"{length}/")]  # noqa: SIM118 - no mapping
            tensors = {name.split("/", 1)[1]: file.get_tensor(name) for name in names}
            expected = _record(file)["checksums"][str(length)]
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise _no_snapshot(path, str(error)) from error
    if tensors_checksum(tensors) != expected:
        raise _no_snapshot(path, "its checksum is another one")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise _no_snapshot(path, "it is not finite in half precision")
    return tensors


def stored_averages(folder: Path) -> dict[tuple[int, float], Path]:
    """(step, length) -> file of each stored average, in the order of steps. Raises: UserError where there are none."""
    found: dict[tuple[int, float], Path] = {}
    for path in sorted(folder.glob("step-*.safetensors")):
        check_tensor_file(path)
        try:
            with safe_open(path, "pt") as file:
                record = _record(file)
            if (version := record["format_version"]) > FORMAT_VERSION:
                raise UserError(
                    f"{path}: has format version {version}, this program reads {FORMAT_VERSION}; update ldm_vae"
                )
            if version != FORMAT_VERSION or path.name != snapshot_name(record["step"]):
                raise ValueError(f"is of step {record['step']} and format version {version}")
            found |= {(record["step"], float(length)): path for length in record["checksums"]}
        except UserError:
            raise
        except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise _no_snapshot(path, str(error)) from error
    if not found:
        raise UserError(f"{folder}: holds no snapshots; train with ema.snapshots above 0")
    return found


def _record(file: Any) -> dict[str, Any]:
    """What `_write` says about a file."""
    return dict(json.loads(file.metadata()[METADATA]))


def _no_snapshot(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: is no snapshot ({reason}); remove it, the others do without it")


@torch.no_grad()
def copy_to(module: nn.Module, average: PosthocEma) -> None:
    """Give the module's parameters the averaged values. Raises: UserError when it is not the module of the run."""
    parameters = dict(module.named_parameters())
    if {name: p.shape for name, p in parameters.items()} != {name: t.shape for name, t in average.weights.items()}:
        raise UserError("snapshots: their weights are not those of this U-Net; give the run that holds both")
    for name, parameter in parameters.items():
        parameter.copy_(average.weights[name])


class PowerFunctionEma:
    """The power-function average of a module's parameters at one length. After t steps its profile is tau^gamma."""

    def __init__(self, module: nn.Module, length: float) -> None:
        self.length = length
        self.gamma = std_to_exp(length)
        self.tensors: dict[str, torch.Tensor] = {}
        self._module = module

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the present weights; `step` counts finished optimizer steps from 0, at which it is a copy."""
        if not self.tensors:  # also of a checkpoint that has no such average: it begins with the weights there
            self.load({name: parameter.detach() for name, parameter in self._module.named_parameters()})
        weights = [parameter.detach() for parameter in self._module.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - power_function_beta(step, self.gamma))

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over `tensors`, copied to the parameters' device and memory format."""
        parameters = self._module.named_parameters()
        self.tensors = {name: torch.empty_like(p, requires_grad=False).copy_(tensors[name]) for name, p in parameters}


def power_function_beta(step: int, gamma: float) -> float:
    """beta = (1 - 1 / t)^(gamma + 1) of update t = step + 1: what of the average stays."""
    return (1 - 1 / (step + 1)) ** (gamma + 1)


def std_to_exp(length: float) -> float:
    """The exponent whose profile has the standard deviation `length`, in units of the run so far.

    Raises: ValueError for a length outside (0, 0.28]: that of the plain mean is 0.289.
    """
    if not 0 < length <= 0.28:
        raise ValueError(f"EMA length {length} is outside 0 to 0.28")
    precision = length**-2  # (gamma + 2)^2 (gamma + 3) / (gamma + 1)
    return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())


def solve_posthoc_coefficients(
    stored: Sequence[tuple[int, float]], target: tuple[int, float]
) -> tuple[list[float], float]:
    """How stored averages make up another one: least squares on their profiles.

    Args:
        stored: (step, length) of each stored average, steps from 1.
        target: (step, length) that is wanted; between two stored steps nothing fits well.

    Returns:
        The coefficient of each stored average; they add up to 1. And what is left of the wanted profile, as a share of
        its norm: 0 where it is met exactly.
    """
    steps = np.array([step for step, _ in [*stored, target]], np.float64)
    gammas = np.array([std_to_exp(length) for _, length in [*stored, target]])
    products = power_function_correlations(steps, gammas)
    inner, wanted = products[:-1, :-1], products[:-1, -1]
    solved = np.linalg.lstsq(inner, np.stack([wanted, np.ones(len(wanted))], axis=1), rcond=1e-13)[0]
    plain, unit = solved.T
    found = plain + unit * (1 - plain.sum()) / unit.sum()  # the Lagrange multiplier of "adds up to 1"
    left = products[-1, -1] - 2 * found @ wanted + found @ inner @ found
    return found.tolist(), math.sqrt(max(0.0, left) / products[-1, -1])


def power_function_correlations(steps: np.ndarray, gammas: np.ndarray) -> np.ndarray:
    """Integrals of the products of all pairs of profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]."""
    t, u, g, h = steps[:, None], steps[None], gammas[:, None], gammas[None]
    ratio = np.where(t < u, (t / u) ** h, (u / t) ** g)
    return (g + 1) * (h + 1) * ratio / ((g + h + 1) * np.maximum(t, u))
