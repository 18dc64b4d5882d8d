"""How well an autoencoder reconstructs: `ldm-vae evaluate`, and `ldm-vae reconstruct` for single pictures.

    images -> Measurer.measure: encode, decode, the baselines on the same pixels; one value per image and metric (Unit)
           -> summary: means, intervals, paired differences, rate -> results.json -> markdown: results.md

Every value is of images after an 8-bit round trip. A unit of work is one batch, a fixed part of the chosen images, so
that nothing depends on the number of processes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor

from ldm_vae import metrics, provenance
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.klt import BlockKLT, Moments, block_moments, solve_klt
from ldm_vae.autoencoder.losses import LPIPS, Backbone
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.rate import bits_per_dimension, bits_per_pixel, kl_divergence
from ldm_vae.config import check_positive, plain_settings
from ldm_vae.data import open_source, transforms
from ldm_vae.data.decoding import ImageRejected, decode_image
from ldm_vae.data.folder import find_pictures
from ldm_vae.data.samples import (
    Enlarged,
    Rejected,
    crop_image,
    enlarged_record,
    enlarged_sentences,
    evenly_spaced,
    none_readable,
    read_crops,
)
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.split import Part, subset
from ldm_vae.data.survey import describe_images
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.diffusion import fid
from ldm_vae.diffusion.fid import (
    KID_SUBSETS,
    Distribution,
    check_distribution,
    compare_sets,
    inception_features,
    load_inception,
)
from ldm_vae.errors import UserError
from ldm_vae.evaluation import baselines
from ldm_vae.evaluation.baselines import available_codecs, bicubic_round_trip, code_images
from ldm_vae.evaluation.study import Content, Results, Study, StudyPlan, check_resolution, read_json, rejected_images
from ldm_vae.metrics import psnr
from ldm_vae.random import generator
from ldm_vae.runtime import compute_device
from ldm_vae.training.distributed import Processes, check_same_data, joined_processes
from ldm_vae.utils.image_grid import plain_grid, side_by_side
from ldm_vae.utils.progress import begin, beside, end, end_dry_run, say, track
from ldm_vae.utils.text import duration_text, markdown_table, pluralize

RESULTS = "results.json"
SAMPLE = "decode(sample)"
FORMAT_VERSION = 2
"""Version of the results. 1 took brightness on [-1, 1] in SSIM and compared images with themselves in KID."""


@dataclass(frozen=True)
class EvaluateConfig:
    """`ldm-vae evaluate`: on images that training never saw, beside a linear baseline.

    Baselines on the same pixels: a linear transform with as many numbers, bicubic scaling, JPEG and WebP at equal
    bytes. Writes results.json, results.md, grid.png and examples/ into the output folder. A finished result is not
    redone, and the result is the same for any number of processes.

      ldm-vae evaluate runs/mine data=~/images output=runs/mine/evaluation
      torchrun --nproc_per_node 4 scripts/evaluate.py runs/mine data=~/images output=runs/mine/evaluation

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the results.
        part: held_out (not used in training), its halves validation and test, train or all.
        resolution: side of the center crop in pixels, a multiple of the downsampling.
        count: largest number of images, evenly spread over the part; null: all.
        baseline_images: largest number of training images for the fit of the linear baseline.
        codecs: image codecs to compare with at equal bytes: JPEG, WebP, AVIF; `[]` for none.
        equal_bytes_bits_per_pixel: bits per pixel for the codecs; null: the rate of the autoencoder for each image.
        perceptual_net: the LPIPS network; null: no LPIPS.
        perceptual_weights: a local safetensors file of its backbone; null: torchvision's download.
        distribution: kid or fid (which includes KID) of the reconstructions, or none.
        fid: `force` prints a FID of fewer than 5,000 images, which is misleading.
        inception_weights: a local file of torch-fidelity's Inception weights; null: its download.
        kid_subset: images in each of KID's subsets; at most a quarter of the images.
        batch: images per forward pass.
        examples: number of example images to save.
        seed: seed of the posterior samples and of KID's subsets.
        device: auto, cpu, cuda, cuda:1 ... Under torchrun, auto and cuda give each process its own GPU.
        processes: required number of launched processes; null: any number.
    """

    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    part: Part = "held_out"
    resolution: int = 512
    count: int | None = None
    baseline_images: int = 128
    codecs: list[str] = field(default_factory=lambda: ["JPEG", "WebP"])
    equal_bytes_bits_per_pixel: float | None = None
    perceptual_net: Backbone | None = None
    perceptual_weights: str | None = None
    distribution: Distribution = "none"
    fid: Literal["refuse", "force"] = "refuse"
    inception_weights: str | None = None
    kid_subset: int = 200
    batch: int = 4
    examples: int = 6
    seed: int = 0
    device: str = "auto"
    processes: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "resolution", "batch", "baseline_images", "examples", "count")
        if self.perceptual_weights is not None and self.perceptual_net is None:
            raise UserError("perceptual_weights: has no effect without perceptual_net; set that too")
        if self.kid_subset < 2:
            raise UserError(f"kid_subset: {self.kid_subset} is below 2; 100 to 1000 is usual")
        for codec in self.codecs:
            if codec not in available_codecs():
                available = ", ".join(available_codecs())
                raise UserError(f"codecs: {codec!r} cannot be written here; choose among {available}")
        bits = self.equal_bytes_bits_per_pixel
        if bits is not None and bits <= 0:
            raise UserError(f"equal_bytes_bits_per_pixel: {bits} is not above 0")
        if bits is not None and not self.codecs:
            raise UserError("equal_bytes_bits_per_pixel: has no effect without codecs; leave it out")
        check_distribution(self.distribution, self.fid, self.inception_weights)


def evaluate(config: EvaluateConfig, overwrite: bool = False, dry_run: bool = False) -> Results:
    """Measure, write the result folder, return the content of `results.json`, the same for any number of processes.

    A folder that holds the finished result of these settings is read, not redone. Started by torchrun, all processes
    measure together.

    Raises:
        UserError: the folder holds a result of other settings or of another autoencoder, and not `overwrite`.
    """
    config = plain_settings(config)
    with joined_processes(config.processes) as processes:
        return Evaluation(config, overwrite, processes).run(dry_run)


def read_evaluation(folder: str | Path) -> Results:
    """The results of `evaluate` in a folder; {} where there are none.

    Raises:
        UserError: they are of another command, or of a version that computed some figures differently.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        return {}
    results = read_json(path)
    if not {"autoencoder", "protocol", "rows", "config"} <= results.keys():
        raise UserError(path, "is not a result of `ldm-vae evaluate`", "give a folder of that")
    if results.get("format_version") != FORMAT_VERSION:
        raise UserError(
            path,
            "was measured by another version of ldm_vae, whose figures are computed differently",
            "run `ldm-vae evaluate` again with --overwrite",
        )
    return results


