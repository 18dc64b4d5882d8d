"""Which scores of a detector find known anomalies, which fail, and why.

    labeled images -> `Measurements` of each detector -> `score_metrics` -> results.json -> results.md, page and grid

With a baseline, another autoencoder is fitted to the detector's images and measured beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ldm_vae import provenance
from ldm_vae.applications.anomaly import metrics
from ldm_vae.applications.anomaly.detector import (
    Detector,
    FitDetectorConfig,
    learn_detector,
    load_detector,
    rate_interval,
)
from ldm_vae.applications.anomaly.images import (
    NORMAL,
    crop_batches,
    embedded,
    heat_picture,
    mark,
    mask_cells,
    open_labeled,
    outlined,
    refuse_enlarged,
    stack,
)
from ldm_vae.applications.anomaly.metrics import matched_auroc, partial_rank_correlation, rank_correlation
from ldm_vae.applications.anomaly.scores import (
    PEAK,
    SCORES,
    Networks,
    load_networks,
    measure_scores,
    score_quantity,
    title,
)
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.config import check_positive
from ldm_vae.data import open_source
from ldm_vae.data.samples import Crop, Rejected, evenly_spaced, iterate_crops
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.survey import describe_images
from ldm_vae.errors import UserError
from ldm_vae.evaluation.pages import template_environment
from ldm_vae.evaluation.plots import COLORS, INK, new_figure, page_svg
from ldm_vae.evaluation.study import Content, Results, Study, StudyPlan, describe_autoencoder, rejected_images
from ldm_vae.utils.image_grid import PAPER, labeled_sheet
from ldm_vae.utils.text import markdown_table, pluralize

FEWEST_OF_A_CLASS = 10
SHOWN_OF_A_KIND = 2
GRID_SIDE = 160
PNG_SIZE = "png_size"
"""Reported as if it were a score: what complexity alone does."""
STANDS_OUT = 1.5
"""Times the error around a defect, from which on it does not count as reconstructed."""
FEW_FOUND = 0.25
"""Share of the anomalous images: a few odd normal images set the threshold high, however well the ranks look."""
CLEARLY_BETTER = 0.05
"""Difference of two AUROC that counts as clear."""


@dataclass(frozen=True)
class EvaluateDetectorConfig:
    """`ldm-vae anomaly evaluate`: which scores find them, which fail, and why.

    Normal images are those with a label in `normal`; of the synthetic set those without a defect. With masks, heat maps
    are judged as well. `compare=DIR` adds another autoencoder, fitted to the same images, beside it. Writes
    results.json, results.md, index.html and grid.png.

      ldm-vae anomaly evaluate runs/detector autoencoder=runs/mine data=parts/test normal=good masks=parts/masks \\
        output=runs/anomaly
      ldm-vae anomaly evaluate runs/detector autoencoder=runs/mine compare=runs/plain data.synthetic.seed=2 \\
        data.synthetic.count=400 data.synthetic.defects=0.5 output=runs/anomaly

    Args:
        detector: the folder that `anomaly fit` wrote.
        autoencoder: the autoencoder of the fit.
        output: the folder for the report.
        data: normal and anomalous images; those that the detector was fitted to are left out.
        normal: labels of the normal images. In the synthetic set, images without a defect are normal.
        masks: a folder with a mask for each anomalous image, ID.png, white where the anomaly is; null: none.
        count: largest number of images of each class, evenly spread; null: all.
        prevalence: share of anomalous images for which precision is stated.
        baseline: another autoencoder to compare with, for example a plain one, fitted to the same images as the
            detector.
        pipeline: the diffusion pipeline of the fit, if it had one.
        perceptual_weights: a local safetensors file of the LPIPS backbone, as in the fit; null: torchvision's download.
        batch: images per forward pass.
        device: auto, cpu, cuda, cuda:1 ...
    """

    detector: str = "???"
    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    normal: list[str] = field(default_factory=list)
    masks: str | None = None
    count: int | None = None
    prevalence: float = 0.1
    baseline: str | None = None
    pipeline: str | None = None
    perceptual_weights: str | None = None
    batch: int = 8
    device: str = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "batch")
        if self.count is not None and self.count < FEWEST_OF_A_CLASS:
            raise UserError(f"count: {self.count} is under {FEWEST_OF_A_CLASS} a class; leave it out for all images")
        if not 0 < self.prevalence < 1:
            raise UserError(f"prevalence: {self.prevalence} is not between 0 and 1; 0.1 is one image in ten")


@dataclass
class ScoreMeasurements:
    """Everything measured of labeled images by one detector, one entry per image.

    Args:
        values: score -> its values. maps: quantity -> heat maps (h, w) float32, only where masks are known.
        masks: bool on the grid of the heat maps; empty where none is known.
        inside, outside: mean L1 within and around the mask of each anomalous image that has one.
    """

    ids: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    png_bytes: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    maps: dict[str, list[np.ndarray]] = field(default_factory=dict)
    masks: list[np.ndarray] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)

    @property
    def anomalous(self) -> np.ndarray:
        """bool (n,)."""
        return np.array([kind != NORMAL for kind in self.kinds])


@dataclass(frozen=True)
class AnomalyExample:
    """An image to look at: its crop, kind, mask (h, w) where known, and heat maps by quantity."""

    crop: Crop
    kind: str
    mask: np.ndarray | None
    maps: dict[str, np.ndarray]


def evaluate_detector(config: EvaluateDetectorConfig, *, overwrite: bool = False, dry_run: bool = False) -> Results:
    """Measure, write the report, return the content of `results.json`. A finished one of these settings is read.

    Raises:
        UserError: the folder holds a result of other settings; images of one class only, too few, or of mixed size;
            a detector of another autoencoder.
    """
    return DetectorEvaluation(config, overwrite).run(dry_run)


class DetectorEvaluation(Study):
    """The study of `ldm-vae anomaly evaluate`."""

    command, product = "anomaly evaluate", "the evaluation of the detector"
    config: EvaluateDetectorConfig

    def __init__(self, config: EvaluateDetectorConfig, overwrite: bool) -> None:
        self.detector = load_detector(config.detector)
        self.networks = self.detector.networks(
            config.autoencoder, config.device, config.pipeline, config.perceptual_weights
        )
        self.labeled = open_labeled(config.data, config.normal, config.masks)
        super().__init__(config, self.networks.autoencoder, overwrite=overwrite)

    def inputs(self, results: Results) -> dict[str, tuple[Any, Any]]:
        parts = {
            "another detector": (results["detector"]["digest"], self.detector.digest),
            "other images": (results["protocol"]["images"]["fingerprint"], self.labeled.source.fingerprint()),
        }
        if self.config.baseline is not None:
            recorded = results["baseline"]["autoencoder"]["fingerprint"]
            parts["another baseline"] = recorded, load_autoencoder(self.config.baseline).fingerprint()
        return parts

    def work(self) -> StudyPlan:
        config, source, kinds = self.config, self.labeled.source, self.labeled.kinds
        chosen = _balanced(kinds, config.count)
        anomalous = sum(kinds[index] != NORMAL for index in chosen)
        images = f"{pluralize(len(chosen) - anomalous, 'normal image')} and {anomalous:,} anomalous"
        masks = "with masks" if self.labeled.has_masks else "without masks"
        images += f" ({describe_images(source)})"
        what = (images, masks, f"{self.detector.resolution} pixels", config.detector, config.autoencoder)
        return StudyPlan((*what, str(self.autoencoder.device)), source, chosen, self.detector.resolution)

    def measure(self) -> Results:
        config, detector, source = self.config, self.detector, self.labeled.source
        measured = [(detector, self.networks, ScoreMeasurements())]
        if config.baseline is not None:
            measured.append((*self._baseline(config.baseline), ScoreMeasurements()))
        rejected: Rejected = []
        self.examples, seen = self._measure_all(measured, rejected)
        own = measured[0][2]
        _check_classes(own, seen)
        anomalous = int(own.anomalous.sum())
        described = [_described(*one, config.prevalence) for one in measured]
        return {
            **described[0],
            "detector": {
                "digest": detector.digest, "by": detector.by, "counts": detector.description["counts"],
                "false_positive_rate": detector.rate,
                "false_positive_rate_interval": list(rate_interval(len(detector.normal[detector.by]), detector.rate)),
            },
            "baseline": described[1] if config.baseline is not None else None,
            "protocol": {
                "images": {"fingerprint": source.fingerprint(), "part": "all", "normal": len(own.ids) - anomalous,
                           "anomalous": anomalous, "masks": bool(own.masks)},
                "preprocessing": detector.description["preprocessing"],
                "resolution": detector.resolution,
                "prevalence": config.prevalence,
                "intervals": "95 % bootstrap over images, normal and anomalous ones drawn apart",
                "versions": provenance.versions(),
            },
            "images": [
                {"id": name, "kind": own.kinds[row], "png_bytes": own.png_bytes[row],
                 **{score: values[row] for score, values in own.values.items()}}
                for row, name in enumerate(own.ids)
            ],
            "seen": seen,
            "rejected": rejected_images(rejected),
        }  # fmt: skip

    def _baseline(self, autoencoder: str) -> tuple[Detector, Networks]:
        """Another autoencoder, fitted in memory to the detector's images. Raises: UserError when those have changed."""
        detector, config = self.detector, self.config
        fitted: dict[str, Any] = detector.description["config"]
        data = _data_config(fitted["data"])
        if open_source(data).fingerprint() != detector.description["images"]:
            raise UserError(
                f"baseline: the images that {config.detector} was fitted to have changed, and a baseline is fitted to "
                "the same; fit it again"
            )
        networks = load_networks(
            autoencoder, self.networks.device, None, fitted["perceptual_net"], config.perceptual_weights,
            fitted["regret_steps"],
        )  # fmt: skip
        settings = FitDetectorConfig(
            autoencoder=autoencoder, output="", data=data, batch=config.batch, resolution=detector.resolution,
            by=detector.by if detector.by in networks.score_names else networks.score_names[0],
            false_positive_rate=detector.rate, count=fitted["count"], held_out_count=fitted["held_out_count"],
        )  # fmt: skip
        return learn_detector(settings, networks), networks

    def _measure_all(
        self, measured: Sequence[tuple[Detector, Networks, ScoreMeasurements]], rejected: Rejected
    ) -> tuple[list[AnomalyExample], int]:
        """Fill the measurements; the images to show, and how many were left out since they were fitted to."""
        labeled, resolution = self.labeled, self.detector.resolution
        chosen = _balanced(labeled.kinds, self.config.count)
        examples: list[AnomalyExample] = []
        known, seen = set(self.detector.seen.tolist()), 0
        crops = iterate_crops(labeled.source, chosen, resolution, rejected, [])
        for batch in crop_batches(crops, self.config.batch, len(chosen), "scoring"):
            fresh = [crop for crop in batch if mark(crop) not in known]
            seen += len(batch) - len(fresh)
            if not fresh:
                continue
            refuse_enlarged(fresh, resolution)
            masks = [labeled.mask(crop.index, resolution) for crop in fresh]
            kinds = [labeled.kinds[crop.index] for crop in fresh]
            maps, *_ = [_append(*one, fresh, kinds, masks) for one in measured]
            for row, (crop, kind) in enumerate(zip(fresh, kinds)):
                if sum(one.kind == kind for one in examples) < SHOWN_OF_A_KIND:
                    examples.append(
                        AnomalyExample(crop, kind, masks[row], {key: found[row] for key, found in maps.items()})
                    )
        return sorted(examples, key=lambda one: (one.kind == NORMAL, one.kind)), seen

    def files(self, results: Results) -> dict[str, Content]:
        return {"grid.png": example_grid(results, self.examples)} if self.examples else {}

    def markdown(self, results: Results) -> str:
        return markdown(results)

    def page(self, results: Results) -> str:
        from markupsafe import Markup

        context = {
            "results": results,
            "headline": detector_headline(results),
            "columns": COLUMNS,
            "cell": cell,
            "number": two_digits,
            "png_size": PNG_SIZE,
            "kinds": kind_rows(results),
            "plots": [
                (
                    "AUROC of every score",
                    "95 % bootstrap interval; 0.5 says nothing",
                    "Hollow: against normal images of about the same PNG size only. Squares: the baseline.",
                    Markup(auroc_plot(results)),
                )
            ],
            "examples": [
                (one.kind, one.crop.id, [(name, embedded(image, name)) for name, image in pictures(results, one)])
                for one in self.examples
            ],
            "protocol": protocol_lines(results),
        }
        return template_environment().get_template("anomaly_evaluation.html").render(context)

    def record(self, results: Results) -> dict[str, Any]:
        return {"images": len(results["images"])}


