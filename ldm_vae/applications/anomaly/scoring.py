"""Scoring images of one's own: settings, percentile and verdict of each, and the result folder.

`scores.csv` and `scores.json` hold every image, the strangest first; `index.html` shows the first of them beside their
heat maps.
"""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.applications.anomaly import scores
from ldm_vae.applications.anomaly.detector import Detector, digest, load_detector, models_of, p_values, percentiles
from ldm_vae.applications.anomaly.evaluation import number
from ldm_vae.applications.anomaly.images import batches, embedded, heat_picture, read_crops, stack
from ldm_vae.applications.anomaly.scores import Models, measure
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.data.open import open_source
from ldm_vae.data.samples import evenly_spaced, none_readable
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.errors import UserError
from ldm_vae.evaluation.pages import template_environment
from ldm_vae.evaluation.study import alone_in, check_made_of, describe_autoencoder, finished_result, publishing
from ldm_vae.files import write_json, write_text
from ldm_vae.training.distributed import compute_device
from ldm_vae.utils.text import pluralize

RESULTS, TABLE, PAGE = "scores.json", "scores.csv", "index.html"
Row = dict[str, Any]


@dataclass(frozen=True)
class ScoreConfig:
    """`ldm-vae anomaly score`.

    Args:
        detector: the folder that `anomaly fit` wrote.
        autoencoder: the one that it was fitted with.
        output: the folder for the scores.
        data: the images.
        by: the score that gives verdict and order; null: that of the detector.
        count: at most so many images, evenly spread; null: all.
        shown: so many images, the strangest, on the page.
        pipeline: the one that the detector was fitted with, where it was.
        perceptual_weights: as when the detector was fitted.
        batch: images per forward pass.
        device: auto, cpu, cuda, cuda:1 ...
    """

    detector: str = "???"
    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    by: str | None = None
    count: int | None = None
    shown: int = 40
    pipeline: str | None = None
    perceptual_weights: str | None = None
    batch: int = 8
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("batch", "count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} is not above 0")
        if self.shown < 0:
            raise UserError(f"shown: {self.shown} is negative; give 0 for no pictures")


def score(config: ScoreConfig, overwrite: bool = False) -> dict[str, Any]:
    """Measure, write the folder, return the content of `scores.json`. A finished one of these settings is read.

    Raises:
        UserError: the folder holds a result of other settings; an unknown score; a detector of another autoencoder.
    """
    started = time.time()
    output = Path(config.output)
    detector = load_detector(config.detector)
    by = config.by or detector.by
    scores.check_name(by, detector.normal)
    models = models_of(
        detector, config.detector, config.autoencoder, compute_device(config.device), config.pipeline,
        config.perceptual_weights,
    )  # fmt: skip
    finished = finished_result(output / RESULTS, config, fingerprint(models.autoencoder), overwrite)
    source = open_source(config.data)
    if finished is not None:
        parts = {
            "another detector": (finished["detector"]["digest"], digest(config.detector)),
            "other images": (finished["images_fingerprint"], source.fingerprint()),
        }
        check_made_of(output, parts)
        return finished
    with alone_in(output):
        rejected: list[tuple[str, str]] = []
        rows = _measure(config, detector, models, source, by, rejected)
        if not rows:
            raise none_readable("data", len(source), rejected)
        results = {
            "format_version": 1,
            "autoencoder": describe_autoencoder(models.autoencoder),
            "detector": {"digest": digest(config.detector), "false_positive_rate": detector.rate},
            "by": by,
            "threshold": detector.thresholds()[by],
            "held_out": len(detector.normal[by]),
            "images_fingerprint": source.fingerprint(),
            "images": rows,
            "rejected": [{"id": name, "reason": reason} for name, reason in rejected],
            "versions": provenance.versions(),
            "config": configuration.to_dict(config),
        }
        page = render(results, detector, source, models, config.shown)
        with publishing(output):
            write_text(output / TABLE, table(rows))
            write_text(output / PAGE, page)
            write_json(output / RESULTS, results)
            provenance.write_run_record(output, None, started, time.time() - started, images=len(rows))
    return results


