"""A detector: what `anomaly fit` learns from normal images, in a folder bound to one autoencoder.

Normal images fall into two parts: scores are fitted to the first one, and the second one, held out, sets a threshold
for each score. The threshold is an order statistic, so it needs no distribution: of new normal images, drawn as these
were, at most the stated rate is called anomalous on average. n images support no rate below 1 / (n + 1).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.applications.anomaly import scores
from ldm_vae.applications.anomaly.images import crop_batches, mark, refuse_enlarged, stack
from ldm_vae.autoencoder.losses import Backbone
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.config import plain_settings
from ldm_vae.data import open_source
from ldm_vae.data.folder import report_newer_images
from ldm_vae.data.samples import Crop, Rejected, evenly_spaced, iterate_crops
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.split import subset
from ldm_vae.data.survey import describe_images
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation.study import Study, StudyPlan, check_resolution, describe_autoencoder, rejected_images
from ldm_vae.files import (
    MANIFEST,
    checksum,
    parsing,
    published_directory,
    read_described_folder,
    system_errors_explained,
    write_checksums,
    write_json,
)
from ldm_vae.paths import DETECTOR
from ldm_vae.runtime import compute_device
from ldm_vae.utils.progress import begin, beside, end
from ldm_vae.utils.text import pluralize

FORMAT_VERSION = 2
"""1 took brightness on [-1, 1] in SSIM, so that its thresholds of `ms_ssim` are others."""
DESCRIPTION, TENSORS = "detector.json", "detector.safetensors"
OWN_FILES = {DESCRIPTION, TENSORS, provenance.RUN_RECORD, MANIFEST}
GAUSSIANS = ("positions", "pooled")
FEWEST_IMAGES = 16
"""Least number of images for the fit of a detector."""
SMALLEST_RESOLUTION = 64


@dataclass(frozen=True)
class FitDetectorConfig:
    """`ldm-vae anomaly fit`: statistics of latents, and a threshold for every score.

    Takes any autoencoder. The images are split by their ids as in training: the held-out part sets the thresholds, for
    a false-positive rate that it can support (n images none below 1 / (n + 1)). The output becomes a small folder that
    works with this autoencoder only.

      ldm-vae anomaly fit runs/mine data=parts/good output=runs/detector
      ldm-vae anomaly fit runs/mine model=runs/diffusion resolution=512 regret_steps=5 data.synthetic.seed=1 \\
        data.synthetic.count=400 data.held_out=0.5 output=runs/detector

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id; of any kind.
        output: the folder of the detector.
        data: normal images only. `data.held_out` of them set the thresholds.
        resolution: side of the center crop in pixels; no image may be smaller.
        count: largest number of images for the fit; null: all.
        held_out_count: largest number of held-out images for the thresholds; null: all.
        false_positive_rate: share of new normal images that a threshold may classify as anomalous.
        by: the score that decides the verdict.
        pipeline: a diffusion pipeline on this autoencoder's latents, for the flow scores.
        perceptual_net: the LPIPS network, for the perceptual score; null: no perceptual score.
        perceptual_weights: a local safetensors file of its backbone; null: torchvision's download.
        regret_steps: steps of likelihood regret, each with a decoding and a gradient per image; 0: without it.
        batch: images per forward pass.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    resolution: int = 256
    count: int | None = None
    held_out_count: int | None = None
    false_positive_rate: float = 0.05
    by: str = "l1_peak"
    pipeline: str | None = None
    perceptual_net: Backbone | None = None
    perceptual_weights: str | None = None
    regret_steps: int = 0
    batch: int = 8
    device: str = "auto"

    def __post_init__(self) -> None:
        configuration.check_positive(self, "batch", "count", "held_out_count")
        if not 0 < self.false_positive_rate < 1:
            raise UserError(f"false_positive_rate: {self.false_positive_rate} is not between 0 and 1; 0.05 is usual")
        if self.resolution < SMALLEST_RESOLUTION:
            raise UserError(f"resolution: {self.resolution} is under {SMALLEST_RESOLUTION}; 256 is usual")
        if not 0 <= self.regret_steps <= 1000:
            raise UserError(f"regret_steps: {self.regret_steps} is not from 0 to 1000; 5 is a start")
        if self.data.source == "synthetic" and self.data.synthetic.defects > 0:
            raise UserError(
                f"data.synthetic.defects: a share of {self.data.synthetic.defects} would have a defect, and a detector "
                "is fitted to normal images only; set 0"
            )
        if self.perceptual_weights is not None and self.perceptual_net is None:
            raise UserError("perceptual_weights: has no effect without perceptual_net; set that too")


