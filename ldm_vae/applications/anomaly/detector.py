"""From the scores of held-out normal images to a threshold, a percentile and a verdict.

The threshold is an order statistic, so its promise needs no distribution: of new normal images, drawn as these were, at
most the stated rate is called anomalous on average. n images can promise no rate below 1 / (n + 1).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.applications.anomaly import scores
from ldm_vae.applications.anomaly.images import Crop, batches, read_crops, refuse_enlarged, stack
from ldm_vae.applications.anomaly.scores import (
    STRIDE,
    Gaussian,
    Learnt,
    Models,
    check_pipeline_size,
    learn,
    load_models,
    measure,
)
from ldm_vae.autoencoder.losses import Backbone
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.data.open import open_source
from ldm_vae.data.samples import evenly_spaced
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.split import subset
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import DamagedFile, UserError
from ldm_vae.evaluation.study import check_resolution, describe_autoencoder, finished_result
from ldm_vae.files import (
    MANIFEST,
    MAXIMUM_JSON_BYTES,
    check_tensor_file,
    checksum,
    publish_directory,
    system_errors_explained,
    temporary_directory,
    verify_checksums,
    write_checksums,
    write_json,
)
from ldm_vae.training.distributed import compute_device
from ldm_vae.utils.text import pluralize


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


# The detector: a folder with what was learnt of normal images, bound to one autoencoder and one preprocessing.

FORMAT_VERSION = 1
DESCRIPTION, TENSORS = "detector.json", "detector.safetensors"
OWN_FILES = {DESCRIPTION, TENSORS, provenance.RUN_RECORD, MANIFEST}
GAUSSIANS = ("positions", "pooled")
ADVICE = "restore it from a copy, or fit it again"


@dataclass(frozen=True)
class Detector:
    """What `anomaly fit` made.

    Args:
        normal: score -> its values on the held-out normal images (n,), in their order.
        seen: marks of all images that it was fitted to, sorted, int64 (see `images.Crop.mark`).
        description: content of `detector.json`.
    """

    learnt: Learnt
    normal: dict[str, np.ndarray]
    seen: np.ndarray
    description: dict[str, Any]

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

    def thresholds(self) -> dict[str, float]:
        return {name: threshold(values, self.rate) for name, values in self.normal.items()}


def identity(models: Models) -> dict[str, Any]:
    """What a detector is bound to: the fingerprints of its networks."""
    return {
        "autoencoder": fingerprint(models.autoencoder),
        "flow_network": None if models.pipeline is None else fingerprint(models.pipeline.unet),
        "perceptual_network": None if models.lpips is None else _tensors_digest(models.lpips.state_dict()),
    }


def save_detector(detector: Detector, output: Path, started: float) -> None:
    """Write the folder, complete or not at all; an earlier detector there is replaced."""
    from safetensors.torch import save_file

    tensors = {"seen": torch.from_numpy(detector.seen)}
    tensors |= {f"normal/{name}": torch.from_numpy(values) for name, values in detector.normal.items()}
    for name in GAUSSIANS:
        gaussian: Gaussian = getattr(detector.learnt, name)
        tensors |= {f"{name}/{field.name}": getattr(gaussian, field.name).contiguous() for field in fields(gaussian)}
    with system_errors_explained(output, "free some space or make it writable, and run the same command again"):
        temporary = temporary_directory(output.absolute())
        try:
            save_file(tensors, temporary / TENSORS)
            write_json(temporary / DESCRIPTION, detector.description)
            provenance.write_run_record(temporary, None, started, time.time() - started, images=len(detector.seen))
            write_checksums(temporary)
            publish_directory(temporary, output.absolute())
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def load_detector(folder: str | Path) -> Detector:
    """Raises: UserError for a folder that is no detector, a damaged one, or one of a newer format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        what = "holds no detector.json" if folder.is_dir() else "no such directory"
        raise UserError(f"detector: {folder}: {what}; give the folder that `ldm-vae anomaly fit` wrote")
    if (folder / DESCRIPTION).stat().st_size > MAXIMUM_JSON_BYTES:
        raise UserError(f"detector: {folder}/{DESCRIPTION}: is larger than any detector's; {ADVICE}")
    try:
        verify_checksums(folder)
    except DamagedFile as error:
        raise DamagedFile(f"detector: {folder}", error.what, ADVICE) from error
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        version = description["format_version"]
        if type(version) is int and version > FORMAT_VERSION:
            raise UserError(
                f"detector: {folder}: has format version {version}, this program reads {FORMAT_VERSION}; update ldm_vae"
            )
        check_tensor_file(folder / TENSORS)
        return _assembled(description, load_file(folder / TENSORS))
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"detector: {folder}: cannot be read ({type(error).__name__}: {error}); {ADVICE}") from error


