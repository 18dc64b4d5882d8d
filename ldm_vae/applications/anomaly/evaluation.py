"""Which scores of a detector find known anomalies, and which fail: settings, protocol and result folder.

Measures; `figures` computes, `report` writes it down in words, tables and pictures. No score, threshold or setting is
chosen here: that was done when the detector was fitted, on normal images only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.applications.anomaly.detector import Detector, digest, load_detector, models_of
from ldm_vae.applications.anomaly.figures import Table, figures, reason
from ldm_vae.applications.anomaly.fitting import FitConfig, data_config, fit_detector
from ldm_vae.applications.anomaly.images import Crop, batches, read_crops, refuse_enlarged, stack
from ldm_vae.applications.anomaly.labelled import NORMAL, Truth, cells, known_truth
from ldm_vae.applications.anomaly.measurement import Models, load_models, measure
from ldm_vae.applications.anomaly.report import Shown, markdown, picture, render
from ldm_vae.applications.anomaly.threshold import rate_interval
from ldm_vae.autoencoder.fingerprint import fingerprint
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.data.sources import DataConfig, open_source
from ldm_vae.errors import UserError
from ldm_vae.evaluation.fidelity.measurement import spread
from ldm_vae.evaluation.fidelity.reconstruction import compute_device
from ldm_vae.evaluation.result_folder import alone_in, check_made_of, describe_autoencoder, finished_result, publishing
from ldm_vae.files import write_json, write_png, write_text
from ldm_vae.latents.words import counted

RESULTS = "results.json"
FEWEST_OF_A_CLASS = 10
SHOWN_OF_A_KIND = 2


@dataclass(frozen=True)
class EvaluateConfig:
    """`ldm-vae anomaly evaluate`.

    Args:
        detector: the folder that `anomaly fit` wrote.
        autoencoder: the one that it was fitted with.
        output: the folder for the report.
        data: normal and anomalous images; those that the detector was fitted to are left out.
        normal: labels of the normal images; of the synthetic set none, its images without a defect are normal.
        masks: a folder with a mask for each anomalous image, ID.png, white where the anomaly is; null: none.
        count: at most so many images of each class, evenly spread; null: all.
        prevalence: share of anomalous images that precision is stated for.
        baseline: another autoencoder, a plain one for example, fitted to the same images as the detector.
        pipeline: the one that the detector was fitted with, where it was.
        perceptual_weights: as when the detector was fitted.
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
        if self.batch < 1:
            raise UserError(f"batch: {self.batch} is not above 0")
        if self.count is not None and self.count < FEWEST_OF_A_CLASS:
            raise UserError(f"count: {self.count} is under {FEWEST_OF_A_CLASS} a class; leave it out for all images")
        if not 0 < self.prevalence < 1:
            raise UserError(f"prevalence: {self.prevalence} is not between 0 and 1; 0.1 is one image in ten")


@dataclass(frozen=True)
class Contestant:
    """A detector with its networks."""

    detector: Detector
    models: Models


