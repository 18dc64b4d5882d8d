"""The health report of an autoencoder: its settings, the protocol, and the result folder.

`health.json` holds every figure and verdict, `health.md` the same in words, `index.html` the page. Figures are measured
in `health_figures.py`, judged in `judgement.py`, shown by `diagnosis_page.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.autoencoder.fingerprint import fingerprint
from ldm_vae.autoencoder.models import load_autoencoder, only_side
from ldm_vae.autoencoder.record import RECORD, read_record
from ldm_vae.data.sources import DataConfig, ImageSource, open_source
from ldm_vae.data.split import Part, subset
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation.fidelity.measurement import read_crops, spread
from ldm_vae.evaluation.fidelity.reconstruction import compute_device
from ldm_vae.evaluation.health.diagnosis_page import markdown, render
from ldm_vae.evaluation.health.health_figures import measure
from ldm_vae.evaluation.health.judgement import verdicts
from ldm_vae.evaluation.result_folder import (
    alone_in,
    check_resolution,
    describe_autoencoder,
    finished_result,
    publishing,
)
from ldm_vae.files import write_json, write_text

RESULTS, TABLE, PAGE = "health.json", "health.md", "index.html"
SMALLEST_RESOLUTION = 64


@dataclass(frozen=True)
class DiagnoseConfig:
    """`ldm-vae diagnose`.

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the report.
        part: held_out (what training never saw), train or all.
        resolution: side of the centre crop in pixels, a multiple of the downsampling, 64 or more; where an autoencoder
            knows one size only, that.
        count: at most so many images, evenly spread over the part; 256 make the figures comparable between runs.
        batch: images per forward pass.
        seed: of the posterior samples and of all other noise.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    part: Part = "held_out"
    resolution: int = 256
    count: int = 256
    batch: int = 8
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("batch", "count"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not above 0")


def diagnose(config: DiagnoseConfig, overwrite: bool = False) -> dict[str, Any]:
    """Measure, judge, write the report, return the content of `health.json`.

    A folder that holds the finished report of these settings is read, not redone.

    Raises:
        UserError: the folder holds a report of other settings or of another autoencoder, and not `overwrite`; there
            are fewer than 8 readable images.
    """
    started = time.time()
    device = compute_device(config.device)
    autoencoder = load_autoencoder(config.autoencoder).to(device)
    check_resolution(config.resolution, autoencoder)
    if config.resolution < SMALLEST_RESOLUTION and only_side(autoencoder) is None:
        raise UserError(f"resolution: {config.resolution} is under {SMALLEST_RESOLUTION}; 256 is usual")
    identity = fingerprint(autoencoder)
    finished = finished_result(Path(config.output) / RESULTS, config, identity, overwrite)
    if finished is not None:
        return finished
    source = subset(open_source(config.data), config.part, config.data.held_out)
    with alone_in(config.output):
        rejected: list[tuple[str, str]] = []
        chosen = spread(len(source), config.count)
        measured = measure(
            autoencoder, read_images(source, chosen, config, rejected), len(chosen), config.batch, config.seed, device
        )
        training = training_record(config.autoencoder)
        found = verdicts(measured.figures, training.get("rate", {}))
        report = {
            "format_version": 1,
            "autoencoder": describe_autoencoder(autoencoder),
            "protocol": _protocol(config, source, measured.figures["images"]["count"]),
            "training": training,
            "verdicts": [verdict.to_dict() for verdict in found],
            **measured.figures,
            "rejected": [{"id": name, "reason": reason} for name, reason in rejected],
            "config": configuration.to_dict(config),
        }
        output, page = Path(config.output), render(report, found, measured)
        with publishing(output):
            write_text(output / TABLE, markdown(report))
            write_text(output / PAGE, page)
            write_json(output / RESULTS, report)
            images = report["protocol"]["images"]
            provenance.write_run_record(output, None, started, time.time() - started, images=images)
    return report


def failed(report: dict[str, Any]) -> bool:
    """Whether a report holds a verdict of severity fail."""
    return any(verdict["severity"] == "fail" for verdict in report["verdicts"])


def read_images(
    source: ImageSource, indices: list[int], config: DiagnoseConfig, rejected: list[tuple[str, str]]
) -> Iterator[Tensor]:
    """Centre crops (n, 3, resolution, resolution) in [-1, 1] in batches, with a progress bar.

    Images that cannot be decoded are appended to `rejected` as (id, reason) and left out.
    """
    from tqdm import tqdm

    starts = range(0, len(indices), config.batch)
    for start in tqdm(starts, desc="diagnosing", unit="batch", dynamic_ncols=True):
        _, images = read_crops(source, indices[start : start + config.batch], config.resolution, rejected)
        if images is not None:
            yield images


def training_record(autoencoder: str) -> dict[str, Any]:
    """What training left beside the weights in training.json; empty where there is none (a foreign autoencoder).

    Raises:
        UserError: the file is damaged.
    """
    try:
        return read_record(autoencoder)
    except ValueError as error:
        raise UserError(f"{autoencoder}: its {RECORD} is no valid JSON ({error}); restore the folder") from error


def _protocol(config: DiagnoseConfig, source: ImageSource, count: int) -> dict[str, Any]:
    """What has to be equal for two reports to be comparable."""
    return {
        "images": {"fingerprint": source.fingerprint(), "part": config.part, "count": count},
        "preprocessing": preprocessing_record(config.resolution),
        "resolution": config.resolution,
        "seed": config.seed,
        "precision": "float32; sums of the posteriors in float64",
        "range": "reconstructions clamped to [-1, 1], not rounded to 8 bits",
        "versions": provenance.versions(),
    }