class Evaluation(Study):
    """The study of `ldm-vae evaluate`."""

    format_version = FORMAT_VERSION
    replaced = ("examples/[0-9][0-9]_*.png",)
    command, product = "evaluate", "the evaluation"
    config: EvaluateConfig

    def __init__(self, config: EvaluateConfig, overwrite: bool, processes: Processes) -> None:
        self.device = processes.compute_device(config.device)
        autoencoder = load_autoencoder(config.autoencoder).to(self.device)
        super().__init__(config, autoencoder, overwrite=overwrite, processes=processes)
        check_resolution(config.resolution, autoencoder)

    def prepare(self) -> None:
        config = self.config
        self.evaluated, self.fitted = _parts(config)
        self.indices = evenly_spaced(len(self.evaluated), config.count)
        check_distribution(config.distribution, config.fid, config.inception_weights, len(self.indices))

    def work(self) -> StudyPlan:
        config = self.config
        images = describe_images(self.evaluated, len(self.indices))
        what = (images, f"part {config.part}", f"{config.resolution} pixels", config.autoencoder, str(self.device))
        return StudyPlan(what, self.evaluated, self.indices, config.resolution)

    def then(self, results: Results) -> list[str]:
        config = self.config
        words = ["ldm-vae", "diagnose", config.autoencoder, *config.data.words(), f"part={config.part}"]
        return [*words, f"resolution={max(64, config.resolution)}", f"output={beside(config.output, 'health')}"]

    def collect(self) -> None:
        config = self.config
        check_same_data(self.processes, f"{self.evaluated.fingerprint()} {self.fitted.fingerprint()}")
        chosen = evenly_spaced(len(self.fitted), config.baseline_images)
        klt = fit_baseline(self.fitted, chosen, config.resolution, self.autoencoder.downsampling, self.processes)
        self.measurer = _measurer(config, self.autoencoder, klt, self.device)
        self.measured = measure_images(self.measurer, self.evaluated, self.indices, self.processes)
        self.enlarged = self.measured.enlarged

    def measure(self) -> Results:
        config, measured = self.config, self.measured
        if not measured.ids:
            raise none_readable(config.output, len(self.evaluated), measured.rejected)
        check_distribution(config.distribution, config.fid, config.inception_weights, len(measured.ids))
        distribution = None
        if config.distribution != "none":
            real, decoded = np.stack(measured.real_features), np.stack(measured.decoded_features)
            distribution = compare_sets(real, decoded, config.distribution, config.kid_subset, config.seed, paired=True)
        return {
            "protocol": _protocol(config, self.evaluated, self.fitted, measured),
            **summarize(measured, self.measurer),
            "distribution": distribution,
            "examples": example_records(measured.examples),
            "rejected": rejected_images(measured.rejected),
            "images": per_image(measured, self.measurer),
        }

    def files(self, results: Results) -> dict[str, Content]:
        found: dict[str, Content] = {}
        for record, example in zip(results["examples"], self.measured.examples, strict=True):
            found |= {f"examples/{file}": example.pictures[name] for name, file in record["files"].items()}
        if found:  # none where exactly those images could not be read
            found["grid.png"] = grid(self.measured.examples)
        return found

    def markdown(self, results: Results) -> str:
        return markdown(results)

    def record(self, results: Results) -> dict[str, Any]:
        return {"images": results["protocol"]["images"]["count"]}


