"""The report of `anomaly evaluate`: `results.md`, `index.html` and `grid.png`. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm_vae.applications.anomaly.figures import PNG_SIZE
from ldm_vae.applications.anomaly.heat_pictures import embedded, heat_picture, outlined
from ldm_vae.applications.anomaly.images import Crop
from ldm_vae.applications.anomaly.scores import MEASURED, PEAK
from ldm_vae.evaluation.figures import COLOURS, INK, new_figure
from ldm_vae.evaluation.html_pages import template_environment
from ldm_vae.evaluation.plots import page_svg
from ldm_vae.latents.words import counted

Results = dict[str, Any]

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
GRID_GAP = 6
GRID_SIDE = 160
GRID_CAPTION = 24


@dataclass(frozen=True)
class Shown:
    """An image to look at: its crop, kind, mask (h, w) where known, and heat maps by quantity."""

    crop: Crop
    kind: str
    mask: np.ndarray | None
    maps: dict[str, np.ndarray]


def markdown(results: Results) -> str:
    """A table of all scores, what fails and why, the kinds of anomaly, the protocol."""
    baseline = results["baseline"]
    titles = ["score", *COLUMNS.values()] + (["AUROC of the baseline"] if baseline else [])
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, score in results["scores"].items():
        row = [f"`{name}`", *(cell(score, key) for key in COLUMNS)]
        if baseline:
            row.append(cell(baseline["scores"].get(name, {}), "auroc"))
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", *(f"- {sentence}" for sentence in sentences(results))]
    kinds = kind_rows(results)
    if kinds:
        lines += ["", f"| AUROC by kind | {' | '.join(kinds[0][1])} |", "|---" * (len(kinds[0][1]) + 1) + "|"]
        lines += [f"| `{name}` | {' | '.join(number(value) for value in row.values())} |" for name, row in kinds]
    return "\n".join([*lines, "", *protocol_lines(results)]) + "\n"


def sentences(results: Results) -> list[str]:
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
        f"{protocol['resolution']}; learnt from {detector['counts']['learnt_from']} normal images, thresholds from "
        f"{detector['counts']['held_out']} others.",
        f"AUPR for a share of {protocol['prevalence']:g} anomalous images (chance gives that); AUROC with its 95 % "
        "bootstrap interval over images. AUPRO up to a pixel false-positive rate of 0.3 (chance gives 0.15).",
        f"False alarms and found: at the threshold for a false-positive rate of {detector['false_positive_rate']:g}, "
        f"which with so many held-out images means one between {low:.3f} and {high:.3f}.",
        "The best of many scores on one test set is no estimate: choose a score on other images than these.",
    ]
    if results["seen"]:
        lines.append(f"Left out: {counted(results['seen'], 'image')} that the detector was fitted to.")
    if results["rejected"]:
        lines.append(f"{counted(len(results['rejected']), 'image')} could not be read.")
    return lines


def headline(results: Results) -> str:
    """What the page opens with."""
    scores = [score for name, score in results["scores"].items() if name != PNG_SIZE]
    working = [score for score in scores if score["auroc_low"] > 0.5]
    if not working:
        return "No score finds the anomalies"
    if len(working) == len(scores):
        return "Every score separates"
    return f"{len(working)} of {len(scores)} scores separate"


def render(results: Results, shown: Sequence[Shown]) -> str:
    """The page as HTML text."""
    from markupsafe import Markup

    context = {
        "results": results,
        "headline": headline(results),
        "columns": COLUMNS,
        "cell": cell,
        "number": number,
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
            (one.kind, one.crop.id, [(name, embedded(image, name)) for name, image in row(results, one)])
            for one in shown
        ],
        "protocol": protocol_lines(results),
    }  # fmt: skip
    return template_environment().get_template("anomaly_evaluation.html").render(context)


def row(results: Results, one: Shown) -> list[tuple[str, Image.Image]]:
    """(caption, picture): the image, where its defect is, and every heat map."""
    side = len(one.crop.pixels)
    found = [("image", Image.fromarray(one.crop.pixels))]
    if one.mask is not None:
        caption = "defect" if one.mask.any() else "no defect"
        found.append((caption, Image.fromarray(outlined(one.crop.pixels, one.mask))))
    for name in MEASURED:
        if name in one.maps:
            threshold = results["scores"][name + PEAK]["threshold"]
            found.append((name, heat_picture(one.maps[name], threshold, side, one.mask)))
    return found


def picture(results: Results, shown: Sequence[Shown]) -> Image.Image:
    """One row per image, the pictures of `row` side by side under their captions, on white."""
    rows = [row(results, one) for one in shown]
    step = GRID_SIDE + GRID_GAP
    size = (max(map(len, rows)) * step - GRID_GAP, GRID_CAPTION + len(rows) * step - GRID_GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for y, pictures in enumerate(rows):
        for x, (caption, image) in enumerate(pictures):
            if y == 0:
                draw.text((x * step + 2, 3), caption, fill="black", font_size=15)
            small = image.resize((GRID_SIDE, GRID_SIDE), Image.Resampling.LANCZOS)
            sheet.paste(small, (x * step, GRID_CAPTION + y * step))
    return sheet


def auroc_plot(results: Results) -> str:
    """A row for each score, as SVG."""
    scores = results["scores"]
    figure, (axes,) = new_figure(width=8.6, height=0.8 + 0.26 * len(scores))
    baseline = results["baseline"]["scores"] if results["baseline"] else {}
    for y, (name, score) in enumerate(reversed(scores.items())):
        axes.plot([score["auroc_low"], score["auroc_high"]], [y, y], color=COLOURS[0], linewidth=2)
        axes.plot(score["auroc"], y, "o", color=COLOURS[0], markersize=6)
        if score.get("matched_auroc") is not None:
            axes.plot(score["matched_auroc"], y, "o", markerfacecolor="none", color=COLOURS[0], markersize=9)
        if name in baseline:
            axes.plot(baseline[name]["auroc"], y - 0.25, "s", color=COLOURS[1], markersize=4)
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
    return number(value)


def number(value: float) -> str:
    """Two digits, a true minus sign."""
    return f"{value:.2f}".replace("-", "−")
