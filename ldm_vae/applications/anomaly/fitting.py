"""Fitting a detector: settings, which normal images teach it and which set its thresholds, and its folder.

The part `train` of the images is learnt from, the part `held_out` sets the thresholds: the same parts as in the
training of an autoencoder on them, so that the threshold comes from images that nothing here has seen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.applications.anomaly import scores
from ldm_vae.applications.anomaly.detector import (
    DESCRIPTION,
    FORMAT_VERSION,
    Detector,
    check_output,
    identity,
    load_detector,
    save_detector,
)
from ldm_vae.applications.anomaly.images import Crop, batches, read_crops, refuse_enlarged, stack
from ldm_vae.applications.anomaly.maps import STRIDE
from ldm_vae.applications.anomaly.measurement import Models, check_pipeline_size, learn, load_models, measure
from ldm_vae.applications.anomaly.threshold import check_rate, rate_interval, rounded_up, smallest_rate, threshold
from ldm_vae.autoencoder.fingerprint import fingerprint
from ldm_vae.autoencoder.perceptual import Backbone
from ldm_vae.data.sources import DataConfig, ImageSource, open_source
from ldm_vae.data.split import subset
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation.fidelity.measurement import spread
from ldm_vae.evaluation.fidelity.reconstruction import compute_device
from ldm_vae.evaluation.result_folder import check_resolution, describe_autoencoder, finished_result
from ldm_vae.latents.words import counted

FEWEST_IMAGES = 16
"""That a detector is fitted to."""
SMALLEST_RESOLUTION = 64


@dataclass(frozen=True)
class FitConfig:
    """`ldm-vae anomaly fit`.

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id; of any kind.
        output: the folder of the detector.
        data: normal images only. `data.held_out` of them set the thresholds.
        resolution: side of the centre crop in pixels; no image may be smaller.
        count: at most so many images to learn from; null: all.
        held_out_count: at most so many images to set the thresholds; null: all.
        false_positive_rate: share of new normal images that a threshold may call anomalous.
        by: the score that gives the verdict.
        pipeline: a diffusion pipeline on this autoencoder's latents, for the flow scores.
        perceptual_net: the LPIPS network, for the perceptual score; null: without.
        perceptual_weights: a local safetensors file of its backbone; null: torchvision's download.
        regret_steps: of likelihood regret, which takes as many decodings and gradients an image; 0: without.
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
        for name in ("batch", "count", "held_out_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} is not above 0")
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


def fit(config: FitConfig, overwrite: bool = False) -> Detector:
    """Learn, measure the held-out images, write the detector. A finished one of these settings is read, not redone.

    Raises:
        UserError: the folder holds something else; too few normal images; images of mixed size; models that do not
            belong together.
    """
    started = time.time()
    output = Path(config.output)
    check_output(output)
    device = compute_device(config.device)
    models = load_models(
        config.autoencoder, device, config.pipeline, config.perceptual_net, config.perceptual_weights,
        config.regret_steps,
    )  # fmt: skip
    if finished_result(output / DESCRIPTION, config, fingerprint(models.autoencoder), overwrite) is not None:
        return load_detector(output)
    detector = fit_detector(config, models)
    save_detector(detector, output, started)
    return detector


def summary(detector: Detector, output: str) -> str:
    """What was fitted, in words."""
    found, rate = detector.description, detector.rate
    low, high = found["false_positive_rate_interval"]
    smallest = rounded_up(found["smallest_false_positive_rate"])
    counts = found["counts"]
    return (
        f"{output}: learnt from {counts['learnt_from']} normal images; {len(detector.normal)} scores with thresholds "
        f"from {counts['held_out']} others, at a false-positive rate of {rate:g} (so few can mean one from {low:.3f} "
        f"to {high:.3f}, and support {smallest} at the least); the verdict is by "
        f"{detector.by}"
    )


def fit_detector(config: FitConfig, models: Models) -> Detector:
    """The same without the folder. Raises: UserError."""
    check_resolution(config.resolution, models.autoencoder, STRIDE)
    check_pipeline_size(models, config.resolution)
    scores.check_name(config.by, models.names)
    source = open_source(config.data)
    parts = {part: subset(source, part, config.data.held_out) for part in ("train", "held_out")}  # type: ignore[arg-type]
    chosen = {
        "train": spread(len(parts["train"]), config.count),
        "held_out": spread(len(parts["held_out"]), config.held_out_count),
    }
    if len(chosen["train"]) < FEWEST_IMAGES:
        raise _too_few(len(chosen["train"]))
    check_rate(config.false_positive_rate, len(chosen["held_out"]))
    rejected: list[tuple[str, str]] = []
    marks: set[int] = set()

    def crops(part: str, task: str) -> Any:
        found = read_crops(parts[part], chosen[part], config.resolution, rejected)
        for batch in batches(found, config.batch, len(chosen[part]), task):
            refuse_enlarged(batch, config.resolution)
            fresh = []
            for crop in batch:
                if part == "train" or crop.mark() not in marks:  # a copy of what was learnt from sets no threshold
                    fresh.append(crop)
                marks.add(crop.mark())
            if fresh:
                yield fresh

    learnt = learn(models, (([crop.id for crop in batch], stack(batch)) for batch in crops("train", "learning")))
    learnt_from = len(chosen["train"]) - len(rejected)
    if learnt_from < FEWEST_IMAGES:
        raise _too_few(learnt_from)
    found: dict[str, list[np.ndarray]] = {name: [] for name in models.names}
    for batch in crops("held_out", "held-out scores"):
        for name, values in measure(models, learnt, stack(batch), _ids(batch)).values.items():
            found[name].append(values.numpy())
    normal = {name: np.concatenate(values) if values else np.zeros(0) for name, values in found.items()}
    count = len(next(iter(normal.values())))
    check_rate(config.false_positive_rate, count)
    counts = {"learnt_from": learnt_from, "held_out": count}
    return Detector(
        learnt, normal, np.array(sorted(marks), np.int64), _description(config, models, learnt.variance, normal, source)
        | {"counts": counts, "rejected": [{"id": name, "reason": reason} for name, reason in rejected]},
    )  # fmt: skip


def data_config(values: dict[str, Any]) -> DataConfig:
    """The settings of the images as a detector's description has them."""
    from omegaconf import OmegaConf

    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), values))  # type: ignore[return-value]


def _too_few(count: int) -> UserError:
    return UserError(
        f"data: {counted(count, 'normal image')} to learn from, fewer than {FEWEST_IMAGES}; add images, raise "
        "count, or lower data.held_out"
    )


def _ids(batch: list[Crop]) -> list[str]:
    return [crop.id for crop in batch]


def _description(
    config: FitConfig, models: Models, variance: float, normal: dict[str, np.ndarray], source: ImageSource
) -> dict[str, Any]:
    """What goes into `detector.json`, but for the counts."""
    count, rate = len(next(iter(normal.values()))), config.false_positive_rate
    return {
        "format_version": FORMAT_VERSION,
        "autoencoder": describe_autoencoder(models.autoencoder),
        "identity": identity(models),
        "preprocessing": preprocessing_record(config.resolution),
        "resolution": config.resolution,
        "decoder_variance": variance,
        "false_positive_rate": rate,
        "false_positive_rate_interval": list(rate_interval(count, rate)),
        "smallest_false_positive_rate": smallest_rate(count),
        "by": config.by,
        "scores": {name: {"threshold": threshold(values, rate)} for name, values in normal.items()},
        "images": source.fingerprint(),
        "versions": provenance.versions(),
        "config": configuration.to_dict(config),
    }