def _measurer(config: EvaluateConfig, autoencoder: Autoencoder, klt: Any, device: torch.device) -> Measurer:
    """The networks beside the autoencoder, and what is known about its rate."""
    lpips = inception = None
    if config.perceptual_net:
        lpips = LPIPS(config.perceptual_net, config.perceptual_weights).to(device)
    if config.distribution != "none":
        inception = load_inception(config.inception_weights).to(device)
    codes = autoencoder.codebook_size
    bits = None if codes is None else math.log2(codes) / autoencoder.downsampling**2
    return Measurer(autoencoder, klt, lpips, inception, config, device, bits, rate_known=not autoencoder.deterministic)


def _parts(config: EvaluateConfig) -> tuple[ImageSource, ImageSource]:
    """The images to measure, and those that fit the baseline: the training part, or everything for `all`."""
    source = open_source(config.data)
    evaluated = subset(source, config.part, config.data.held_out)
    return evaluated, evaluated if config.part == "all" else subset(source, "train", config.data.held_out)


def _protocol(config: EvaluateConfig, evaluated: ImageSource, fitted: ImageSource, measured: Unit) -> dict[str, Any]:
    """What has to be equal for two results to be comparable."""
    return {
        "images": {"fingerprint": evaluated.fingerprint(), "part": config.part, "count": len(measured.ids)},
        "preprocessing": preprocessing_record(config.resolution),
        "resolution": config.resolution,
        "range": "8-bit round trip of every reconstruction",
        "average": "per image, then mean over images; intervals are 95 % bootstrap over images",
        "ssim": "gaussian window 11, sigma 1.5, borders left out, brightness in [0, 255]; ssim: mean over RGB, "
        "ssim_luma: BT.601 luma",
        "lpips": config.perceptual_net,
        "baseline": {
            "name": "block KLT, coefficients not quantised",
            "fitted_on": {
                "fingerprint": fitted.fingerprint(),
                "count": min(len(fitted), config.baseline_images),
            },
        },
        "codecs": {
            "settings": {codec: baselines.CODEC_SETTINGS[codec] for codec in config.codecs},
            "versions": {"pillow": PIL.__version__, **{codec: _codec_version(codec) for codec in config.codecs}},
        },
        "kid": {
            "subset_size_at_most": config.kid_subset,
            "subsets": KID_SUBSETS,
            "kernel": "(x·y / 2048 + 1)^3",
            "pairs": "left out",
        },
        "seed": config.seed,
        "precision": "float32",
        "versions": provenance.versions(),
    }


def _codec_version(codec: str) -> str | None:
    return features.version({"JPEG": "jpg", "WebP": "webp", "AVIF": "avif"}[codec])


# Measuring: one value per image and metric.

BASELINE_UNIT = 8
"""Images whose block moments are summed before they travel."""


@dataclass
class Unit:
    """One batch measured: one entry per image in `ids`, `nats`, each `rows[row][metric]` and each `files[row]`."""

    ids: list[str] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    real_features: list[np.ndarray] = field(default_factory=list)
    decoded_features: list[np.ndarray] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    rejected: Rejected = field(default_factory=list)
    enlarged: Enlarged = field(default_factory=list)

    def extend(self, other: Unit) -> None:
        for name in ("ids", "nats", "real_features", "decoded_features", "examples", "rejected", "enlarged"):
            getattr(self, name).extend(getattr(other, name))
        for row, named in other.rows.items():
            for metric, values in named.items():
                self.rows.setdefault(row, {}).setdefault(metric, []).extend(values)
        for row, records in other.files.items():
            self.files.setdefault(row, []).extend(records)


