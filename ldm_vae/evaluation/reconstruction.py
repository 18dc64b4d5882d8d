"""How well an autoencoder reconstructs: the protocol, the measurement, the result folder.

Every figure is of images after an 8-bit round trip, averaged over images, beside the linear baseline on the
same pixels. The metrics themselves are in `metrics.py`, the pictures to look at in `examples.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.autoencoder.fingerprint import fingerprint
from ldm_vae.autoencoder.interface import decode, encode_moments
from ldm_vae.autoencoder.models import downsampling, latent_channels, load_autoencoder
from ldm_vae.autoencoder.perceptual import LPIPS, Backbone
from ldm_vae.autoencoder.rate import bits_per_dimension, bits_per_pixel, kl_divergence
from ldm_vae.data import pixels
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.sources import DataConfig, ImageSource, open_source
from ldm_vae.data.split import Part, subset
from ldm_vae.data.transforms import cover_crop, preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation import metrics
from ldm_vae.evaluation.examples import Example, grid, make_example, save_examples
from ldm_vae.evaluation.klt import BlockKLT, fit_klt
from ldm_vae.files import write_json, write_text
from ldm_vae.random import generator

RESULTS = "results.json"
MAY_CHANGE = ("output", "batch", "device")
"""Settings that do not change a result."""


@dataclass(frozen=True)
class EvaluateConfig:
    """`ldm-vae evaluate`.

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the results.
        part: held_out (what training never saw), train or all.
        resolution: side of the centre crop in pixels, a multiple of the downsampling.
        count: at most so many images, evenly spread over the part; null: all.
        baseline_images: at most so many training images fit the linear baseline.
        perceptual_net: the LPIPS network; null: no LPIPS.
        perceptual_weights: a local safetensors file of its backbone; null: torchvision's download.
        batch: images per forward pass.
        examples: images kept to look at.
        seed: of the posterior samples.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    part: Part = "held_out"
    resolution: int = 512
    count: int | None = None
    baseline_images: int = 128
    perceptual_net: Backbone | None = None
    perceptual_weights: str | None = None
    batch: int = 4
    examples: int = 6
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("resolution", "batch", "baseline_images", "examples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not above 0")
        if self.count is not None and self.count < 1:
            raise UserError(f"count: {self.count} is not above 0; leave it out for all images")
        if self.perceptual_weights is not None and self.perceptual_net is None:
            raise UserError("perceptual_weights: has no effect without perceptual_net; set that too")


def evaluate(config: EvaluateConfig, overwrite: bool = False) -> dict[str, Any]:
    """Measure, write the result folder, return the content of `results.json`.

    A folder that holds the finished result of these settings is read, not redone.

    Raises:
        UserError: the folder holds a result of other settings or of another autoencoder, and not `overwrite`.
    """
    started = time.time()
    device = compute_device(config.device)
    autoencoder = load_autoencoder(config.autoencoder).to(device)
    _check_resolution(config.resolution, downsampling(autoencoder))
    identity = fingerprint(autoencoder)
    output = Path(config.output)
    finished = _finished_result(output, config, identity, overwrite)
    if finished is not None:
        return finished
    evaluated, fitted = _parts(config)
    klt = _fit_baseline(fitted, config, downsampling(autoencoder))
    lpips = None
    if config.perceptual_net:
        lpips = LPIPS(config.perceptual_net, config.perceptual_weights).to(device)
    measured = _measure(autoencoder, klt, lpips, evaluated, config, device)
    if not measured.ids:
        reasons = ", ".join(sorted({reason for _, reason in measured.rejected}))
        raise UserError(f"{config.output}: none of the {len(evaluated)} images could be read ({reasons})")
    results = {
        "format_version": 1,
        "autoencoder": _description(autoencoder, identity),
        "protocol": _protocol(config, evaluated, fitted, len(measured.ids)),
        **measured.summary(autoencoder),
        "examples": save_examples(output / "examples", measured.examples),
        "rejected": [{"id": name, "reason": reason} for name, reason in measured.rejected],
        "images": measured.per_image(),
        "config": configuration.to_dict(config),
    }
    grid(measured.examples).save(output / "grid.png")
    write_text(output / "results.md", markdown(results))
    write_json(output / RESULTS, results)
    provenance.write_run_record(output, None, started, time.time() - started, images=len(measured.ids))
    return results


