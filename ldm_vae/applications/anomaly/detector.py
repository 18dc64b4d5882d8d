"""The detector: a folder with what was learnt of normal images, bound to one autoencoder and one preprocessing.

    detector.json         settings, identity of the models, preprocessing, threshold of each score
    detector.safetensors  the Gaussians, the held-out normal scores, marks of the images that were used
    run.json              where it comes from
    MANIFEST.json         a checksum of each

Owns the files. Fitting is `fitting`'s, measuring `measurement`'s.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae import provenance
from ldm_vae.applications.anomaly import scores
from ldm_vae.applications.anomaly.gaussian import Gaussian
from ldm_vae.applications.anomaly.measurement import Learnt, Models, load_models
from ldm_vae.applications.anomaly.threshold import threshold
from ldm_vae.autoencoder.fingerprint import fingerprint
from ldm_vae.errors import UserError
from ldm_vae.files import (
    checksum,
    publish_directory,
    system_errors_explained,
    temporary_directory,
    write_json,
)
from ldm_vae.seal import MANIFEST, damage, seal
from ldm_vae.tensor_files import MAXIMUM_JSON_BYTES, check_tensor_file

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
            seal(temporary)
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
    if (problem := damage(folder)) is not None:
        raise UserError(f"detector: {folder}: {problem}; {ADVICE}")
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