def evaluate(config: EvaluateConfig, overwrite: bool = False) -> dict[str, Any]:
    """Measure, write the report, return the content of `results.json`. A finished one of these settings is read.

    Raises:
        UserError: the folder holds a result of other settings; images of one class only, too few, or of mixed size;
            a detector of another autoencoder.
    """
    started = time.time()
    output = Path(config.output)
    detector = load_detector(config.detector)
    models = models_of(
        detector, config.detector, config.autoencoder, compute_device(config.device), config.pipeline,
        config.perceptual_weights,
    )  # fmt: skip
    truth = known_truth(config.data, config.normal, config.masks)
    finished = finished_result(output / RESULTS, config, fingerprint(models.autoencoder), overwrite)
    if finished is not None:
        parts = {
            "another detector": (finished["detector"]["digest"], digest(config.detector)),
            "other images": (finished["protocol"]["images"]["fingerprint"], truth.source.fingerprint()),
        }
        if config.baseline is not None:
            baseline = finished["baseline"]["autoencoder"]["fingerprint"]
            parts["another baseline"] = baseline, fingerprint(load_autoencoder(config.baseline))
        check_made_of(output, parts)
        return finished
    chosen = _chosen(truth, config.count)
    with alone_in(output):
        contestants = {"detector": Contestant(detector, models)}
        if config.baseline is not None:
            contestants["baseline"] = _baseline(config, detector, models)
        rejected: list[tuple[str, str]] = []
        tables, shown, seen = _measure_all(contestants, truth, chosen, config.batch, rejected)
        _check_classes(tables["detector"], seen)
        results = _results(config, contestants, tables, truth)
        results |= {
            "seen": seen,
            "rejected": [{"id": name, "reason": why} for name, why in rejected],
            "config": configuration.to_dict(config),
        }
        page = render(results, shown)
        with publishing(output):
            write_text(output / "results.md", markdown(results))
            write_text(output / "index.html", page)
            if shown:
                sheet = picture(results, shown)
                write_png(output / "grid.png", sheet)
            write_json(output / RESULTS, results)
            images = len(tables["detector"].ids)
            provenance.write_run_record(output, None, started, time.time() - started, images=images)
    return results


def _chosen(truth: Truth, count: int | None) -> list[int]:
    """Images of both classes, evenly spread over each, in the order of the source."""
    classes: tuple[list[int], list[int]] = ([], [])
    for index, kind in enumerate(truth.kinds):
        classes[kind != NORMAL].append(index)
    return sorted(part[i] for part in classes for i in spread(len(part), count))


def _baseline(config: EvaluateConfig, detector: Detector, models: Models) -> Contestant:
    """Another autoencoder, fitted in memory to the detector's images. Raises: UserError when those have changed."""
    fitted: dict[str, Any] = detector.description["config"]
    data = data_config(fitted["data"])
    if open_source(data).fingerprint() != detector.description["images"]:
        raise UserError(
            f"baseline: the images that {config.detector} was fitted to have changed, and a baseline is fitted to the "
            "same; fit it again"
        )
    baseline = str(config.baseline)
    found = load_models(
        baseline, models.device, None, fitted["perceptual_net"], config.perceptual_weights, fitted["regret_steps"]
    )
    by = detector.by if detector.by in found.names else found.names[0]
    settings = FitConfig(
        autoencoder=baseline, output="", data=data, by=by, batch=config.batch, resolution=detector.resolution,
        false_positive_rate=detector.rate, count=fitted["count"], held_out_count=fitted["held_out_count"],
    )  # fmt: skip
    return Contestant(fit_detector(settings, found), found)


def _measure_all(
    contestants: dict[str, Contestant],
    truth: Truth,
    chosen: Sequence[int],
    batch_size: int,
    rejected: list[tuple[str, str]],
) -> tuple[dict[str, Table], list[Shown], int]:
    """The table of each contestant, the images to show, and how many were left out since they were fitted to."""
    tables = {name: Table() for name in contestants}
    detector = contestants["detector"].detector
    shown: list[Shown] = []
    seen = 0
    crops = read_crops(truth.source, chosen, detector.resolution, rejected)
    known = set(detector.seen.tolist())
    for batch in batches(crops, batch_size, len(chosen), "scoring"):
        fresh = [crop for crop in batch if crop.mark() not in known]
        seen += len(batch) - len(fresh)
        if not fresh:
            continue
        refuse_enlarged(fresh, detector.resolution)
        masks = [truth.mask(crop.index, detector.resolution) for crop in fresh]
        kinds = [truth.kinds[crop.index] for crop in fresh]
        for name, contestant in contestants.items():
            maps = _append(tables[name], contestant, fresh, kinds, masks)
            if name == "detector":
                for row, (crop, kind) in enumerate(zip(fresh, kinds)):
                    if sum(one.kind == kind for one in shown) < SHOWN_OF_A_KIND:
                        shown.append(Shown(crop, kind, masks[row], {key: found[row] for key, found in maps.items()}))
    return tables, sorted(shown, key=lambda one: (one.kind == NORMAL, one.kind)), seen


