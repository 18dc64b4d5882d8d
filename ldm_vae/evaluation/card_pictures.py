"""The pictures of a model card, files beside it: training curves, and crops or samples, good and bad.

Owns drawing and choosing them; nothing is decoded or generated here: a folder of `evaluate` or `generate` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_vae.data.sheets import labelled_sheet
from ldm_vae.errors import UserError
from ldm_vae.evaluation.card_facts import check_identity, data_name
from ldm_vae.evaluation.figures import new_figure, save_svg
from ldm_vae.evaluation.plots import Panel, draw_panel, read_alarms, read_metrics
from ldm_vae.evaluation.result_folder import read_json
from ldm_vae.files import checksum, write_atomically

CURVES, CROPS, SAMPLES = "curves.svg", "crops.webp", "samples.webp"
OF_EACH = 3
"""Of the best and of the worst images."""
WINDOW = 160
WINDOW_STRIDE = 32
LARGEST_SIDE = 1600
"""Of a sheet of samples in pixels."""


@dataclass(frozen=True)
class Shown:
    """A file beside the card, and what it shows."""

    file: str
    text: str


def draw_curves(
    run_folder: Path, directory: Path, panels_of: Callable[..., list[Panel]], config: dict[str, Any]
) -> Shown | None:
    """curves.svg: the panels with held-out figures side by side; None where nothing was logged."""
    metrics = read_metrics(run_folder / "metrics.jsonl")
    alarms = read_alarms(run_folder / "metrics.jsonl")
    rate = config.get("rate") or {}
    panels = panels_of(metrics, rate.get("target_nats"), alarms) if "rate" in config else panels_of(metrics)
    panels = [panel for panel in panels if panel.held_out is not None]
    if not panels:
        return None
    figure, all_axes = new_figure(width=4.2, columns=len(panels))
    for axes, panel in zip(all_axes, panels):
        draw_panel(axes, panel)
        axes.set_title(f"{panel.title}\n{panel.unit}", fontsize=10, loc="left")
    text = "Training curves: " + ", ".join(panel.title for panel in panels)
    save_svg(figure, directory / CURVES, text)
    return Shown(CURVES, text)


def write_crops(evaluation: Path, directory: Path, identity: str) -> Shown:
    """crops.webp: of the examples of `evaluate` those with the highest and the lowest PSNR, original and decoded.

    Raises:
        UserError: no result there, one of another command or version, of other weights, or without examples.
    """
    results = read_json(evaluation / "results.json")
    command = f"`ldm-vae evaluate ... examples={8 * OF_EACH}`"
    try:
        examples = results.get("examples") or []
        if len(examples) < 2 * OF_EACH:
            raise UserError(
                f"--pictures: {evaluation} has {len(examples)} examples, {2 * OF_EACH} are shown; give a folder of "
                f"{command}"
            )
        check_identity(results["autoencoder"]["fingerprint"], identity, evaluation / "results.json")
        sheet, shown = _crops(evaluation, results)
    except (AttributeError, LookupError, TypeError, OSError) as error:  # a foreign record may have any form
        raise UserError(
            f"--pictures: {evaluation}/results.json is no result of this version's `ldm-vae evaluate`, or its pictures "
            f"are damaged ({type(error).__name__}: {error}); give a new folder of {command}"
        ) from error
    _write_webp(sheet, directory / CROPS)
    return shown


def _crops(evaluation: Path, results: dict[str, Any]) -> tuple[Image.Image, Shown]:
    examples = results["examples"]
    quality = {image["id"]: image[results["rows"][0]["name"]]["psnr"] for image in results["images"]}
    ranked = sorted(examples, key=lambda example: -quality[example["id"]])
    cells, captions = [], []
    for example in ranked[:OF_EACH] + ranked[-OF_EACH:]:
        pair = [Image.open(evaluation / "examples" / example["files"][name]) for name in ("original", "decoded")]
        cells += [enlarged(part) for part in worst_window(*(picture.convert("RGB") for picture in pair))]
        captions += ["original", f"decoded, {quality[example['id']]:.1f} dB"]
    sheet = labelled_sheet(cells, captions, side=2 * WINDOW, columns=2 * OF_EACH)
    resolution = results["protocol"]["resolution"]
    window = f": in each the window of {WINDOW} pixels that is decoded worst" if resolution > WINDOW else ""
    return sheet, Shown(
        CROPS,
        f"The {OF_EACH} best (above) and the {OF_EACH} worst (below) of {len(examples)} images of "
        f"{data_name(results['config'])}, {resolution} pixels{window}.",
    )


def worst_window(original: Image.Image, decoded: Image.Image) -> list[Image.Image]:
    """The same part of both pictures, where they differ most."""
    difference = np.abs(np.asarray(original, np.float32) - np.asarray(decoded, np.float32)).mean(-1)
    sums = np.pad(difference, ((1, 0), (1, 0))).cumsum(0, np.float64).cumsum(1)
    side = min(WINDOW, *difference.shape)
    rows, columns = (np.arange(0, length - side + 1, WINDOW_STRIDE) for length in difference.shape)
    error = (
        sums[np.ix_(rows + side, columns + side)]
        - sums[np.ix_(rows, columns + side)]
        - sums[np.ix_(rows + side, columns)]
        + sums[np.ix_(rows, columns)]
    )
    row, column = np.unravel_index(int(error.argmax()), error.shape)
    top, left = int(rows[row]), int(columns[column])
    return [picture.crop((left, top, left + side, top + side)) for picture in (original, decoded)]


def enlarged(picture: Image.Image) -> Image.Image:
    """Small pictures by a whole factor, pixels as squares: their captions need room."""
    factor = max(1, WINDOW // max(picture.size))
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)


def write_samples(generated: Path, directory: Path) -> Shown:
    """samples.webp, the sheet of a folder of `generate`. Raises: UserError where there is none, or of other weights."""
    record = read_json(generated / "run.json")
    if not (generated / "sheet.png").is_file() or "parameters" not in record:
        raise UserError(f"--pictures: {generated} holds no sheet of `ldm-vae generate`; give a folder of that")
    made = record["parameters"]
    for part in ("unet", "autoencoder"):
        present = [checksum(path) for path in sorted(directory.glob(f"{part}/*.safetensors"))]
        if made.get(part, present) != present:
            raise UserError(f"--pictures: {generated} was made with another {part}; generate with {directory} itself")
    with Image.open(generated / "sheet.png") as file:
        sheet = file.convert("RGB")
    sheet.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    _write_webp(sheet, directory / SAMPLES)
    return Shown(
        SAMPLES,
        f"{record.get('images', 'Some')} samples, none chosen: seed {made['seed']}, {made['steps']} steps of "
        f"{made['sampler']}, guidance {made['guidance']:g}.",
    )


def _write_webp(picture: Image.Image, path: Path) -> None:
    write_atomically(path, lambda temporary: picture.save(temporary, format="WEBP", quality=88, method=6))