@dataclass(frozen=True)
class Measurer:
    """What every batch needs. `code_bits_per_pixel`: of a deterministic code, whose rate is not a divergence.

    `rate_known` is False for a deterministic autoencoder: its KL is not a rate and a sample is its mean. Without
    a codebook the codecs then have no budget.
    """

    autoencoder: Autoencoder
    klt: BlockKLT
    lpips: LPIPS | None
    inception: Any
    config: EvaluateConfig
    device: torch.device
    code_bits_per_pixel: float | None = None
    rate_known: bool = True

    def budgets(self, nats: list[float]) -> list[float] | None:
        """Bytes that a codec may use for each image; None where there is nothing to be equal to."""
        pixel_count = self.config.resolution**2
        given = self.config.equal_bytes_bits_per_pixel
        if given is None and self.code_bits_per_pixel is not None:
            given = self.code_bits_per_pixel
        if given is not None:
            return [given * pixel_count / 8] * len(nats)
        if not self.rate_known:
            return None
        channels, factor = self.autoencoder.latent_channels, self.autoencoder.downsampling
        return [bits_per_pixel(value, channels, factor) * pixel_count / 8 for value in nats]

    @torch.no_grad()
    def measure(self, source: ImageSource, indices: list[int], shown: set[int]) -> Unit:
        """Reconstruct and measure the images at `indices`. The posterior noise of an image depends on its id only."""
        unit = Unit()
        found, batch = read_crops(source, indices, self.config.resolution, unit.rejected, unit.enlarged)
        if batch is None:
            return unit
        images = batch.to(self.device)
        unit.ids = [source.id(index) for index in found]
        mean, logvar = self.autoencoder.encode_moments(images)
        unit.nats = kl_divergence(mean, logvar).mean(dim=(1, 2, 3)).tolist()
        noise = torch.stack([_noise(self.config.seed, name, mean.shape[1:]) for name in unit.ids]).to(self.device)
        rows = {"decode(mean)": self.autoencoder.decode_images(mean)}
        if self.rate_known:
            rows[SAMPLE] = self.autoencoder.decode_images(mean + torch.exp(0.5 * logvar) * noise)
        factor, components = self.klt.block, min(self.autoencoder.latent_channels, len(self.klt.eigenvalues))
        rows[f"bicubic {factor}x"] = bicubic_round_trip(images, factor)
        linear_name = f"block KLT, {components} components"
        rows[linear_name] = self.klt.reconstruct(images, components).clamp(-1, 1)
        rows = {name: transforms.from_uint8(transforms.to_uint8(row)) for name, row in rows.items()}
        decoded, linear = rows["decode(mean)"], rows.pop(linear_name)
        for name, row in rows.items():
            unit.rows[name] = self._metrics(row, images)
        budgets = self.budgets(unit.nats)
        for codec in self.config.codecs if budgets is not None else ():
            name = f"{codec}, equal bytes"
            unit.rows[name], unit.files[name] = self._codec(images, codec, budgets or [])
        unit.rows[linear_name] = self._metrics(linear, images)
        if self.inception is not None:
            unit.real_features = list(inception_features(self.inception, images))
            unit.decoded_features = list(inception_features(self.inception, decoded))
        for i, index in enumerate(found):
            if index in shown:
                label = source.label_names[source.label(index)] if source.label(index) >= 0 else ""
                unit.examples.append(make_example(unit.ids[i], label, images[i], decoded[i], linear[i], mean[i]))
        return unit

    def _metrics(self, row: Tensor, images: Tensor) -> dict[str, list[float]]:
        return {metric: values.tolist() for metric, values in all_metrics(row, images, self.lpips).items()}

    def _codec(
        self, images: Tensor, codec: str, budgets: list[float]
    ) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
        """Every metric of a codec at exactly the budget of each image, between the files next to it."""
        below, above, found = code_images(images, codec, budgets)
        sides = self._metrics(below, images), self._metrics(above, images)
        values = {
            metric: [one.at_budget(*pair) for one, *pair in zip(found, sides[0][metric], sides[1][metric])]
            for metric in sides[0]
        }
        return values, [one.record() for one in found]


def measure_images(measurer: Measurer, source: ImageSource, indices: list[int], processes: Processes) -> Unit:
    """All images at `indices` together, on every process, in their order."""
    batch = measurer.config.batch
    units = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    shown = {indices[i] for i in evenly_spaced(len(indices), measurer.config.examples)}
    share = _progress(processes, units, "evaluating")
    found = [(number, measurer.measure(source, unit, shown)) for number, unit in share]
    whole = Unit()
    for unit in processes.gather(found, len(units)):
        whole.extend(unit)
    return whole


