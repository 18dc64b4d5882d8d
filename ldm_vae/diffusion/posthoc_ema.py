"""`ldm-vae model ema`: post-hoc EMA, the length of the U-Net's average chosen after training (EDM2, section 3.2).

    snapshots of a run -> solve_posthoc_coefficients -> synthesize: weights of any length
                       -> copy_to a U-Net -> validation loss and KID, or a pipeline

`power_function_ema` keeps and stores the averages while training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm_vae import config as configuration
from ldm_vae.data.sources import DataConfig
from ldm_vae.diffusion import flow
from ldm_vae.diffusion.fid import KID_ENLARGED, SampleKid, make_sample_kid
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.power_function_ema import (
    FOLDER,
    FORMAT_VERSION,
    METADATA,
    check_sigma_rel,
    snapshot_name,
    std_to_exp,
    tensors_checksum,
)
from ldm_vae.diffusion.training import HELD_OUT_LATENTS, TrainDiffusionConfig, open_latents
from ldm_vae.diffusion.validation import stack_samples, validation_losses
from ldm_vae.errors import UserError
from ldm_vae.files import check_tensor_file, published_directory
from ldm_vae.paths import PIPELINE
from ldm_vae.runtime import compute_device
from ldm_vae.utils.progress import begin, beside, end, end_dry_run, say
from ldm_vae.utils.text import pluralize

NEGLIGIBLE = 1e-6
"""Files with a coefficient below this are not read."""
LARGE_RESIDUAL = 0.05
"""A residual of the profile above this is reported."""


@dataclass(frozen=True)
class PosthocEmaConfig:
    """`ldm-vae model ema`.

    The length is the width of the average as a share of the run: 0.05 is a short average, 0.15 a long one. Several
    lengths are compared by their held-out flow loss, and with `count` also by the KID of samples to the held-out
    images. One length with `output` writes the pipeline with this average. An early `step` gives the weaker U-Net that
    autoguidance needs.

      ldm-vae model ema runs/diffusion lengths=0.03,0.05,0.07,0.1,0.15
      ldm-vae model ema runs/diffusion lengths=0.05,0.1 count=1000 data=photos
      ldm-vae model ema runs/diffusion lengths=0.07 output=runs/diffusion-0.07

    Attributes:
        model: A finished run of `train-diffusion`.
        lengths: One or more lengths from 0.01 to 0.28.
        output: Folder for the pipeline with this average; one length only. None: compare.
        step: The average after this step; None: the last one.
        kid: Number of samples for a comparison by KID; 0: compare by the validation loss only.
        images: Folder of the encoded images, for the KID; None: kid.data of the run.
        inception_weights: File of weights for the KID; None: that of the run, or a download.
        device: auto, cpu, cuda, cuda:1, ...
    """

    model: str = "???"
    lengths: tuple[float, ...] = ()
    output: str | None = None
    step: int | None = None
    kid: int = 0
    images: str | None = None
    inception_weights: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.lengths:
            raise UserError("lengths: none is given; give one or more, 0.01 to 0.28")
        for length in self.lengths:
            check_sigma_rel(length, "lengths")
        if self.output and len(self.lengths) > 1:
            raise UserError(f"output: {len(self.lengths)} lengths were given; give the one of the pipeline to write")
        if not self.kid and (self.images or self.inception_weights):
            raise UserError("images, inception_weights: have no effect without kid; leave them out")


@dataclass(frozen=True)
class EmaMeasurement:
    """One average of the U-Net, measured on held-out images.

    Attributes:
        length: sigma_rel; None: the run's own exponential average (training.ema_decay).
        step: Number of steps of training.
        metrics: `held_out/flow`, the validation loss, and the metrics of `SampleKid` if requested.
        residual: Residual of the profile, which the snapshots cannot represent, as a share of its norm.
    """

    length: float | None
    step: int | None
    metrics: dict[str, float]
    residual: float = 0.0

    def sentence(self) -> str:
        name = (
            "the run's own average (training.ema_decay)"
            if self.length is None
            else f"length {self.length:g} after step {self.step}"
        )
        values = [f"held-out flow loss {self.metrics['held_out/flow']:.4f}"]
        values += [f"{key.removeprefix('samples/')} {value:.5f}"
                   for key, value in self.metrics.items()
                   if key.startswith("samples/") and key != KID_ENLARGED]  # fmt: skip
        return f"{name}: {', '.join(values)}{residual_warning(self.residual)}"


def posthoc_ema(config: PosthocEmaConfig, *, dry_run: bool = False) -> list[EmaMeasurement]:
    """Compare the lengths, printing a line each, and return the measurements; or write the pipeline of one length.

    `dry_run`: read the names of the snapshots and check the output only.

    Raises:
        UserError: no snapshots, a damaged one, an impossible length, nothing to compare by, or an output that exists.
    """
    pipeline = finished_pipeline(config.model)
    stored = stored_averages(Path(config.model) / FOLDER)
    lengths = ", ".join(f"{length:g}" for length in config.lengths)
    compared = f"and {pluralize(config.kid, 'sample')} each for KID" if config.kid else ""
    task = f"to {config.output}" if config.output else f"compared by the held-out loss {compared}".strip()
    begin("model ema", config.model, f"lengths {lengths} from {pluralize(len(stored), 'snapshot')}", task)
    if dry_run:
        if config.output is not None and Path(config.output).exists():
            raise UserError(f"{config.output}: exists; give a new folder")
        end_dry_run(config.output or config.model, "the time it takes was not measured")
        return []
    if config.output is not None:
        average = synthesize_ema(config.model, config.lengths[0], config.step)
        write_pipeline(pipeline, average, config.output)
        warning = residual_warning(average.residual)
        what = f"the pipeline, length {average.sigma_rel} after step {average.step}{warning}"
        words = ["ldm-vae", "generate", config.output, f"output={beside(config.output, 'samples')}"]
        end(config.output, what, words)
        return []
    device = compute_device(config.device)
    sample_kid = sample_kid_of(config) if config.kid else None
    held_out = HeldOutLoss(config.model, pipeline, device)

    def measure() -> dict[str, float]:
        metrics = {"held_out/flow": held_out.loss(pipeline.unet)}
        return metrics if sample_kid is None else metrics | sample_kid(pipeline.to(device))

    measured = [EmaMeasurement(None, None, measure())]
    say(measured[-1].sentence())
    for length in config.lengths:
        average = synthesize_ema(config.model, length, config.step)
        copy_to(pipeline.unet, average)
        measured.append(EmaMeasurement(length, average.step, measure(), average.residual))
        say(measured[-1].sentence())
    key = f"samples/kid@{config.kid}" if config.kid else "held_out/flow"
    best = min(measured[1:], key=lambda one: one.metrics[key])
    words = ["ldm-vae", "model", "ema", config.model, f"lengths={best.length:g}"]
    words += [f"step={config.step}"] if config.step is not None else []
    place = beside(config.model, f"ema{best.length:g}")
    by = "KID" if config.kid else "loss"
    end(config.model, f"the lowest {by} is that of length {best.length:g}", [*words, f"output={place}"])
    return measured


def residual_warning(residual: float) -> str:
    if residual <= LARGE_RESIDUAL:
        return ""
    return f"; {residual:.0%} of its profile cannot be represented by these snapshots"


def sample_kid_of(config: PosthocEmaConfig) -> SampleKid:
    """Compares samples with the images that the run held out."""
    run = read_run_config(config.model)
    data = DataConfig(source="folder", path=config.images) if config.images else run.kid.data
    weights = config.inception_weights or run.kid.inception_weights
    kid = replace(run.kid, samples=config.kid, data=data, inception_weights=weights)
    return make_sample_kid(kid, run.held_out)


# The average of any length from the stored ones.


@dataclass(frozen=True)
class PosthocEma:
    """A synthesized average: its weights by parameter name, float32, and the `residual` of its profile (0: exact)."""

    step: int
    sigma_rel: float
    weights: dict[str, Tensor]
    residual: float


def synthesize_ema(run: str | Path, sigma_rel: float, step: int | None = None) -> PosthocEma:
    """The power-function average of any length after `step` steps, from the snapshots of a run.

    Args:
        run: A run directory of `train-diffusion`.
        sigma_rel: The length; between and near the stored lengths it is nearly exact.
        step: Step of a snapshot; None: the last one.

    Raises:
        UserError: no snapshots, a damaged one, an impossible length, or a step without a snapshot.
    """
    check_sigma_rel(sigma_rel, "length")
    stored = stored_averages(Path(run) / FOLDER)
    steps = sorted({number for number, _ in stored})
    step = steps[-1] if step is None else step
    if step not in steps:
        near = min(steps, key=lambda number: abs(number - step))
        raise UserError(f"{run}: no snapshot of step {step}; {near} is the nearest of {len(steps)}")
    stored = {key: path for key, path in stored.items() if key[0] <= step}
    coefficients, residual = solve_posthoc_coefficients(list(stored), (step, sigma_rel))
    weights: dict[str, Tensor] = {}
    for coefficient, (_, length), path in zip(coefficients, stored, stored.values()):
        if abs(coefficient) < NEGLIGIBLE:
            continue
        for name, tensor in read_average(path, length).items():
            values = tensor.float() * coefficient
            weights[name] = weights[name].add_(values) if name in weights else values
    return PosthocEma(step, sigma_rel, weights, residual)


def solve_posthoc_coefficients(
    stored: Sequence[tuple[int, float]], target: tuple[int, float]
) -> tuple[list[float], float]:
    """The combination of stored averages for another average: least squares on their profiles (EDM2, algorithm 3).

    Args:
        stored: (step, sigma_rel) of each stored average, steps from 1.
        target: (step, sigma_rel) of the average to make; between two stored steps, the fit is poor.

    Returns:
        The coefficients of the stored averages, which add up to 1; and the residual of the target's profile as a share
        of its norm, 0 for an exact fit.
    """
    steps = np.array([step for step, _ in [*stored, target]], np.float64)
    gammas = np.array([std_to_exp(sigma_rel) for _, sigma_rel in [*stored, target]])
    products = power_function_correlations(steps, gammas)
    inner, right = products[:-1, :-1], products[:-1, -1]
    solved = np.linalg.lstsq(inner, np.stack([right, np.ones(len(right))], axis=1), rcond=1e-13)[0]
    plain, unit = solved.T
    found = plain + unit * (1 - plain.sum()) / unit.sum()  # the Lagrange multiplier of "adds up to 1"
    left = products[-1, -1] - 2 * found @ right + found @ inner @ found
    return found.tolist(), math.sqrt(max(0.0, left) / products[-1, -1])


def power_function_correlations(steps: np.ndarray, gammas: np.ndarray) -> np.ndarray:
    """Integrals of the products of all pairs of profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], eq. 151."""
    t, u, g, h = steps[:, None], steps[None], gammas[:, None], gammas[None]
    ratio = np.where(t < u, (t / u) ** h, (u / t) ** g)
    return (g + 1) * (h + 1) * ratio / ((g + h + 1) * np.maximum(t, u))


def read_average(path: Path, sigma_rel: float) -> dict[str, Tensor]:
    """The average of one of a file's lengths, by parameter name, float16. Raises: UserError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            names = [key for key in file.keys() if key.startswith(f"{sigma_rel}/")]  # noqa: SIM118 - no mapping
            tensors = {name.split("/", 1)[1]: file.get_tensor(name) for name in names}
            expected = _record(file)["checksums"][str(sigma_rel)]
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise _not_a_snapshot(path, str(error)) from error
    if tensors_checksum(tensors) != expected:
        raise _not_a_snapshot(path, "its checksum is another one")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise _not_a_snapshot(path, "it is not finite in half precision")
    return tensors