def _append(
    table: Table, contestant: Contestant, crops: list[Crop], kinds: list[str], masks: list[np.ndarray | None]
) -> dict[str, np.ndarray]:
    """Measure a batch into a table; returns its heat maps."""
    ids = [crop.id for crop in crops]
    measured = measure(contestant.models, contestant.detector.learnt, stack(crops), ids)
    maps = {name: found.numpy() for name, found in measured.maps.items()}
    table.ids += ids
    table.kinds += kinds
    table.png_bytes += [crop.png_bytes() for crop in crops]
    for name, values in measured.values.items():
        table.values.setdefault(name, []).extend(values.tolist())
    for row, mask in enumerate(masks):
        if mask is None:
            continue
        covered = cells(mask)
        table.masks.append(covered)
        for name, found in maps.items():
            table.maps.setdefault(name, []).append(found[row])
        if covered.any() and not covered.all():
            table.inside.append(float(maps["l1"][row][covered].mean()))
            table.outside.append(float(maps["l1"][row][~covered].mean()))
    return maps


def _check_classes(table: Table, seen: int) -> None:
    anomalous = int(table.anomalous.sum())
    for what, count in (("normal", len(table.ids) - anomalous), ("anomalous", anomalous)):
        if count < FEWEST_OF_A_CLASS:
            left_out = f" after {seen} were left out that the detector was fitted to" if seen else ""
            raise UserError(
                f"data: {counted(count, f'{what} image')}{left_out}, fewer than {FEWEST_OF_A_CLASS}; add images, "
                "or fit the detector to fewer with count and held_out_count"
            )


def _results(
    config: EvaluateConfig, contestants: dict[str, Contestant], tables: dict[str, Table], truth: Truth
) -> dict[str, Any]:
    """`results.json` but for what is known of the files."""
    table, detector = tables["detector"], contestants["detector"].detector
    anomalous = int(table.anomalous.sum())
    measured = {name: _contestant(contestants[name], tables[name], config.prevalence) for name in tables}
    held_out = len(next(iter(detector.normal.values())))
    return {
        "format_version": 1,
        **measured["detector"],
        "detector": {
            "digest": digest(config.detector), "by": detector.by, "counts": detector.description["counts"],
            "false_positive_rate": detector.rate,
            "false_positive_rate_interval": list(rate_interval(held_out, detector.rate)),
        },
        "baseline": measured.get("baseline"),
        "protocol": {
            "images": {"fingerprint": truth.source.fingerprint(), "normal": len(table.ids) - anomalous,
                       "anomalous": anomalous, "masks": bool(table.masks)},
            "preprocessing": detector.description["preprocessing"],
            "resolution": detector.resolution,
            "prevalence": config.prevalence,
            "intervals": "95 % bootstrap over images, normal and anomalous ones drawn apart",
            "versions": provenance.versions(),
        },
        "images": [
            {"id": name, "kind": table.kinds[row], "png_bytes": table.png_bytes[row],
             **{score: values[row] for score, values in table.values.items()}}
            for row, name in enumerate(table.ids)
        ],
    }  # fmt: skip


def _contestant(contestant: Contestant, table: Table, prevalence: float) -> dict[str, Any]:
    """Its autoencoder and the figures of its scores, each with a reason."""
    found = figures(table, contestant.detector.thresholds(), prevalence)
    ratio = float(np.mean(table.inside) / np.mean(table.outside)) if table.inside else None
    for name in table.values:
        found[name]["reason"] = reason(name, found, ratio)
    return {
        "autoencoder": describe_autoencoder(contestant.models.autoencoder),
        "l1_inside_over_outside": ratio,
        "scores": found,
    }