@dataclass(frozen=True)
class Detector:
    """What `anomaly fit` made.

    Args:
        normal: score -> its values on the held-out normal images (n,), in their order.
        seen: marks of all images that it was fitted to, sorted, int64 (see `images.mark`).
        description: content of `detector.json`.
        folder: where it was read from.
    """

    statistics: scores.NormalStatistics
    normal: dict[str, np.ndarray]
    seen: np.ndarray
    description: dict[str, Any]
    folder: str = ""

    @property
    def rate(self) -> float:
        """The stated false-positive rate."""
        return float(self.description["false_positive_rate"])

    @property
    def resolution(self) -> int:
        return int(self.description["resolution"])

    @property
    def by(self) -> str:
        """The score that gives the verdict unless another one is asked for."""
        return str(self.description["by"])

    @property
    def digest(self) -> str:
        """Changes with every byte of its folder."""
        return checksum(Path(self.folder) / MANIFEST)

    def thresholds(self) -> dict[str, float]:
        return {name: threshold(values, self.rate) for name, values in self.normal.items()}

    def networks(
        self, autoencoder: str, device: str, pipeline: str | None = None, perceptual_weights: str | None = None
    ) -> scores.Networks:
        """Load the networks that it was fitted with. Raises: UserError: one is missing, not needed, or another one."""
        settings, bound = self.description["config"], self.description["identity"]
        if bound["flow_network"] and pipeline is None:
            raise UserError(f"pipeline: missing; {self.folder} has flow scores, give the pipeline of its fit")
        if pipeline is not None and not bound["flow_network"]:
            raise UserError(f"pipeline: has no effect, {self.folder} was fitted without one; leave it out")
        if perceptual_weights is not None and not bound["perceptual_network"]:
            raise UserError(f"perceptual_weights: has no effect, {self.folder} has no perceptual score; leave it out")
        found = scores.load_networks(
            autoencoder, compute_device(device), pipeline, settings["perceptual_net"], perceptual_weights,
            settings["regret_steps"],
        )  # fmt: skip
        given = {"autoencoder": autoencoder, "flow_network": pipeline, "perceptual_network": perceptual_weights}
        for name, present in network_fingerprints(found).items():
            if present != bound[name]:
                raise UserError(
                    f"detector: {self.folder} was fitted with another {name.replace('_', ' ')} than {given[name]} "
                    f"({str(bound[name])[:15]}, here {str(present)[:15]}); give that one, or fit a detector for this"
                )
        return found


class _FitDetector(Study):
    """Recognizes a finished detector."""

    results_file, format_version = DESCRIPTION, FORMAT_VERSION


def fit_detector(config: FitDetectorConfig, *, overwrite: bool = False, dry_run: bool = False) -> Detector | None:
    """Learn, measure the held-out images, write the detector. A finished one of these settings is read, not redone.

    Args:
        overwrite: replace a detector of other settings there.
        dry_run: open everything and look at some images; write nothing and return None.

    Raises:
        UserError: the folder holds something else; too few normal images; images of mixed size; networks that do not
            belong together.
    """
    config = plain_settings(config)
    started = time.time()
    output = Path(config.output)
    check_detector_folder(output)
    networks = scores.load_networks(
        config.autoencoder, compute_device(config.device), config.pipeline, config.perceptual_net,
        config.perceptual_weights, config.regret_steps,
    )  # fmt: skip
    study = _FitDetector(config, networks.autoencoder, overwrite=overwrite)
    if study.load() is None:
        normal = open_normal(config, networks)
        begin("anomaly fit", *_described(config, normal), str(networks.device), f"to {output}")
        if dry_run:
            chosen = StudyPlan((), normal.learning, normal.learning_indices, config.resolution)
            study.preview(chosen)
            return None
        save_detector(learn_detector(config, networks, normal), output, started)
    else:
        begin("anomaly fit", f"{output} holds the finished detector of these settings; nothing is fitted again")
        report_newer_images(config.data, output / DESCRIPTION)
    detector = load_detector(output)
    words = ["ldm-vae", "anomaly", "score", str(output), f"autoencoder={config.autoencoder}"]
    words += [f"model={config.pipeline}"] if config.pipeline else []
    words += [f"perceptual_weights={config.perceptual_weights}"] if config.perceptual_weights else []
    end(output, describe_detector(detector), [*words, *config.data.words(), f"output={beside(output, 'scores')}"])
    return detector