class Measurements:
    """Values per image, collected batch by batch: `rows[row][metric]` and `nats` have one entry per image."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.rows: dict[str, dict[str, list[float]]] = {}
        self.nats: list[float] = []
        self.examples: list[Example] = []
        self.rejected: list[tuple[str, str]] = []

    def add(self, ids: list[str], nats: Tensor, values: dict[str, dict[str, Tensor]]) -> None:
        self.ids += ids
        self.nats += nats.tolist()
        for row, named in values.items():
            for metric, tensor in named.items():
                self.rows.setdefault(row, {}).setdefault(metric, []).extend(tensor.tolist())

    def summary(self, autoencoder: Any) -> dict[str, Any]:
        """Means with 95 % bootstrap intervals; the paired gain over the baseline; the rate in three units."""
        mean_row, *_, linear_row = self.rows
        gain = np.subtract(self.rows[mean_row]["psnr"], self.rows[linear_row]["psnr"])
        nats = float(np.mean(self.nats))
        channels, factor = latent_channels(autoencoder), downsampling(autoencoder)
        return {
            "rows": [
                {"name": row, "metrics": {metric: _interval(values) for metric, values in named.items()}}
                for row, named in self.rows.items()
            ],
            "gain_over_linear_db": _interval(gain),
            "rate": {
                "nats_per_dim": nats,
                "bits_per_dim": bits_per_dimension(nats),
                "bits_per_pixel": bits_per_pixel(nats, channels, factor),
            },
        }

    def per_image(self) -> list[dict[str, Any]]:
        return [
            {
                "id": name,
                "nats_per_dim": self.nats[i],
                **{row: {metric: values[i] for metric, values in named.items()} for row, named in self.rows.items()},
            }
            for i, name in enumerate(self.ids)
        ]


def read_batches(
    source: ImageSource,
    indices: list[int],
    batch: int,
    resolution: int,
    rejected: list[tuple[str, str]],
    task: str,
) -> Iterator[tuple[list[int], Tensor]]:
    """Source indices and centre crops (n, 3, resolution, resolution) in [-1, 1], with a progress bar.

    Images that cannot be decoded are appended to `rejected` as (id, reason) and left out.
    """
    from tqdm import tqdm

    found: list[int] = []
    images: list[Tensor] = []
    for position, index in enumerate(tqdm(indices, desc=task, unit="image", dynamic_ncols=True), start=1):
        try:
            crop = cover_crop(source.read(index), resolution)
        except ImageRejected as error:
            rejected.append((source.id(index), error.reason))
        else:
            found.append(index)
            images.append(pixels.from_uint8(torch.from_numpy(crop.copy()).permute(2, 0, 1)))
        if images and (len(images) == batch or position == len(indices)):
            yield found, torch.stack(images)
            found, images = [], []


def spread(count: int, wanted: int | None) -> list[int]:
    """`wanted` indices evenly spread over range(count); all of them for None."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, wanted).round()]


def compute_device(name: str) -> torch.device:
    """`auto` is CUDA where torch sees it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r} is no device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {name} was asked for, and torch sees no CUDA device; use device=auto")
    return device


def _measure(
    autoencoder: Any,
    klt: BlockKLT,
    lpips: LPIPS | None,
    source: ImageSource,
    config: EvaluateConfig,
    device: torch.device,
) -> Measurements:
    """Reconstruct and measure every image. The posterior noise of an image depends on its id only."""
    measured = Measurements()
    components = latent_channels(autoencoder)
    indices = spread(len(source), config.count)
    shown = {indices[i] for i in spread(len(indices), config.examples)}
    for found, batch in read_batches(source, indices, config.batch, config.resolution, measured.rejected, "evaluating"):
        images = batch.to(device)
        ids = [source.id(index) for index in found]
        mean, logvar = encode_moments(autoencoder, images)
        noise = torch.stack([_noise(config.seed, name, mean.shape[1:]) for name in ids]).to(device)
        rows = {
            "decode(mean)": decode(autoencoder, mean),
            "decode(sample)": decode(autoencoder, mean + torch.exp(0.5 * logvar) * noise),
            f"block KLT, {components} components": klt.reconstruct(images, components).clamp(-1, 1),
        }
        rows = {name: pixels.from_uint8(pixels.to_uint8(row)) for name, row in rows.items()}
        values = {name: _all_metrics(row, images, lpips) for name, row in rows.items()}
        measured.add(ids, kl_divergence(mean, logvar).mean(dim=(1, 2, 3)), values)
        decoded, _, linear = rows.values()
        for i, index in enumerate(found):
            if index in shown:
                label = source.label_names[source.label(index)] if source.label(index) >= 0 else ""
                measured.examples.append(make_example(ids[i], label, images[i], decoded[i], linear[i], mean[i]))
    return measured


@torch.no_grad()
def _all_metrics(images: Tensor, references: Tensor, lpips: LPIPS | None) -> dict[str, Tensor]:
    values = {"psnr": metrics.psnr(images, references), "ssim": metrics.ssim(images, references)}
    if min(images.shape[-2:]) >= metrics.MS_SSIM_SMALLEST_SIDE:
        values["ms_ssim"] = metrics.ms_ssim(images, references)
    if lpips is not None:
        values["lpips"] = lpips(images, references)
    return values | {"sharpness": metrics.sharpness_ratio(images, references)}


def _noise(seed: int, name: str, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "evaluation", name))


def _parts(config: EvaluateConfig) -> tuple[ImageSource, ImageSource]:
    """The images to measure, and those that fit the baseline: the training part, or everything for `all`."""
    source = open_source(config.data)
    evaluated = subset(source, config.part, config.data.held_out)
    return evaluated, evaluated if config.part == "all" else subset(source, "train", config.data.held_out)


def _fit_baseline(source: ImageSource, config: EvaluateConfig, block: int) -> BlockKLT:
    rejected: list[tuple[str, str]] = []
    indices = spread(len(source), config.baseline_images)
    batches = read_batches(source, indices, 1, config.resolution, rejected, "linear baseline")
    return fit_klt((images for _, images in batches), block)


def _finished_result(output: Path, config: EvaluateConfig, identity: str, overwrite: bool) -> dict[str, Any] | None:
    """The folder's finished result, None where there is none, UserError where it is of something else."""
    if not (output / provenance.RUN_RECORD).is_file():
        return None
    if not (output / RESULTS).is_file():
        raise UserError(f"{output}: holds another run; give another output")
    if overwrite:
        return None
    results = json.loads((output / RESULTS).read_text())
    changes = configuration.changed_keys(results["config"], configuration.to_dict(config))
    changes = {key: values for key, values in changes.items() if key not in MAY_CHANGE}
    if results["autoencoder"]["fingerprint"] != identity:
        changes["autoencoder fingerprint"] = (results["autoencoder"]["fingerprint"][:15], identity[:15])
    if changes:
        listed = ", ".join(f"{key} ({before} -> {after})" for key, (before, after) in changes.items())
        raise UserError(f"{output}: holds the result of {listed}; give another output, or --overwrite")
    return results


