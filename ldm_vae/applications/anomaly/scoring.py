"""Scoring images with a detector: percentile and verdict of each.

`scores.csv` and `scores.json` hold every image, the most anomalous first; `index.html` shows the first of them beside
their heat maps.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ldm_vae import provenance
from ldm_vae.applications.anomaly import scores
from ldm_vae.applications.anomaly.detector import load_detector, p_values, percentiles
from ldm_vae.applications.anomaly.images import crop_batches, embedded, heat_picture, mark, stack
from ldm_vae.applications.anomaly.scores import measure_scores
from ldm_vae.config import check_positive
from ldm_vae.data import open_source
from ldm_vae.data.samples import Rejected, evenly_spaced, iterate_crops, none_readable
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.survey import describe_images
from ldm_vae.errors import UserError
from ldm_vae.evaluation.pages import template_environment
from ldm_vae.evaluation.study import PAGE, Content, Results, Study, StudyPlan, rejected_images
from ldm_vae.utils.text import csv_cell, pluralize

ScoredImage = dict[str, Any]
"""One image in scores.json."""


@dataclass(frozen=True)
class ScoreImagesConfig:
    """`ldm-vae anomaly score`: the percentile among the held-out normal images, and a verdict.

    Writes scores.csv, scores.json and index.html with heat maps, the strangest first, into the output folder. Needs the
    autoencoder (and, where they were used, the model and the perceptual weights) that the detector was fitted with.

      ldm-vae anomaly score runs/detector autoencoder=runs/mine data=~/new output=runs/new

    Args:
        detector: the folder that `anomaly fit` wrote.
        autoencoder: the autoencoder of the fit.
        output: the folder for the scores.
        data: the images.
        by: the score that decides verdict and order; null: that of the detector.
        count: largest number of images, evenly spread; null: all.
        shown: number of example images on the page, the most anomalous ones.
        pipeline: the diffusion pipeline of the fit, if it had one.
        perceptual_weights: a local safetensors file of the LPIPS backbone, as in the fit; null: torchvision's download.
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
        check_positive(self, "batch", "count")
        if self.shown < 0:
            raise UserError(f"shown: {self.shown} is negative; give 0 for no pictures")


def score_images(config: ScoreImagesConfig, *, overwrite: bool = False, dry_run: bool = False) -> Results:
    """Measure, write the folder, return the content of `scores.json`. A finished one of these settings is read.

    Raises:
        UserError: the folder holds a result of other settings; an unknown score; a detector of another autoencoder.
    """
    return ImageScores(config, overwrite).run(dry_run)