def _data_config(values: dict[str, Any]) -> DataConfig:
    """The settings of the images as a detector's description has them."""
    from omegaconf import OmegaConf

    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), values))  # type: ignore[return-value]


def _balanced(kinds: Sequence[str], count: int | None) -> list[int]:
    """Images of both classes, at most `count` of each, evenly spaced, in the order of the source."""
    classes: tuple[list[int], list[int]] = ([], [])
    for index, kind in enumerate(kinds):
        classes[kind != NORMAL].append(index)
    return sorted(part[i] for part in classes for i in evenly_spaced(len(part), count))


def _append(
    detector: Detector, networks: Networks, table: ScoreMeasurements, crops: list[Crop], kinds: list[str],
    masks: list[np.ndarray | None],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Measure a batch into a table; returns its heat maps."""
    measured = measure_scores(networks, detector.statistics, stack(crops), [crop.id for crop in crops])
    maps = {name: found.numpy() for name, found in measured.maps.items()}
    table.ids += [crop.id for crop in crops]
    table.kinds += kinds
    table.png_bytes += [metrics.png_bytes(crop.pixels) for crop in crops]
    for name, values in measured.values.items():
        table.values.setdefault(name, []).extend(values.tolist())
    for row, mask in enumerate(masks):
        if mask is None:
            continue
        covered = mask_cells(mask)
        table.masks.append(covered)
        for name, found in maps.items():
            table.maps.setdefault(name, []).append(found[row])
        if covered.any() and not covered.all():
            table.inside.append(float(maps["l1"][row][covered].mean()))
            table.outside.append(float(maps["l1"][row][~covered].mean()))
    return maps


def _check_classes(table: ScoreMeasurements, seen: int) -> None:
    anomalous = int(table.anomalous.sum())
    for what, count in (("normal", len(table.ids) - anomalous), ("anomalous", anomalous)):
        if count < FEWEST_OF_A_CLASS:
            left_out = f" after {seen} were left out that the detector was fitted to" if seen else ""
            raise UserError(
                f"data: {pluralize(count, f'{what} image')}{left_out}, fewer than {FEWEST_OF_A_CLASS}; add images, "
                "or fit the detector to fewer with count and held_out_count"
            )


def _described(detector: Detector, networks: Networks, table: ScoreMeasurements, prevalence: float) -> dict[str, Any]:
    """An autoencoder and the metrics of its scores, each with a reason."""
    found = score_metrics(table, detector.thresholds(), prevalence)
    ratio = float(np.mean(table.inside) / np.mean(table.outside)) if table.inside else None
    for name in table.values:
        found[name]["reason"] = reason(name, found, ratio)
    return {
        "autoencoder": describe_autoencoder(networks.autoencoder),
        "l1_inside_over_outside": ratio,
        "scores": found,
    }


# The metrics of one score on labeled images, and the reason where it fails.


def score_metrics(
    table: ScoreMeasurements, thresholds: dict[str, float], prevalence: float
) -> dict[str, dict[str, Any]]:
    """Score -> its metrics; those of the size of the PNG are the last."""
    found = {name: _of_score(table, name, thresholds[name], prevalence) for name in table.values}
    size = np.log(np.array(table.png_bytes, np.float64))
    found[PNG_SIZE] = {"title": "size of the PNG alone"} | _separation(size, table.anomalous, prevalence)
    return found


def _of_score(table: ScoreMeasurements, name: str, threshold: float, prevalence: float) -> dict[str, Any]:
    values, anomalous = np.array(table.values[name]), table.anomalous
    size = np.array(table.png_bytes, np.float64)
    matched, share = matched_auroc(values[~anomalous], values[anomalous], size[~anomalous], size[anomalous])
    found = {"title": title(name), **_separation(values, anomalous, prevalence)}
    found |= {
        "matched_auroc": matched,
        "matched_share": share,
        "png_correlation": rank_correlation(values[~anomalous], size[~anomalous]),
        "label_correlation": rank_correlation(values, anomalous),
        "label_correlation_given_png": partial_rank_correlation(values, anomalous, size),
        "threshold": threshold,
        "false_positive_rate": float((values[~anomalous] > threshold).mean()),
        "true_positive_rate": float((values[anomalous] > threshold).mean()),
        "aupro": None,
    }
    if table.masks and name in table.maps:
        found["aupro"] = metrics.pixel_aupro(table.maps[name], table.masks)
    kinds = sorted({kind for kind in table.kinds if kind != NORMAL})
    if len(kinds) > 1:
        of_kind = np.array(table.kinds)
        found["kinds"] = {kind: metrics.auroc(values[~anomalous], values[of_kind == kind]) for kind in kinds}
    return found


def _separation(values: np.ndarray, anomalous: np.ndarray, prevalence: float) -> dict[str, float]:
    normal, others = values[~anomalous], values[anomalous]
    low, high = metrics.auroc_interval(normal, others)
    return {
        "auroc": metrics.auroc(normal, others),
        "auroc_low": low,
        "auroc_high": high,
        "aupr": metrics.average_precision(normal, others, prevalence),
        "false_positive_rate_at_95": metrics.false_positive_rate_at(normal, others),
    }


def reason(name: str, found: dict[str, dict[str, Any]], error_ratio: float | None) -> str:
    """What became of a score and, where it fails, why: one sentence from the measurements.

    Args:
        found: of all scores, as `score_metrics` gives them.
        error_ratio: mean L1 within the masks over that around them; None where no mask is known.
    """
    score, size = found[name], found[PNG_SIZE]
    low, high = score["auroc_low"], score["auroc_high"]
    if high < 0.5:
        return _inverted(score, size)
    if low <= 0.5:
        return _blind(name, found, error_ratio)
    few = ", but finds few of them at its threshold" if score["true_positive_rate"] < FEW_FOUND else ""
    matched = score["matched_auroc"]
    if matched is not None and matched < 0.5 + 0.5 * (score["auroc"] - 0.5):
        return (
            f"separates, largely by complexity: AUROC {score['auroc']:.2f} falls to {matched:.2f} against normal "
            f"images of about the same PNG size{few}"
        )
    strength = "weakly" if score["auroc"] < 0.7 else "well" if score["auroc"] >= 0.9 else "partly"
    return f"separates {strength}{'' if matched is None else ', not by complexity'}{few}"


def _inverted(score: dict[str, Any], size: dict[str, Any]) -> str:
    correlation = score["png_correlation"]
    simpler, richer = size["auroc_high"] < 0.5, size["auroc_low"] > 0.5
    if correlation is not None and ((correlation > 0.3 and simpler) or (correlation < -0.3 and richer)):
        what = "simple" if correlation > 0 else "complex"
        return (
            f"fails: it ranks {what} images as normal (its correlation with the PNG size shows it), and the anomalous "
            f"ones are {'simpler' if simpler else 'more complex'} here"
        )
    return "fails: it finds the anomalous images more normal than the normal ones"


def _blind(name: str, found: dict[str, dict[str, Any]], error_ratio: float | None) -> str:
    """Why a score cannot tell the images apart."""
    peak = found.get(f"{name}_peak")
    if peak is not None and peak["auroc_low"] > 0.5 and peak["auroc"] > found[name]["auroc"] + CLEARLY_BETTER:
        return (
            f"fails: the anomalies are too small for a mean over the image (AUROC {found[name]['auroc']:.2f}; its peak "
            f"has {peak['auroc']:.2f})"
        )
    if score_quantity(name) in ("l1", "ms_ssim", "perceptual", "elbo"):
        if error_ratio is None:
            return "fails: the autoencoder reconstructs the anomalies as well as normal images"
        if error_ratio < STANDS_OUT:
            return (
                "fails: the autoencoder reconstructs the anomalies too; its L1 within the defects is "
                f"{error_ratio:.1f} times that around them"
            )
        return (
            f"fails: the defects stand out in their image (L1 within them is {error_ratio:.1f} times that around), but "
            "normal images have places that are reconstructed as badly, such as edges and textures"
        )
    if name == "regret":
        return "fails: the encoder serves the anomalies as well as normal images"
    if score_quantity(name).startswith("flow"):
        return "fails: the diffusion model explains the latents of the anomalies as well as those of normal images"
    return "fails: the latents of the anomalies are as usual as those of normal images"


# The report: `results.md`, `index.html` and `grid.png`.

COLUMNS = {
    "auroc": "AUROC",
    "aupr": "AUPR",
    "false_positive_rate_at_95": "FPR@95",
    "matched_auroc": "AUROC, PNG size matched",
    "png_correlation": "correlation with PNG size",
    "label_correlation_given_png": "with the label, PNG size fixed",
    "false_positive_rate": "false alarms",
    "true_positive_rate": "found",
    "aupro": "AUPRO",
}


def markdown(results: Results) -> str:
    """A table of all scores, what fails and why, the kinds of anomaly, the protocol."""
    baseline = results["baseline"]
    titles = ["score", *COLUMNS.values()] + (["AUROC of the baseline"] if baseline else [])
    rows = []
    for name, score in results["scores"].items():
        others = [cell(baseline["scores"].get(name, {}), "auroc")] if baseline else []
        rows.append([f"`{name}`", *(cell(score, key) for key in COLUMNS), *others])
    lines = [*markdown_table(titles, rows), "", *(f"- {sentence}" for sentence in score_sentences(results))]
    if kinds := kind_rows(results):
        rows = [[f"`{name}`", *map(two_digits, row.values())] for name, row in kinds]
        lines += ["", *markdown_table(["AUROC by kind", *kinds[0][1]], rows)]
    return "\n".join([*lines, "", *protocol_lines(results)]) + "\n"


def score_sentences(results: Results) -> list[str]:
    """What became of the scores, those with the same reason together; the baseline's last."""
    found = _grouped(results["scores"])
    if results["baseline"]:
        found += [f"Baseline, {sentence}" for sentence in _grouped(results["baseline"]["scores"])]
    return found


def _grouped(scores: dict[str, dict[str, Any]]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, score in scores.items():
        if "reason" in score:
            names.setdefault(score["reason"], []).append(f"`{name}`")
    return [f"{', '.join(those)}: {reason}." for reason, those in names.items()]


def kind_rows(results: Results) -> list[tuple[str, dict[str, float]]]:
    """(score, kind -> AUROC); empty where there is one kind only."""
    return [(name, score["kinds"]) for name, score in results["scores"].items() if score.get("kinds")]


def protocol_lines(results: Results) -> list[str]:
    """What one has to know to read the figures."""
    images, detector, protocol = results["protocol"]["images"], results["detector"], results["protocol"]
    low, high = detector["false_positive_rate_interval"]
    lines = [
        f"{images['normal']} normal and {images['anomalous']} anomalous images, {protocol['resolution']} x "
        f"{protocol['resolution']}; learned from {detector['counts']['learnt_from']} normal images, thresholds from "
        f"{detector['counts']['held_out']} others.",
        f"AUPR for a share of {protocol['prevalence']:g} anomalous images (chance gives that); AUROC with its 95 % "
        "bootstrap interval over images. AUPRO up to a pixel false-positive rate of 0.3 (chance gives 0.15).",
        f"False alarms and found: at the threshold for a false-positive rate of {detector['false_positive_rate']:g}, "
        f"which with this number of held-out images means one between {low:.3f} and {high:.3f}.",
        "The best of many scores on one test set is not an estimate: choose a score on other images than these.",
    ]
    if results["seen"]:
        lines.append(f"Left out: {pluralize(results['seen'], 'image')} that the detector was fitted to.")
    if results["rejected"]:
        lines.append(f"{pluralize(len(results['rejected']), 'image')} could not be read.")
    return lines


def detector_headline(results: Results) -> str:
    """What the page opens with."""
    scores = [score for name, score in results["scores"].items() if name != PNG_SIZE]
    working = [score for score in scores if score["auroc_low"] > 0.5]
    if not working:
        return "No score finds the anomalies"
    if len(working) == len(scores):
        return "Every score separates"
    return f"{len(working)} of {len(scores)} scores separate"


def pictures(results: Results, example: AnomalyExample) -> list[tuple[str, Image.Image]]:
    """(caption, picture): the image, where its defect is, and every heat map."""
    side = len(example.crop.pixels)
    found = [("image", Image.fromarray(example.crop.pixels))]
    if example.mask is not None:
        caption = "defect" if example.mask.any() else "no defect"
        found.append((caption, Image.fromarray(outlined(example.crop.pixels, example.mask))))
    for name in SCORES:
        if name in example.maps:
            threshold = results["scores"][name + PEAK]["threshold"]
            found.append((name, heat_picture(example.maps[name], threshold, side, example.mask)))
    return found


def example_grid(results: Results, examples: Sequence[AnomalyExample]) -> Image.Image:
    """One row per image, its `pictures` side by side, each with its caption."""
    rows = [pictures(results, example) for example in examples]
    columns, size = max(map(len, rows)), (GRID_SIDE, GRID_SIDE)
    cells = [cell for row in rows for cell in [*row, *[("", Image.new("RGB", size, PAPER))] * (columns - len(row))]]
    images = [image.resize(size, Image.Resampling.LANCZOS) for _, image in cells]
    return labeled_sheet(images, [caption for caption, _ in cells], GRID_SIDE, columns=columns)


def auroc_plot(results: Results) -> str:
    """A row for each score, as SVG."""
    scores = results["scores"]
    figure, (axes,) = new_figure(width=8.6, height=0.8 + 0.26 * len(scores))
    baseline = results["baseline"]["scores"] if results["baseline"] else {}
    for y, (name, score) in enumerate(reversed(scores.items())):
        axes.plot([score["auroc_low"], score["auroc_high"]], [y, y], color=COLORS[0], linewidth=2)
        axes.plot(score["auroc"], y, "o", color=COLORS[0], markersize=6)
        if score.get("matched_auroc") is not None:
            axes.plot(score["matched_auroc"], y, "o", markerfacecolor="none", color=COLORS[0], markersize=9)
        if name in baseline:
            axes.plot(baseline[name]["auroc"], y - 0.25, "s", color=COLORS[1], markersize=4)
    axes.axvline(0.5, color=INK, linewidth=1, linestyle=(0, (1, 3)))
    axes.set_yticks(range(len(scores)), [score["title"] for score in reversed(scores.values())])
    axes.set_ylim(-0.7, len(scores) - 0.3)
    axes.set_xlim(min(0.4, *(score["auroc_low"] for score in scores.values())) - 0.02, 1.02)
    return page_svg(figure, "AUROC of every score")


def cell(score: dict[str, Any], key: str) -> str:
    """A figure in a table, with its interval where it has one."""
    value = score.get(key)
    if value is None:
        return "–"
    if key in ("false_positive_rate", "true_positive_rate", "false_positive_rate_at_95"):
        return f"{value:.0%}"
    if key == "auroc":
        return f"{value:.2f} ({score['auroc_low']:.2f}–{score['auroc_high']:.2f})"
    return two_digits(value)


def two_digits(value: float) -> str:
    """Two digits, a true minus sign."""
    return f"{value:.2f}".replace("-", "−")
