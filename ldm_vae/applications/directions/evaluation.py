"""`ldm-vae directions evaluate`: edit held-out images by every direction and measure what changed.

What pixels tell is measured on the edited pictures; classes, tables and scenes are read off them by a small network
that is trained on unedited images, where it can read them. What the figures say is `judgement`'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.applications.directions import known, measured
from ldm_vae.applications.directions.editing import edited
from ldm_vae.applications.directions.files import load_directions
from ldm_vae.applications.directions.fitting import Direction, scaled
from ldm_vae.applications.directions.judgement import Row, judge, slopes
from ldm_vae.applications.directions.known import Attribute
from ldm_vae.applications.directions.page import write_page
from ldm_vae.applications.directions.reader import AttributeReader, reduced, train_reader
from ldm_vae.applications.directions.samples import LABELS, PIXELS, SCENE, check_continuous, distinct, pool, select
from ldm_vae.autoencoder.interface import decode, encode_moments
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.data import pixels
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.split import Part
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation import metrics
from ldm_vae.evaluation.fidelity.measurement import read_crops
from ldm_vae.evaluation.fidelity.reconstruction import compute_device
from ldm_vae.evaluation.result_folder import (
    alone_in,
    check_made_of,
    check_resolution,
    describe_autoencoder,
    finished_result,
    publishing,
)
from ldm_vae.files import write_json
from ldm_vae.latents.words import counted
from ldm_vae.random import numpy_rng

RESULTS = "results.json"
READABLE = 0.7
"""Correlation of reading and truth on reconstructions of images that the reader never saw."""
LEAST_IMAGES = 8
CONTROLS = 8


@dataclass(frozen=True)
class EvaluateDirectionsConfig:
    """`ldm-vae directions evaluate`.

    Args:
        directions: the folder that `directions fit` wrote.
        autoencoder: with the encoder that they were fitted to.
        output: the folder for the results.
        part: held_out (what neither training nor fit saw), train or all.
        resolution: side of the centre crop in pixels; take that of the fit.
        count: images that are edited.
        strengths: in standard deviations of the pooled latents, 0 among them.
        names: only these directions; null: all.
        attributes_from: besides pixels, which are always measured: labels, scene, or paths of tables, read by a network
            that is trained on the train part.
        circles: columns of tables that are in turns.
        reader_images: images that the reader is trained on, at most.
        reader_epochs: of its training.
        seed: of the reader and of the random directions that the others are compared with.
        examples: images in the pictures of the page.
        device: auto, cpu, cuda, cuda:1 ...
    """

    directions: str = "???"
    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    part: Part = "held_out"
    resolution: int = 256
    count: int = 32
    strengths: list[float] = field(default_factory=lambda: [-2.0, -1.0, 0.0, 1.0, 2.0])
    names: list[str] | None = None
    attributes_from: list[str] = field(default_factory=list)
    circles: list[str] = field(default_factory=list)
    reader_images: int = 2000
    reader_epochs: int = 15
    seed: int = 0
    examples: int = 2
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("resolution", "reader_images", "reader_epochs", "examples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not above 0")
        if self.count < LEAST_IMAGES:
            raise UserError(f"count: {self.count} is below {LEAST_IMAGES} images, the least that say anything")
        if len(set(self.strengths)) < 3 or 0.0 not in self.strengths:
            raise UserError(f"strengths: {self.strengths} needs three different numbers, 0 among them; try -2,-1,0,1,2")
        if PIXELS in self.attributes_from:
            raise UserError("attributes_from: pixels are measured anyway; leave it out")


@dataclass(frozen=True)
class Measurer:
    """Attributes of pictures: `names` of measured, then of read ones."""

    names: list[str]
    reader: AttributeReader | None
    columns: list[int]

    def measure(self, images: Tensor) -> np.ndarray:
        """Images (n, 3, h, w) in [-1, 1] -> (n, k) float64, after an 8-bit round trip."""
        images = pixels.from_uint8(pixels.to_uint8(images))
        found = [value.double()[:, None] for value in measured.measure(images).values()]
        if self.reader is not None:
            found.append(self.reader(reduced(images).cpu())[:, self.columns].double())
        return torch.cat([one.cpu() for one in found], dim=1).numpy()


def evaluate_directions(config: EvaluateDirectionsConfig, overwrite: bool = False) -> dict[str, Any]:
    """Measure, write results.json, results.md, index.html and run.json; return the first.

    A folder that holds the finished result of these settings is read, not redone. Raises: UserError.
    """
    started = time.time()
    autoencoder = load_autoencoder(config.autoencoder).to(compute_device(config.device))
    check_continuous(autoencoder, f"autoencoder {config.autoencoder}")
    check_resolution(config.resolution, autoencoder)
    found = load_directions(config.directions)
    found.check_autoencoder(autoencoder, f"autoencoder {config.autoencoder}")
    chosen = found.directions if config.names is None else [found.find(name) for name in config.names]
    described = describe_autoencoder(autoencoder)
    finished = finished_result(Path(config.output) / RESULTS, config, described["fingerprint"], overwrite)
    if finished is not None:
        check_made_of(config.output, {"other directions": (finished["directions"], found.digest)})
        return finished
    with alone_in(config.output):
        source, indices = select(config.data, config.part, config.count)
        rejected: list[tuple[str, str]] = []
        indices, images = read_crops(source, indices, config.resolution, rejected)
        if images is None or len(indices) < LEAST_IMAGES:
            raise UserError(
                f"data: {counted(len(indices), 'image')} can be read, {LEAST_IMAGES} are the least; give more"
            )
        latents = [encode_moments(autoencoder, image[None].to(autoencoder.device))[0] for image in images]
        pooled = np.concatenate([pool(z, source.id(i)) for z, i in zip(latents, indices)])
        unedited = torch.cat([decode(autoencoder, z).cpu() for z in latents])[
            ..., : images.shape[-2], : images.shape[-1]
        ]
        measurer, readable = make_measurer(config, source, indices, unedited)
        base = measurer.measure(unedited)
        deviations, correlations = spread_of(measurer.measure(images))
        rows: list[Row] = []
        matrix: dict[str, list[float]] = {}
        for direction in _shown(chosen):
            values = values_of(direction, latents, base, autoencoder, measurer, config.strengths)
            rows.append(judge(direction, measurer.names, values, config.strengths, deviations, correlations))
            matrix[direction.name] = slopes(values, config.strengths, deviations).mean(axis=0).tolist()
        control = control_of(pooled, latents, base, autoencoder, measurer, config, deviations)
        results = {
            "format_version": 1,
            "autoencoder": described,
            "directions": found.digest,
            "protocol": {
                "images": {"fingerprint": source.fingerprint(), "part": config.part, "count": len(indices)},
                "preprocessing": preprocessing_record(config.resolution),
                "fitted_to": found.images,
                "versions": provenance.versions(),
            },
            "identity_psnr_db": float(metrics.psnr(pixels.from_uint8(pixels.to_uint8(unedited)), images).mean()),
            "attributes": measurer.names,
            "readable": readable,
            "rows": [asdict(row) for row in rows],
            "changes": matrix,
            "random_direction": dict(zip(measurer.names, control.tolist())),
            "rejected": [{"id": name, "reason": reason} for name, reason in rejected],
            "config": configuration.to_dict(config),
        }
        strips = example_strips(chosen, rows, latents[: config.examples], autoencoder, config)
        with publishing(config.output):
            write_page(Path(config.output), results, rows, strips)
            write_json(Path(config.output) / RESULTS, results)
            provenance.write_run_record(
                config.output, None, started, time.time() - started, images=len(indices), directions=len(chosen)
            )
    return results


def make_measurer(
    config: EvaluateDirectionsConfig, source: ImageSource, indices: Sequence[int], unedited: Tensor
) -> tuple[Measurer, dict[str, float]]:
    """And for every attribute that is read: the correlation of reading and truth on reconstructions."""
    if not config.attributes_from:
        return Measurer(list(measured.MEASURED), None, []), {}
    _, training = select(config.data, "train" if config.part == "held_out" else "all", config.reader_images)
    overlap = set(indices)
    training, pictures = read_small(source, [i for i in training if i not in overlap], config.resolution)
    wanted = [a for a in attributes_of(config, source, training) if a.problem() is None]
    if not wanted:
        raise UserError(
            "attributes_from: none of these attributes varies enough in the images to train a reader; give more"
        )
    reader = train_reader(pictures, wanted, config.reader_epochs, config.seed)
    truth = {a.name: a for a in attributes_of(config, source, indices, least=False)}
    readings = reader(reduced(pixels.from_uint8(pixels.to_uint8(unedited)))).double().numpy()
    readable: dict[str, float] = {}
    for k, attribute in enumerate(wanted):
        values = truth[attribute.name].values if attribute.name in truth else np.zeros(len(indices))
        rows = np.isfinite(values)
        varied = rows.sum() >= LEAST_IMAGES and values[rows].std() > 0 and readings[rows, k].std() > 0
        readable[attribute.name] = float(np.corrcoef(values[rows], readings[rows, k])[0, 1]) if varied else 0.0
    columns = [k for k, a in enumerate(wanted) if readable[a.name] >= READABLE]
    names = distinct([Attribute(name, np.empty(0), False) for name in measured.MEASURED] + [wanted[k] for k in columns])
    return Measurer([a.name for a in names], reader, columns), readable


def attributes_of(
    config: EvaluateDirectionsConfig, source: ImageSource, indices: Sequence[int], least: bool = True
) -> list[Attribute]:
    """What is known of these images. `least`: refuse when they are of one class only."""
    found: list[Attribute] = []
    for origin in config.attributes_from:
        if origin == SCENE:
            found += known.of_scenes(known.scene_source(source), indices)
        elif origin == LABELS:
            labels = np.array([source.label(index) for index in indices], np.int64)
            if least or len(set(labels.tolist()) - {-1}) > 1:
                found += known.of_classes(labels, source.label_names, "labels")
        else:
            found += known.of_table(origin, [source.id(index) for index in indices], config.circles)
    return distinct(found)


def read_small(source: ImageSource, indices: Sequence[int], resolution: int) -> tuple[list[int], Tensor]:
    """The readable ones of these images and their pictures (n, 3, 64, 64). Raises: UserError for too few."""
    found, pictures = [], []
    for index in indices:
        read, image = read_crops(source, [index], resolution, [])
        if image is not None:
            found += read
            pictures.append(reduced(image))
    if len(found) < known.LEAST_IMAGES:
        raise UserError(
            f"reader_images: {counted(len(found), 'image')} to train the reader on; {known.LEAST_IMAGES} are the least"
        )
    return found, torch.cat(pictures)


def spread_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of attributes (n, k) of unedited images: standard deviations (k,) and correlations (k, k)."""
    deviations = np.maximum(values.std(axis=0), 1e-9)
    standard = (values - values.mean(axis=0)) / deviations
    return deviations, standard.T @ standard / len(values)