def _described(config: FitDetectorConfig, normal: NormalImages) -> list[str]:
    """What is learned from, for the first line."""
    images = describe_images(normal.learning, len(normal.learning_indices))
    others = f"thresholds from {pluralize(len(normal.held_out_indices), 'other image')}"
    rate = f"false-positive rate {config.false_positive_rate:g}"
    return [images, others, f"{config.resolution} pixels", rate, f"by {config.by}", config.autoencoder]


def describe_detector(detector: Detector) -> str:
    """What was fitted, in words."""
    found, (low, high) = detector.description, detector.description["false_positive_rate_interval"]
    smallest = rounded_up(found["smallest_false_positive_rate"])
    return (
        f"learned from {found['counts']['learnt_from']} normal images; {len(detector.normal)} "
        f"scores with thresholds from {found['counts']['held_out']} others, at a false-positive rate of "
        f"{detector.rate:g} (so few can mean one from {low:.3f} to {high:.3f}, and support {smallest} at the least); "
        f"the verdict is by {detector.by}"
    )


@dataclass(frozen=True)
class NormalImages:
    """The images of a fit: those to learn from, and those that set the thresholds, with the indices that are used."""

    source: ImageSource
    learning: ImageSource
    learning_indices: list[int]
    held_out: ImageSource
    held_out_indices: list[int]


def open_normal(config: FitDetectorConfig, networks: scores.Networks) -> NormalImages:
    """Open the images and check the settings. Raises: UserError for what cannot be fitted."""
    check_resolution(config.resolution, networks.autoencoder, scores.STRIDE)
    scores.check_pipeline_size(networks, config.resolution)
    scores.check_score(config.by, networks.score_names)
    source = open_source(config.data)
    train, held_out = (subset(source, part, config.data.held_out) for part in ("train", "held_out"))  # type: ignore[arg-type]
    train_indices = evenly_spaced(len(train), config.count)
    held_out_indices = evenly_spaced(len(held_out), config.held_out_count)
    _check_count(len(train_indices))
    check_rate(config.false_positive_rate, len(held_out_indices))
    return NormalImages(source, train, train_indices, held_out, held_out_indices)


