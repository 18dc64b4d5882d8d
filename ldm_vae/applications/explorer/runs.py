"""The training that made an autoencoder, as its run directory tells it: curves, alarms, verdicts, previews.

Everything is read from files, again on each call, so that a training that is still running can be watched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ldm_vae.applications.explorer.explored import run_directory
from ldm_vae.autoencoder.models import model_directory
from ldm_vae.autoencoder.record import RECORD
from ldm_vae.evaluation.card_facts import verdicts
from ldm_vae.evaluation.plots import Curve, autoencoder_panels, read_alarms, read_metrics, thin
from ldm_vae.evaluation.result_folder import read_json, read_yaml

HEALTH_FOLDERS = ("health", "autoencoder/health", "../health")
"""Of a run, where `diagnose` may have written: itself, the autoencoder in it, beside it."""
PREVIEW = re.compile(r"step-(\d{1,12})\.(?:webp|png)")

Series = tuple[list[int], list[float]]


class Curves(TypedDict):
    """One panel: `series` are `training`, `held out` and `target`, each its steps and its values."""

    unit: str
    caption: str
    series: dict[str, Series]


@dataclass(frozen=True)
class Training:
    """A training up to now.

    Attributes:
        curves: title -> panel, see `plots.autoencoder_panels`; long curves averaged in bins.
        alarms: `step` and `text` of what training warned of.
        verdicts: `name`, `status` (fail, warn, info) and `text` of the health report of these weights, the worst first;
            empty without one.
        previews: step and file of every sheet of held-out images, by step.
    """

    curves: dict[str, Curves]
    alarms: tuple[dict[str, Any], ...]
    verdicts: tuple[dict[str, str], ...]
    previews: tuple[tuple[int, Path], ...]


def training_of(path: str | Path) -> Training | None:
    """Of a run of `train-vae`, of the autoencoder in one, or of a checkpoint that carries the records of its own; None
    for any other place.

    Raises:
        UserError: a record of the run is damaged.
    """
    run = run_directory(path)
    if run is None:
        return None
    alarms = read_alarms(run / "metrics.jsonl")
    rate = read_yaml(run / "config.yaml").get("rate")
    target = rate.get("target_nats") if isinstance(rate, dict) and rate.get("mode") == "target" else None
    if not isinstance(target, (int, float)):
        target = None
    curves: dict[str, Curves] = {}
    for panel in autoencoder_panels(read_metrics(run / "metrics.jsonl"), target):
        drawn = {"training": panel.train, "held out": panel.held_out}
        series = {name: _points(curve) for name, curve in drawn.items() if curve is not None}
        if panel.target is not None:
            steps = [step for found, _ in series.values() for step in found]
            series["target"] = ([min(steps), max(steps)], [float(panel.target)] * 2)
        curves[panel.title] = {"unit": panel.unit, "caption": panel.caption, "series": series}
    return Training(
        curves,
        tuple({"step": alarm.step, "text": f"{alarm.verdict}: {alarm.sentence}"} for alarm in alarms),
        tuple(_verdicts(run)),
        tuple(_previews(run / "previews")),
    )


def _points(curve: Curve) -> Series:
    curve = thin(curve)
    return [round(step) for step in curve.steps], [float(value) for value in curve.values]


def _verdicts(run: Path) -> list[dict[str, str]]:
    """Of the first health report that is about the weights that the run has now."""
    identity = read_json((model_directory(run) or run) / RECORD).get("fingerprint")
    for folder in HEALTH_FOLDERS:
        health = read_json(run / folder / "health.json")
        if health and identity is not None and health.get("autoencoder", {}).get("fingerprint") == identity:
            found = verdicts(health)
            return [{"name": one["name"], "status": one["severity"], "text": one["sentence"]} for one in found]
    return []


def _previews(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := PREVIEW.fullmatch(path.name)) and path.is_file()]
    return sorted((int(match[1]), path) for match, path in found)