def _check_resolution(resolution: int, factor: int) -> None:
    if resolution % factor:
        nearest = max(1, round(resolution / factor)) * factor
        raise UserError(f"resolution: {resolution} is no multiple of {factor}; use {nearest}")


def _description(autoencoder: Any, identity: str) -> dict[str, Any]:
    return {
        "fingerprint": identity,
        "class": type(autoencoder).__name__,
        "parameters": sum(parameter.numel() for parameter in autoencoder.parameters()),
        "latent_channels": latent_channels(autoencoder),
        "downsampling": downsampling(autoencoder),
    }


def _protocol(config: EvaluateConfig, evaluated: ImageSource, fitted: ImageSource, count: int) -> dict[str, Any]:
    """What has to be equal for two results to be comparable."""
    return {
        "images": {"fingerprint": evaluated.fingerprint(), "part": config.part, "count": count},
        "preprocessing": preprocessing_record(config.resolution),
        "resolution": config.resolution,
        "range": "8-bit round trip of every reconstruction",
        "average": "per image, then mean over images; intervals are 95 % bootstrap over images",
        "ssim": "gaussian window 11, sigma 1.5, RGB, borders left out",
        "lpips": config.perceptual_net,
        "baseline": {
            "name": "block KLT, coefficients not quantised",
            "fitted_on": {
                "fingerprint": fitted.fingerprint(),
                "count": min(len(fitted), config.baseline_images),
            },
        },
        "precision": "float32",
        "versions": provenance.versions(),
    }


def _interval(values: Any) -> dict[str, float]:
    array = np.asarray(values, dtype=np.float64)
    low, high = metrics.bootstrap_interval(array)
    return {"mean": float(array.mean()), "low": low, "high": high}


def markdown(results: dict[str, Any]) -> str:
    """`results.md`: the table and the protocol in words."""
    names = list(results["rows"][0]["metrics"])
    lines = [
        "| reconstruction | " + " | ".join(metrics.METRIC_TITLES[name] for name in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for row in results["rows"]:
        cells = [f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in row["metrics"].values()]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    protocol, rate, gain = results["protocol"], results["rate"], results["gain_over_linear_db"]
    lines += [
        "",
        f"Gain of decode(mean) over the linear baseline on the same pixels: {gain['mean']:+.2f} dB "
        f"[{gain['low']:+.2f}, {gain['high']:+.2f}].",
        f"Rate: {rate['nats_per_dim']:.3f} nats = {rate['bits_per_dim']:.3f} bits per latent dimension = "
        f"{rate['bits_per_pixel']:.3f} bits per pixel.",
        f"{protocol['images']['count']} images ({protocol['images']['part']}), {protocol['resolution']} x "
        f"{protocol['resolution']}, {protocol['range']}, {protocol['average']}.",
        f"Autoencoder {results['autoencoder']['class']}, {results['autoencoder']['fingerprint']}.",
    ]
    return "\n".join(lines) + "\n"