class ImageScores(Study):
    """The study of `ldm-vae anomaly score`."""

    results_file = "scores.json"
    command, product = "anomaly score", "the scores"
    config: ScoreImagesConfig

    def __init__(self, config: ScoreImagesConfig, overwrite: bool) -> None:
        self.detector = load_detector(config.detector)
        self.by = config.by or self.detector.by
        scores.check_score(self.by, self.detector.normal)
        self.networks = self.detector.networks(
            config.autoencoder, config.device, config.pipeline, config.perceptual_weights
        )
        self.source = open_source(config.data)
        super().__init__(config, self.networks.autoencoder, overwrite=overwrite)

    def inputs(self, results: Results) -> dict[str, tuple[Any, Any]]:
        return {
            "another detector": (results["detector"]["digest"], self.detector.digest),
            "other images": (results["images_fingerprint"], self.source.fingerprint()),
        }

    def work(self) -> StudyPlan:
        chosen = evenly_spaced(len(self.source), self.config.count)
        what = (describe_images(self.source, len(chosen)), f"{self.detector.resolution} pixels", f"by {self.by}")
        networks = (self.config.detector, self.config.autoencoder, str(self.autoencoder.device))
        return StudyPlan((*what, *networks), self.source, chosen, self.detector.resolution)

    def measure(self) -> Results:
        rejected: Rejected = []
        rows = self._rows(rejected)
        if not rows:
            raise none_readable("data", len(self.source), rejected)
        return {
            "detector": {"digest": self.detector.digest, "false_positive_rate": self.detector.rate},
            "by": self.by,
            "threshold": self.detector.thresholds()[self.by],
            "held_out": len(self.detector.normal[self.by]),
            "images_fingerprint": self.source.fingerprint(),
            "images": rows,
            "rejected": rejected_images(rejected),
            "versions": provenance.versions(),
        }

    def _rows(self, rejected: Rejected) -> list[ScoredImage]:
        """One record an image, the most anomalous first."""
        detector, config = self.detector, self.config
        chosen = evenly_spaced(len(self.source), config.count)
        seen = set(detector.seen.tolist())
        normal, threshold = detector.normal[self.by], detector.thresholds()[self.by]
        rows: list[ScoredImage] = []
        crops = iterate_crops(self.source, chosen, detector.resolution, rejected, [])  # each row says it
        for batch in crop_batches(crops, config.batch, len(chosen), "scoring"):
            measured = measure_scores(
                self.networks, detector.statistics, stack(batch), [crop.id for crop in batch]
            ).values
            by_score = measured[self.by].numpy()
            columns = zip(batch, by_score, percentiles(normal, by_score), p_values(normal, by_score))
            for number, (crop, value, percentile, p) in enumerate(columns):
                rows.append(
                    {
                        "id": crop.id, "score": float(value), "percentile": float(percentile), "p_value": float(p),
                        "verdict": "anomalous" if value > threshold else "normal", "index": crop.index,
                        "enlarged": crop.enlarged, "seen": mark(crop) in seen,
                        "scores": {name: float(of_score[number]) for name, of_score in measured.items()},
                    }
                )  # fmt: skip
        return sorted(rows, key=lambda row: -row["score"])

    def files(self, results: Results) -> dict[str, Content]:
        return {"scores.csv": scores_csv(results["images"])}

    def page(self, results: Results) -> str:
        """The heat maps on it are measured again, so that not all are kept."""
        quantity = scores.score_quantity(self.by) if scores.SCORES[scores.score_quantity(self.by)].local else "l1"
        peak = self.detector.thresholds()[quantity + scores.PEAK]
        examples = []
        shown = [row["index"] for row in results["images"][: self.config.shown]]
        for row, crop in zip(results["images"], iterate_crops(self.source, shown, self.detector.resolution, [], [])):
            heat = (
                measure_scores(self.networks, self.detector.statistics, stack([crop]), [crop.id])
                .maps[quantity][0]
                .numpy()
            )
            picture = embedded(heat_picture(heat, peak, len(crop.pixels)), f"heat map, {quantity}")
            examples.append((row, embedded(Image.fromarray(crop.pixels), crop.id), picture))
        context = {
            "results": results,
            "title": scores.title(self.by),
            "quantity": quantity,
            **{name: count(results["images"], name) for name in ("anomalous", "enlarged", "seen")},
            "examples": examples,
        }
        return template_environment().get_template("anomaly_scores.html").render(context)

    def record(self, results: Results) -> dict[str, Any]:
        return {"images": len(results["images"])}

    def summary(self, results: Results) -> str:
        """What was found, in words, with the most anomalous images."""
        rows, files = results["images"], self.output / PAGE
        expected = results["detector"]["false_positive_rate"] * len(rows)
        lines = [
            f"{files}: {count(rows, 'anomalous')} of {pluralize(len(rows), 'image')} found anomalous by "
            f"{results['by']} (of normal ones about {expected:.0f} would be called so)"
        ]
        if small := count(rows, "enlarged"):
            lines.append(
                f"{pluralize(small, 'image')} smaller than the detector's crop, and enlarged, which alone may show"
            )
        if seen := count(rows, "seen"):
            lines.append(f"the detector was fitted to {seen} of them, whose percentiles mean little")
        if results["rejected"]:
            rejected = pluralize(len(results["rejected"]), "image")
            lines.append(f"{rejected} could not be read; {self.results_file} names them")
        lines += [f"  {row['percentile']:5.1f} %  {row['verdict']:<9}  {row['id']}" for row in rows[:10]]
        return "\n".join(lines)


def count(rows: list[ScoredImage], what: str) -> int:
    """Images that are `anomalous`, `enlarged` or `seen` by the detector before."""
    return sum(row["verdict"] == what if what == "anomalous" else row[what] for row in rows)


def scores_csv(rows: list[ScoredImage]) -> str:
    """`scores.csv`: verdict and percentile, then every score."""
    names = list(rows[0]["scores"])
    first = ["id", "verdict", "score", "percentile", "p_value", "enlarged", "seen"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*first, *names])
    writer.writerows([*(csv_cell(row[key]) for key in first), *(row["scores"][name] for name in names)] for row in rows)
    return text.getvalue()