def _measure(
    config: ScoreConfig,
    detector: Detector,
    models: Models,
    source: ImageSource,
    by: str,
    rejected: list[tuple[str, str]],
) -> list[Row]:
    """One record an image, the strangest first."""
    chosen = evenly_spaced(len(source), config.count)
    found: list[Row] = []
    seen = set(detector.seen.tolist())
    for batch in batches(
        read_crops(source, chosen, detector.resolution, rejected), config.batch, len(chosen), "scoring"
    ):
        ids = [crop.id for crop in batch]
        measured = measure(models, detector.learnt, stack(batch), ids).values
        for row, crop in enumerate(batch):
            values = {name: float(of_score[row]) for name, of_score in measured.items()}
            told = {"enlarged": crop.enlarged, "seen": crop.mark() in seen}
            found.append({"id": crop.id, "index": crop.index, **told, "scores": values})
    by_score = np.array([row["scores"][by] for row in found])
    normal, threshold = detector.normal[by], detector.thresholds()[by]
    columns = zip(found, by_score, percentiles(normal, by_score), p_values(normal, by_score))
    rows = [
        {
            "id": row["id"], "score": float(value), "percentile": float(percentile), "p_value": float(p),
            "verdict": "anomalous" if value > threshold else "normal", **row,
        }
        for row, value, percentile, p in columns
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["score"])


def table(rows: list[Row]) -> str:
    """`scores.csv`: verdict and percentile, then every score."""
    names = list(rows[0]["scores"])
    first = ["id", "verdict", "score", "percentile", "p_value", "enlarged", "seen"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*first, *names])
    writer.writerows([*(row[key] for key in first), *(row["scores"][name] for name in names)] for row in rows)
    return text.getvalue()


def render(results: dict[str, Any], detector: Detector, source: ImageSource, models: Models, shown: int) -> str:
    """The page as HTML text; the heat maps of the images on it are measured again, so that not all are kept."""
    by = results["by"]
    quantity = scores.base(by) if scores.MEASURED[scores.base(by)].local else "l1"
    peak = detector.thresholds()[quantity + scores.PEAK]
    examples = []
    for row in results["images"][:shown]:
        (crop,) = read_crops(source, [row["index"]], detector.resolution, [])
        heat = measure(models, detector.learnt, stack([crop]), [crop.id]).maps[quantity][0].numpy()
        image, side = Image.fromarray(crop.pixels), len(crop.pixels)
        colored = heat_picture(heat, peak, side)
        examples.append((row, embedded(image, crop.id), embedded(colored, f"heat map, {quantity}")))
    context = {
        "results": results,
        "title": scores.title(by),
        "quantity": quantity,
        "anomalous": sum(row["verdict"] == "anomalous" for row in results["images"]),
        "enlarged": sum(row["enlarged"] for row in results["images"]),
        "seen": sum(row["seen"] for row in results["images"]),
        "examples": examples,
        "number": number,
    }
    return template_environment().get_template("anomaly_scores.html").render(context)


def summary(results: dict[str, Any], output: str) -> str:
    """What was found, in words, with the strangest images."""
    rows = results["images"]
    flagged = sum(row["verdict"] == "anomalous" for row in rows)
    expected = results["detector"]["false_positive_rate"] * len(rows)
    lines = [
        f"{output}/index.html: {flagged} of {pluralize(len(rows), 'image')} found anomalous by {results['by']} (of "
        f"normal ones about {expected:.0f} would be called so)"
    ]
    if small := sum(row["enlarged"] for row in rows):
        lines.append(
            f"{pluralize(small, 'image')} smaller than the detector's crop, and enlarged, which alone may show"
        )
    if seen := sum(row["seen"] for row in rows):
        lines.append(f"the detector was fitted to {seen} of them, whose percentiles mean little")
    if results["rejected"]:
        lines.append(f"{pluralize(len(results['rejected']), 'image')} could not be read; {RESULTS} names them")
    lines += [f"  {row['percentile']:5.1f} %  {row['verdict']:<9}  {row['id']}" for row in rows[:10]]
    return "\n".join(lines)
