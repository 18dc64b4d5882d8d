"""The result of `directions evaluate` for people: results.md, index.html with the matrix of changes, and strips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_vae.applications.directions.judgement import HEADINGS, Row, cells, sentences
from ldm_vae.data import pixels
from ldm_vae.data.sheets import side_by_side
from ldm_vae.evaluation import figures
from ldm_vae.evaluation.html_pages import embed_image
from ldm_vae.evaluation.sweeps.sweep_page import Drawing, Table, markdown_table, render
from ldm_vae.files import write_text

STRIP_SIDE = 900


def write_page(
    folder: Path, results: dict[str, Any], rows: Sequence[Row], strips: Sequence[tuple[Row, list[Tensor]]]
) -> None:
    """Write results.md and index.html."""
    table, notes = [cells(row) for row in rows], notes_of(results)
    write_text(folder / "results.md", markdown(results, rows))
    drawing = Drawing(
        matrix_svg(results),
        "Change of every attribute (across) by every direction (down) for a strength of 1, in standard deviations "
        "of the attribute over unedited images; orange up, blue down. One dark cell a row is what is wanted.",
    )
    pictures = []
    for row, images in strips:
        for number, image in enumerate(images):
            text = f"{row.name}: {row.verdict}" + (f", image {number + 1}" if len(images) > 1 else "")
            pictures.append(embed_image(side_by_side(pixels.to_pil(image)), text, STRIP_SIDE))
    html = render(
        "Directions", f"What each direction changes, on {results['protocol']['images']['count']} images.",
        sentences(rows), [drawing], [Table(HEADINGS, table, notes)], pictures,
    )  # fmt: skip
    write_text(folder / "index.html", html)


def markdown(results: dict[str, Any], rows: Sequence[Row]) -> str:
    """The text of results.md."""
    table = markdown_table(HEADINGS, [cells(row) for row in rows])
    lines = ["# Directions", "", *table, "", *[f"{note}\n" for note in notes_of(results)]]
    return "\n".join([*lines, *[f"- {sentence}" for sentence in sentences(rows)]]) + "\n"


def notes_of(results: dict[str, Any]) -> list[str]:
    """What has to be known to read the table."""
    config = results["config"]
    found = [
        f"Change: standard deviations of the attribute for a strength of 1, mean over "
        f"{results['protocol']['images']['count']} images with its 95 % interval; strengths {config['strengths']}. "
        "Monotonicity: Spearman's correlation of strength and attribute, mean over images. Drift: rms change of "
        "another attribute that does not go together with the target in unedited images.",
        f"At strength 0 the pictures are reconstructions, {results['identity_psnr_db']:.2f} dB PSNR to the originals.",
    ]
    random = ", ".join(f"{name} {value:.2f}" for name, value in results["random_direction"].items())
    found.append(f"Random directions of the same length change: {random} (rms).")
    if results["readable"]:
        read = ", ".join(f"{name} {value:.2f}" for name, value in results["readable"].items())
        found.append(f"Attributes read by a network, correlation with the truth on reconstructions: {read}.")
    return found


def matrix_svg(results: dict[str, Any]) -> str:
    """The matrix of changes as a drawing."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    names, attributes = list(results["changes"]), results["attributes"]
    values = np.array([results["changes"][name] for name in names])
    figure, (axes,) = figures.new_figure(width=2.6 + 0.42 * len(attributes), height=1.6 + 0.24 * len(names))
    axes.grid(False)
    blue, orange = figures.COLOURS[2], figures.COLOURS[1]
    colours = LinearSegmentedColormap.from_list("changes", [blue, "#ffffff", orange])
    axes.imshow(values, cmap=colours, vmin=-1, vmax=1, aspect="auto")
    across, down = ([name.replace("$", r"\$") for name in those] for those in (attributes, names))  # no formulas
    axes.set_xticks(range(len(attributes)), across, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), down)
    return figures.to_svg(figure, "Change of every attribute by every direction")