def fit_baseline(
    source: ImageSource, indices: list[int], resolution: int, block: int, processes: Processes
) -> BlockKLT:
    """The linear baseline, its images shared among the processes; the sums are added in a fixed order.

    Raises:
        UserError: none of the images can be read.
    """
    units = [indices[start : start + BASELINE_UNIT] for start in range(0, len(indices), BASELINE_UNIT)]
    found: list[tuple[int, tuple[Moments | None, Rejected]]] = []
    for number, unit in _progress(processes, units, "linear baseline"):
        rejected: Rejected = []
        _, images = read_crops(source, unit, resolution, rejected, [])
        found.append((number, (None if images is None else block_moments(images, block), rejected)))
    whole = list(processes.gather(found, len(units)))
    read = [moments for moments, _ in whole if moments is not None]
    if not read:
        raise none_readable("data", len(indices), [one for _, rejected in whole for one in rejected])
    return solve_klt(read, block)


def _progress(processes: Processes, units: list[list[int]], task: str) -> Any:
    """This process's share of the units with a progress bar on the main process."""
    return track(list(processes.share(units)), task, "batch", shown=processes.is_main_process)


@torch.no_grad()
def all_metrics(images: Tensor, references: Tensor, lpips: LPIPS | None) -> dict[str, Tensor]:
    """Every metric of images (n, 3, h, w) in [-1, 1], each (n,). MS-SSIM where the sides allow it."""
    values = {
        "psnr": metrics.psnr(images, references),
        "ssim": metrics.ssim(images, references),
        "ssim_luma": metrics.ssim_luma(images, references),
    }
    if min(images.shape[-2:]) >= metrics.MS_SSIM_SMALLEST_SIDE:
        values["ms_ssim"] = metrics.ms_ssim(images, references)
    if lpips is not None:
        values["lpips"] = lpips(images, references)
    return values | {"sharpness": metrics.sharpness_ratio(images, references)}


def _noise(seed: int, name: str, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "evaluation", name))


# Means, intervals, paired differences, the rate, and the table of results.md.


def summarize(measured: Unit, measurer: Measurer) -> dict[str, Any]:
    """Rows with means and 95 % bootstrap intervals, paired differences to each other row, the rate, the budget.

    A codec's file is compared with a reconstruction of the same bits: a posterior sample, if there is a posterior. The
    mean would take more bits than the rate says.
    """
    first, *others = measured.rows
    carried = SAMPLE if SAMPLE in measured.rows else first
    rate = rate_of(measured, measurer)
    linear = np.subtract(measured.rows[first]["psnr"], measured.rows[others[-1]]["psnr"])
    return {
        "rows": [row_of(name, measured, rate["bits_per_pixel"], measurer) for name in measured.rows],
        "gain_over_linear_db": interval(linear),
        "differences": [
            {
                "row": row,
                "baseline": other,
                "metrics": {
                    metric: metrics.paired_difference(np.array(values), np.array(measured.rows[other][metric]))
                    for metric, values in measured.rows[row].items()
                },
            }
            for other in others
            for row in [carried if other in measured.files else first]
        ],
        "rate": rate,
        "equal_bytes": budget_sentence(measurer),
        "linear": {"block": measurer.klt.block, "eigenvalues": measurer.klt.eigenvalues.tolist()},
    }


def row_of(name: str, measured: Unit, rate_bits_per_pixel: float | None, measurer: Measurer) -> dict[str, Any]:
    """`bits_per_pixel`: mean over images; of files, the actual ones. None: nothing was coded."""
    row: dict[str, Any] = {
        "name": name,
        "metrics": {metric: interval(values) for metric, values in measured.rows[name].items()},
        "bits_per_pixel": rate_bits_per_pixel if name.startswith("decode(") else None,
    }
    if name in measured.files:
        files = measured.files[name]
        pixel_count = measurer.config.resolution**2
        row["bits_per_pixel"] = float(np.mean([8 * file["bytes"] / pixel_count for file in files]))
        row["over_budget"] = sum(not file["within_budget"] for file in files)
        row["below_budget"] = sum(file["within_budget"] and file["files"][0] == file["files"][1] for file in files)
    return row


def rate_of(measured: Unit, measurer: Measurer) -> dict[str, Any]:
    """The mean KL in three units, of a deterministic code its indices' bits, of a code without a rate None."""
    channels, factor = measurer.autoencoder.latent_channels, measurer.autoencoder.downsampling
    if measurer.code_bits_per_pixel is not None:
        bits = measurer.code_bits_per_pixel * factor**2 / channels
        return {
            "kind": "indices of a codebook, every code equally likely",
            "nats_per_dim": bits * float(np.log(2)),
            "bits_per_dim": bits,
            "bits_per_pixel": measurer.code_bits_per_pixel,
        }
    if not measurer.rate_known:
        kind = "none: a deterministic latent of real numbers has no rate"
        return {"kind": kind, "nats_per_dim": None, "bits_per_dim": None, "bits_per_pixel": None}
    nats = float(np.mean(measured.nats))
    return {
        "kind": "KL to N(0, 1)",
        "nats_per_dim": nats,
        "bits_per_dim": bits_per_dimension(nats),
        "bits_per_pixel": bits_per_pixel(nats, channels, factor),
    }