def learn_detector(
    config: FitDetectorConfig, networks: scores.Networks, normal_images: NormalImages | None = None
) -> Detector:
    """The same without the folder. `normal_images`: where they are open already. Raises: UserError."""
    opened = normal_images or open_normal(config, networks)
    source, train, held_out = opened.source, opened.learning, opened.held_out
    train_indices, held_out_indices = opened.learning_indices, opened.held_out_indices
    rejected: Rejected = []
    marks: set[int] = set()

    def read(part: ImageSource, indices: list[int], task: str) -> Iterator[tuple[list[Crop], list[int]]]:
        """Batches of crops and their marks."""
        crops = iterate_crops(part, indices, config.resolution, rejected, [])
        for batch in crop_batches(crops, config.batch, len(indices), task):
            refuse_enlarged(batch, config.resolution)
            yield batch, [mark(crop) for crop in batch]

    def learning() -> Iterator[tuple[list[str], Tensor]]:
        for batch, found in read(train, train_indices, "learning"):
            marks.update(found)
            yield [crop.id for crop in batch], stack(batch)

    statistics = scores.learn(networks, learning())
    learned_from = len(train_indices) - len(rejected)
    _check_count(learned_from)
    values: dict[str, list[np.ndarray]] = {name: [np.zeros(0)] for name in networks.score_names}
    for batch, found in read(held_out, held_out_indices, "held-out scores"):
        fresh = []
        for crop, number in zip(batch, found):
            if number not in marks:  # a copy of what was learned from sets no threshold
                fresh.append(crop)
            marks.add(number)
        if fresh:
            for name, of_score in scores.measure_scores(
                networks, statistics, stack(fresh), [c.id for c in fresh]
            ).values.items():
                values[name].append(of_score.numpy())
    normal = {name: np.concatenate(parts) for name, parts in values.items()}
    count, rate = len(normal[config.by]), config.false_positive_rate
    check_rate(rate, count)
    description = {
        "format_version": FORMAT_VERSION,
        "autoencoder": describe_autoencoder(networks.autoencoder),
        "identity": network_fingerprints(networks),
        "preprocessing": preprocessing_record(config.resolution),
        "resolution": config.resolution,
        "decoder_variance": statistics.variance,
        "false_positive_rate": rate,
        "false_positive_rate_interval": list(rate_interval(count, rate)),
        "smallest_false_positive_rate": smallest_rate(count),
        "by": config.by,
        "scores": {name: {"threshold": threshold(of_score, rate)} for name, of_score in normal.items()},
        "images": source.fingerprint(),
        "versions": provenance.versions(),
        "config": configuration.to_dict(config),
        "counts": {"learnt_from": learned_from, "held_out": count},
        "rejected": rejected_images(rejected),
    }
    return Detector(statistics, normal, np.array(sorted(marks), np.int64), description)


def _check_count(count: int) -> None:
    if count < FEWEST_IMAGES:
        raise UserError(
            f"data: {pluralize(count, 'normal image')} to learn from, fewer than {FEWEST_IMAGES}; add images, raise "
            "count, or lower data.held_out"
        )


def network_fingerprints(networks: scores.Networks) -> dict[str, Any]:
    """What a detector is bound to: the fingerprints of its networks."""
    return {
        "autoencoder": networks.autoencoder.fingerprint(),
        "flow_network": None if networks.pipeline is None else fingerprint(networks.pipeline.unet),
        "perceptual_network": None if networks.lpips is None else _tensors_digest(networks.lpips.state_dict()),
    }


def _tensors_digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return f"sha256:{found.hexdigest()}"


# The folder: detector.json, detector.safetensors, run.json and checksums.