def values_of(
    direction: Direction, latents: Sequence[Tensor], base: np.ndarray, autoencoder: Any, measurer: Measurer,
    strengths: Sequence[float],
) -> np.ndarray:  # fmt: skip
    """Attributes (n, s, k) of every image at every strength; `base` (n, k) are those at 0."""
    moving = [s for s in strengths if s != 0]
    found = np.empty((len(latents), len(strengths), base.shape[1]))
    for number, latent in enumerate(latents):
        moved = edited(latent, direction.vector, moving)
        decoded = torch.cat([decode(autoencoder, one[None]).cpu() for one in moved])
        found[number, [s != 0 for s in strengths]] = measurer.measure(decoded)
        found[number, [s == 0 for s in strengths]] = base[number]
    return found


def control_of(
    pooled: np.ndarray, latents: Sequence[Tensor], base: np.ndarray, autoencoder: Any, measurer: Measurer,
    config: EvaluateDirectionsConfig, deviations: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Rms change (k,) by random directions of the same length: what an edit does that knows nothing."""
    rng = numpy_rng(config.seed, "random directions")
    squares = []
    for number in range(CONTROLS):
        vector = scaled(rng.standard_normal(pooled.shape[1]) * pooled.std(axis=0), pooled)
        direction = Direction(f"random/{number}", vector, None, {})
        values = values_of(direction, latents[:LEAST_IMAGES], base, autoencoder, measurer, [-1.0, 0.0, 1.0])
        squares.append(np.square(slopes(values, [-1.0, 0.0, 1.0], deviations)).mean(axis=0))
    return np.sqrt(np.mean(squares, axis=0))


def example_strips(
    chosen: Sequence[Direction], rows: Sequence[Row], latents: Sequence[Tensor], autoencoder: Any,
    config: EvaluateDirectionsConfig,
) -> list[tuple[Row, list[Tensor]]]:  # fmt: skip
    """For each direction the pictures (s, 3, h, w) of the first images at every strength."""
    return [
        (
            row,
            [
                torch.cat([decode(autoencoder, one[None]).cpu() for one in edited(z, d.vector, config.strengths)])
                for z in latents
            ],
        )
        for d, row in zip(chosen, rows)
    ]


def _shown(directions: Sequence[Direction]) -> Any:
    from tqdm import tqdm

    return tqdm(directions, desc="editing", unit="direction", dynamic_ncols=True, leave=False)