def budget_sentence(measurer: Measurer) -> str:
    """What the codecs' bytes are equal to."""
    given = measurer.config.equal_bytes_bits_per_pixel
    if not measurer.config.codecs:
        return "no codecs were asked for"
    if given is not None:
        return f"each image has {given:g} bits per pixel, as equal_bytes_bits_per_pixel says"
    if measurer.code_bits_per_pixel is not None:
        return f"each image has the {measurer.code_bits_per_pixel:.4f} bits per pixel of the code's indices"
    if not measurer.rate_known:
        return (
            "no codec rows: this deterministic autoencoder has no rate to be equal to; give equal_bytes_bits_per_pixel"
        )
    return "each image has the bytes of its own rate (its KL), which carry decode(sample) and not decode(mean)"


def per_image(measured: Unit, measurer: Measurer) -> list[dict[str, Any]]:
    """One record an image: every value, and the file of every codec. `nats_per_dim` only where it is a rate."""
    has_rate = measurer.rate_known and measurer.code_bits_per_pixel is None
    return [
        {
            "id": name,
            "nats_per_dim": measured.nats[i] if has_rate else None,
            **{
                row: {metric: values[i] for metric, values in named.items()}
                | (measured.files[row][i] if row in measured.files else {})
                for row, named in measured.rows.items()
            },
        }
        for i, name in enumerate(measured.ids)
    ]


def interval(values: Any) -> dict[str, float]:
    array = np.asarray(values, dtype=np.float64)
    low, high = metrics.bootstrap_interval(array)
    return {"mean": float(array.mean()), "low": low, "high": high}


def markdown(results: dict[str, Any]) -> str:
    """`results.md`: the table, the differences and the protocol in words."""
    protocol, gain = results["protocol"], results["gain_over_linear_db"]
    lines = [
        markdown_rows(results),
        "",
        f"Gain of decode(mean) over the linear baseline on the same pixels: {gain['mean']:+.2f} dB "
        f"[{gain['low']:+.2f}, {gain['high']:+.2f}].",
        *difference_lines(results),
        rate_line(results["rate"]),
        *codec_lines(results),
        *(fid.sentences(results["distribution"]) if results.get("distribution") else []),
        f"{pluralize(protocol['images']['count'], 'image')} ({protocol['images']['part']}), {protocol['resolution']} x "
        f"{protocol['resolution']}, {protocol['range']}, {protocol['average']}.",
        f"Autoencoder {results['autoencoder']['class']}, {results['autoencoder']['fingerprint']}.",
    ]
    return "\n".join(lines) + "\n"