def check_detector_folder(output: Path) -> None:
    """Raises: UserError when something other than a detector is in the way, also beside one: it would be replaced."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if output.is_file() or (names and DESCRIPTION not in names) or names - OWN_FILES:
        raise UserError(f"output: {output} holds something else; give a new folder")


def save_detector(detector: Detector, output: Path, started: float) -> None:
    """Write the folder, complete or not at all; an earlier detector there is replaced."""
    from safetensors.torch import save_file

    tensors = {"seen": torch.from_numpy(detector.seen)}
    tensors |= {f"normal/{name}": torch.from_numpy(values) for name, values in detector.normal.items()}
    for name in GAUSSIANS:
        gaussian: scores.Gaussian = getattr(detector.statistics, name)
        tensors |= {f"{name}/{field.name}": getattr(gaussian, field.name).contiguous() for field in fields(gaussian)}
    advice = "free some space or make it writable, and run the same command again"
    with system_errors_explained(output, advice), published_directory(output.absolute()) as temporary:
        save_file(tensors, temporary / TENSORS)
        write_json(temporary / DESCRIPTION, detector.description)
        provenance.write_run_record(temporary, None, started, time.time() - started, images=len(detector.seen))
        write_checksums(temporary)


def load_detector(folder: str | Path) -> Detector:
    """Raises: UserError for a folder that is not a detector, a damaged one, or one of another format."""
    folder = Path(folder)
    DETECTOR.find(folder, "detector")
    with parsing(f"detector: {folder}", "restore it from a copy, or fit it again"):
        description, tensors = read_described_folder(folder, DESCRIPTION, TENSORS, FORMAT_VERSION)
        return _assembled(description, tensors, str(folder))


def _assembled(description: dict[str, Any], tensors: dict[str, Tensor], folder: str) -> Detector:
    """Raises: ValueError, KeyError or TypeError where the parts do not belong together."""
    gaussians = {
        name: scores.Gaussian(*(tensors[f"{name}/{field.name}"] for field in fields(scores.Gaussian)))
        for name in GAUSSIANS
    }
    for name, gaussian in gaussians.items():
        size = len(gaussian.mean)
        if gaussian.deviation.shape != (size,) or gaussian.precision.shape != (size, size) or not size:
            raise ValueError(f"the Gaussian of {name} has parts of different sizes")
    if len(gaussians["pooled"].mean) != 2 * len(gaussians["positions"].mean):
        raise ValueError("the Gaussians are of different autoencoders")
    normal = {name: tensors[f"normal/{name}"].double().numpy() for name in description["scores"]}
    if len({values.shape for values in normal.values()}) != 1 or any(values.ndim != 1 for values in normal.values()):
        raise ValueError("the held-out scores differ in number")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError("a number is not finite")
    variance = float(description["decoder_variance"])
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"decoder_variance is {variance}")
    scores.check_score(str(description["by"]), normal)
    statistics = scores.NormalStatistics(variance, gaussians["positions"], gaussians["pooled"])
    detector = Detector(statistics, normal, tensors["seen"].to(torch.int64).numpy(), description, folder)
    if not 0 < detector.rate < 1 or not 0 < detector.resolution < 1 << 16:
        raise ValueError(f"false_positive_rate is {detector.rate}, resolution {detector.resolution}")
    detector.thresholds()
    return detector


# Thresholds, percentiles and p-values from the scores of held-out normal images.


def smallest_rate(count: int) -> float:
    """The smallest false-positive rate that `count` held-out normal images support."""
    return 1 / (count + 1)


def rounded_up(rate: float) -> str:
    """A rate in four digits that is not below it."""
    return f"{math.ceil(1e4 * rate) / 1e4:.4g}"


def images_for(rate: float) -> int:
    """Held-out normal images that a false-positive rate needs."""
    return math.ceil(round(1 / rate, 9)) - 1


def check_rate(rate: float, count: int) -> None:
    """Raises: UserError when `count` held-out normal images are too few for the rate."""
    if count < images_for(rate):
        raise UserError(
            f"false_positive_rate: {rate} needs {images_for(rate)} held-out normal images, here are {count}, which "
            f"support {rounded_up(smallest_rate(count))} at the least; set that, raise data.held_out or "
            "add images"
        )


def rank_of(count: int, rate: float) -> int:
    """The threshold is the so-manyth smallest of `count` scores, 1 to `count`."""
    return math.ceil(round((count + 1) * (1 - rate), 9))


def threshold(normal: np.ndarray, rate: float) -> float:
    """What at most `rate` of new normal images exceed on average; `normal`: scores (n,). Raises: UserError."""
    check_rate(rate, len(normal))
    return float(np.sort(normal)[rank_of(len(normal), rate) - 1])


def rate_interval(count: int, rate: float, level: float = 0.95) -> tuple[float, float]:
    """Where the true rate of one threshold lies: its average is promised, its own value is Beta distributed."""
    from scipy.stats import beta

    rank = rank_of(count, rate)
    low, high = beta.ppf([(1 - level) / 2, (1 + level) / 2], count + 1 - rank, rank)
    return float(low), float(high)


def percentiles(normal: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share in percent of the held-out normal images that score below each of `values` (m,)."""
    return 100 * np.searchsorted(np.sort(normal), values, side="left") / len(normal)


def p_values(normal: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(1 + normal scores not below) / (n + 1) for each of `values` (m,): the conformal p of "this image is normal"."""
    below = np.searchsorted(np.sort(normal), values, side="left")
    return (1 + len(normal) - below) / (len(normal) + 1)