def _assembled(description: dict[str, Any], tensors: dict[str, Tensor]) -> Detector:
    """Raises: ValueError, KeyError or TypeError where the parts do not belong together."""
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {description['format_version']}")
    gaussians = {name: Gaussian(*(tensors[f"{name}/{field.name}"] for field in fields(Gaussian))) for name in GAUSSIANS}
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
    scores.check_name(str(description["by"]), normal)
    learnt = Learnt(variance, gaussians["positions"], gaussians["pooled"])
    detector = Detector(learnt, normal, tensors["seen"].to(torch.int64).numpy(), description)
    if not 0 < detector.rate < 1 or not 0 < detector.resolution < 1 << 16:
        raise ValueError(f"false_positive_rate is {detector.rate}, resolution {detector.resolution}")
    detector.thresholds()
    return detector


def models_of(
    detector: Detector,
    folder: str,
    autoencoder: str,
    device: torch.device,
    pipeline: str | None,
    perceptual_weights: str | None,
) -> Models:
    """The networks that the detector was fitted with.

    Args:
        folder: of the detector, for messages.

    Raises:
        UserError: one is missing, not needed, or another one.
    """
    settings, bound = detector.description["config"], detector.description["identity"]
    if bound["flow_network"] and pipeline is None:
        raise UserError(f"pipeline: missing; {folder} has flow scores, give the pipeline that it was fitted with")
    if pipeline is not None and not bound["flow_network"]:
        raise UserError(f"pipeline: has no effect, {folder} was fitted without one; leave it out, or fit with it")
    if perceptual_weights is not None and not bound["perceptual_network"]:
        raise UserError(f"perceptual_weights: has no effect, {folder} has no perceptual score; leave it out")
    models = load_models(
        autoencoder, device, pipeline, settings["perceptual_net"], perceptual_weights, settings["regret_steps"]
    )
    given = {"autoencoder": autoencoder, "flow_network": pipeline, "perceptual_network": perceptual_weights}
    for name, found in identity(models).items():
        if found != bound[name]:
            raise UserError(
                f"detector: {folder} was fitted with another {name.replace('_', ' ')} than {given[name]} "
                f"({str(bound[name])[:15]}, here {str(found)[:15]}); give that one, or fit a detector for this one"
            )
    return models


def check_output(output: Path) -> None:
    """Raises: UserError when something other than a detector is in the way, also beside one: it would be replaced."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if output.is_file() or (names and DESCRIPTION not in names) or names - OWN_FILES:
        raise UserError(f"output: {output} holds something else; give a new folder")


def digest(folder: str | Path) -> str:
    """Changes with every byte of the detector."""
    return checksum(Path(folder) / MANIFEST)


def _tensors_digest(tensors: dict[str, Tensor]) -> str:
    import hashlib

    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return f"sha256:{found.hexdigest()}"


# Fitting a detector: settings, which normal images teach it and which set its thresholds, and its folder.

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
        resolution: side of the center crop in pixels; no image may be smaller.
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
        "train": evenly_spaced(len(parts["train"]), config.count),
        "held_out": evenly_spaced(len(parts["held_out"]), config.held_out_count),
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
        f"data: {pluralize(count, 'normal image')} to learn from, fewer than {FEWEST_IMAGES}; add images, raise "
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