def markdown_rows(results: dict[str, Any]) -> str:
    """Markdown: each row's rate, and its metrics with their intervals."""
    names = list(results["rows"][0]["metrics"])
    rows = []
    for row in results["rows"]:
        rate, values = row.get("bits_per_pixel"), [row["metrics"].get(name) for name in names]
        cells = [row_title(row, results), "not coded" if rate is None else f"{rate:.3f}"]
        cells += [f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" if v else "not measured" for v in values]
        rows.append(cells)
    titles = [metrics.METRIC_TITLES.get(name, name) for name in names]
    return "\n".join(markdown_table(["reconstruction", "bits/pixel", *titles], rows))


def row_title(row: dict[str, Any], results: dict[str, Any]) -> str:
    """The row's name, with a warning where its files are not of equal bytes after all."""
    if not row.get("over_budget"):
        return str(row["name"])
    return f"{row['name']} ({row['over_budget']} of {results['protocol']['images']['count']} over)"


def rate_line(rate: dict[str, Any]) -> str:
    if rate["bits_per_pixel"] is None:
        return f"Rate: {rate['kind']}."
    return (
        f"Rate: {rate['nats_per_dim']:.3f} nats = {rate['bits_per_dim']:.3f} bits per latent dimension = "
        f"{rate['bits_per_pixel']:.3f} bits per pixel ({rate['kind']})."
    )


def difference_lines(results: dict[str, Any]) -> list[str]:
    """Paired differences of PSNR and LPIPS (or SSIM) to each baseline, with Wilcoxon's p."""
    lines = []
    titles = {row["name"]: row_title(row, results) for row in results["rows"]}
    for difference in results.get("differences", []):
        second = "lpips" if "lpips" in difference["metrics"] else "ssim"
        parts = []
        for metric, unit in (("psnr", " dB"), (second, f" {metrics.METRIC_TITLES[second]}")):
            value = difference["metrics"][metric]
            p = value["wilcoxon_p"]
            tested = "not tested" if p is None else f"p = {p:.2g}"
            parts.append(f"{value['mean']:+.3f}{unit} [{value['low']:+.3f}, {value['high']:+.3f}], {tested}")
        lines.append(f"{difference['row']} minus {titles[difference['baseline']]}: {'; '.join(parts)}.")
    if lines:
        lines.append("Differences are paired over images; p is Wilcoxon's signed-rank test, two-sided, not corrected.")
    return lines


def codec_lines(results: dict[str, Any]) -> list[str]:
    if "equal_bytes" not in results:
        return []
    lines = [f"Codecs: {results['equal_bytes']}; header bytes count."]
    names = [row["name"] for row in results["rows"] if "below_budget" in row]
    if names:
        lines.append(
            "A codec's metrics are read at exactly that many bytes, between the files of the qualities next to it, "
            "over the logarithm of bytes. JPEG 4:2:0, optimized, progressive where that is smaller; WebP method 6; "
            "AVIF 4:2:0, speed 6."
        )
    for row in results["rows"]:
        if row.get("below_budget"):
            lines.append(
                f"{row['name']}: {row['below_budget']} of {results['protocol']['images']['count']} images take fewer "
                "bytes even at the highest quality, which was taken."
            )
        if row.get("over_budget"):
            lines.append(
                f"{row['name']}: {row['over_budget']} of {results['protocol']['images']['count']} images over the "
                "budget even at the lowest quality, which was taken."
            )
    return lines


# Example pictures: an image, its latent, its reconstructions and their difference.

DIFFERENCE_GAIN = 8
GRID_COLUMNS = ("original", "decoded", "difference")


@dataclass(frozen=True)
class Example:
    """One evaluated image; `pictures`: original, decoded, linear, difference and latent."""

    id: str
    label: str
    pictures: dict[str, Image.Image]


def make_example(id: str, label: str, original: Tensor, decoded: Tensor, linear: Tensor, mean: Tensor) -> Example:
    """Images (3, h, w) in [-1, 1] and the latent mean (c, h/f, w/f) -> an example."""
    difference = (DIFFERENCE_GAIN * (decoded - original)).clamp(-1, 1)
    images = {"original": original, "decoded": decoded, "linear": linear, "difference": difference}
    pictures = {name: transforms.to_pil(image[None].cpu())[0] for name, image in images.items()}
    pictures["latent"] = transforms.to_pil(latent_colors(mean)[None].cpu())[0]
    return Example(id, label, pictures)


def latent_colors(latent: Tensor) -> Tensor:
    """A latent (c, h, w) as a false-color image (3, h, w) in [-1, 1].

    Red, green and blue are its three strongest directions over the channels, each stretched between its 2nd
    and 98th percentile. Fewer than three channels repeat the last one.
    """
    channels = latent.float().flatten(1)
    channels = channels - channels.mean(dim=1, keepdim=True)
    _, vectors = torch.linalg.eigh(channels @ channels.T)
    directions = vectors.flip(1).T[:3]
    directions = torch.where(directions.sum(dim=1, keepdim=True) < 0, -directions, directions)
    projected = directions @ channels
    projected = projected[[min(row, len(projected) - 1) for row in range(3)]]
    low, high = projected.quantile(torch.tensor([0.02, 0.98], device=latent.device), dim=1, keepdim=True)
    stretched = (projected - low) / (high - low).clamp_min(1e-6) * 2 - 1
    return stretched.clamp(-1, 1).view(3, *latent.shape[1:])


def example_records(found: list[Example]) -> list[dict[str, Any]]:
    """What results say of the examples; `files`: the picture's name -> its file."""
    return [
        {
            "id": example.id,
            "label": example.label,
            "files": {name: f"{number:02d}_{name}.png" for name in example.pictures},
        }
        for number, example in enumerate(found)
    ]


def grid(found: list[Example]) -> Image.Image:
    """One row per example: original, reconstruction, difference times 8 on gray."""
    return plain_grid([[example.pictures[name] for name in GRID_COLUMNS] for example in found])


# `ldm-vae reconstruct`: pictures of any size from files and folders; keeps names and sizes.


def reconstruct_pictures(
    autoencoder: str,
    inputs: Sequence[str],
    output: str,
    *,
    size: int | None = None,
    sample: bool = False,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> tuple[list[Path], list[tuple[str, str]]]:
    """Write NAME.png and NAME_beside.png for every picture, and `run.json`.

    Args:
        inputs: image files and folders; a folder is searched recursively and its structure is kept.
        size: center crop to size x size; None keeps the original size, whatever it is.
        sample: decode a posterior sample, drawn by (seed, name), instead of the mean.

    Returns:
        The reconstructions written, and (name, reason) of the images that could not be decoded.

    Raises:
        UserError: a missing file or folder, an `output` that is not empty and not `overwrite`, no image.
    """
    started = time.time()
    files = find_pictures(inputs)
    target = compute_device(device)
    model = load_autoencoder(autoencoder).to(target)
    folder = Path(output)
    check_output(folder, overwrite)
    written: list[Path] = []
    rejected, enlarged = Rejected(), Enlarged()
    quality: list[float] = []
    for name, path in track(files, "reconstruct", leave=True):
        try:
            image = decode_image(path.read_bytes())
        except ImageRejected as error:
            rejected.append((str(path), str(error)))
            continue
        if size is not None:
            image = crop_image(image, size, name, enlarged).pixels
        original = transforms.from_uint8(torch.from_numpy(image.copy()).permute(2, 0, 1)[None]).to(target)
        noise = generator(seed, "reconstruct", name, device=target) if sample else None
        decoded = transforms.from_uint8(transforms.to_uint8(model.reconstruct(original, noise)))
        quality.append(float(psnr(decoded, original)))
        written.append(folder / f"{name}.png")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        picture = transforms.to_pil(decoded.cpu())[0]
        picture.save(written[-1])
        side_by_side([Image.fromarray(image), picture]).save(folder / f"{name}_beside.png")
    if not written:
        raise UserError(f"{inputs[0]}: no image could be decoded ({rejected[0][1]}); give other files")
    figures: dict[str, Any] = {"images": len(written), "mean_psnr_db": round(float(np.mean(quality)), 3)}
    provenance.write_run_record(folder, None, started, time.time() - started, **figures, **enlarged_record(enlarged))
    for line in enlarged_sentences([side for _, side in enlarged], len(written)):
        say(line)
    return written, rejected


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises: UserError for a folder that holds something, and not `overwrite`."""
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder}: is not empty; give another output, or --overwrite")


def _seconds_a_picture(config: ReconstructConfig, files: Sequence[Path]) -> float:
    """Time of the first readable picture. Raises: UserError if there is none."""
    model = load_autoencoder(config.autoencoder).to(compute_device(config.device))
    for path in files:
        started = time.monotonic()
        with contextlib.suppress(ImageRejected):
            image = decode_image(path.read_bytes())
            if config.resolution is not None:
                image = crop_image(image, config.resolution, path.name, []).pixels
            model.reconstruct(transforms.to_batch(image).to(model.device)).cpu()
            return time.monotonic() - started
    raise UserError(f"{config.images[0]}: no image could be decoded; give other files")


@dataclass(frozen=True)
class ReconstructConfig:
    """`ldm-vae reconstruct`: what an autoencoder keeps of your own pictures.

    Takes files and folders, any size; the original size is kept. Writes NAME.png and NAME_beside.png (original left,
    reconstruction right).

      ldm-vae reconstruct runs/mine holiday.jpg portraits/ output=seen

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        images: image files and folders.
        output: the folder for the pictures.
        resolution: side in pixels to which images are scaled and cropped; null: their own size.
        sample: decode a posterior sample instead of the mean.
        seed: seed of the posterior samples.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str = "???"
    images: list[str] = field(default_factory=list)
    output: str = "???"
    resolution: int | None = None
    sample: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "resolution")


def reconstruct_images(config: ReconstructConfig, *, overwrite: bool = False, dry_run: bool = False) -> int:
    """Write the pictures and print what was left out. `dry_run`: look at pictures and folder, and time one picture.

    Returns: 0. Raises: UserError.
    """
    config = plain_settings(config)
    if not config.images:
        raise UserError("images: missing; give image files or folders")
    files = find_pictures(config.images)
    size = "their own size" if config.resolution is None else f"{config.resolution} pixels"
    what = "a posterior sample" if config.sample else "the posterior mean"
    begin("reconstruct", pluralize(len(files), "picture"), size, what, config.autoencoder, f"to {config.output}")
    if dry_run:
        check_output(Path(config.output), overwrite)
        seconds = len(files) * _seconds_a_picture(config, [path for _, path in files])
        end_dry_run(config.output, f"about {duration_text(seconds)}")
        return 0
    written, rejected = reconstruct_pictures(
        config.autoencoder,
        config.images,
        config.output,
        size=config.resolution,
        sample=config.sample,
        seed=config.seed,
        device=config.device,
        overwrite=overwrite,
    )
    for name, reason in rejected:
        say(f"{name}: left out ({reason})")
    left_out = f", {len(rejected)} left out" if rejected else ""
    words = ["ldm-vae", "compress", *config.images, f"autoencoder={config.autoencoder}"]
    words.append(f"output={beside(config.output, 'compressed')}")
    end(config.output, f"{pluralize(len(written), 'reconstruction')}{left_out}", words)
    return 0