def stored_averages(folder: Path) -> dict[tuple[int, float], Path]:
    """(step, sigma_rel) -> file of each stored average, in the order of steps. Raises: UserError without any."""
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
                raise ValueError(f"has step {record['step']} and format version {version}")
            found |= {(record["step"], float(length)): path for length in record["checksums"]}
        except UserError:
            raise
        except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise _not_a_snapshot(path, str(error)) from error
    if not found:
        raise UserError(f"{folder}: holds no snapshots; train with ema.snapshots above 0")
    return found


def _record(file: Any) -> dict[str, Any]:
    """The metadata that `EmaSnapshots` wrote to a file."""
    return dict(json.loads(file.metadata()[METADATA]))


def _not_a_snapshot(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: is not a snapshot ({reason}); remove it, the others are sufficient")


# Uses of an average.


@torch.no_grad()
def copy_to(module: nn.Module, average: PosthocEma) -> None:
    """Copy the averaged values to the module's parameters. Raises: UserError for a module of another run."""
    parameters = dict(module.named_parameters())
    if {name: p.shape for name, p in parameters.items()} != {name: t.shape for name, t in average.weights.items()}:
        raise UserError("snapshots: their weights are not those of this U-Net; give the run that holds both")
    for name, parameter in parameters.items():
        parameter.copy_(average.weights[name])


def write_pipeline(pipeline: LatentDiffusionPipeline, average: PosthocEma, output: str | Path) -> None:
    """Write the pipeline with the averaged U-Net to `output`. Raises: UserError if it exists."""
    final = Path(output)
    if final.exists():
        raise UserError(f"{output}: exists; give a new folder")
    copy_to(pipeline.unet, average)
    with published_directory(final) as folder:
        pipeline.to("cpu").save_pretrained(folder)


def finished_pipeline(run: str | Path) -> LatentDiffusionPipeline:
    """The pipeline of a run directory, on the CPU. Raises: UserError if the run has not written it yet."""
    return LatentDiffusionPipeline.from_pretrained(PIPELINE.find(run), use_safetensors=True)


def read_run_config(run: str | Path) -> TrainDiffusionConfig:
    return configuration.load(TrainDiffusionConfig, Path(run) / "config.yaml")


class HeldOutLoss:
    """The validation loss on a run's held-out latents, which are read once."""

    def __init__(self, run: str | Path, pipeline: LatentDiffusionPipeline, device: torch.device) -> None:
        """Raises: UserError if the run held nothing out, or its latents do not exist any more."""
        config = read_run_config(run)
        _, held_out = open_latents(config)
        if held_out is None:
            raise UserError(f"{run}: held no latents out, so nothing can be compared; give one length and an output")
        samples = stack_samples(held_out, HELD_OUT_LATENTS)
        self.latents: Tensor = pipeline.normalizer.normalize(samples["latent"].to(device))
        null = len(pipeline.labels)
        labels = torch.where(samples["label"] < 0, null, samples["label"]).to(device)
        self.labels = labels if null else None
        self.shift = config.shift or flow.resolution_shift(*self.latents.shape[1:])

    def loss(self, unet: nn.Module) -> float:
        """Mean over times and latents, as `train-diffusion` logs it."""
        losses = validation_losses(unet.to(self.latents.device), self.latents, self.labels, self.shift)
        return sum(losses.values()) / len(losses)
