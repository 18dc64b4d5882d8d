"""The result of `ldm-vae interpolate` for people: results.md, index.html and prior.png."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_vae.applications.interpolation import MEASURES, Draws
from ldm_vae.data import pixels
from ldm_vae.data.sheets import labelled_sheet
from ldm_vae.evaluation.html_pages import Picture, embed_image
from ldm_vae.evaluation.sweeps.sweep_page import Table, markdown_table, render
from ldm_vae.files import write_png, write_text

LARGEST_ANIMATION_BYTES = 2 << 20
"""That is embedded into the page."""

MEANINGS = {
    "unevenness": "the largest step over the mean step; 1 is even, a jump is as large as there are steps",
    "midpoint_sharpness": "fine contrast half way over that of both ends of the way; under 1 is softer",
    "perceptual_length": "mean of the distance of neighbours over the squared step: the smaller, the smoother",
    "end_psnr_db": "the first and last frame against the two images",
    "fade_psnr_db": "the frame half way against the mixed pixels: where it is high, the way is a cross-fade",
}


def write_page(
    output: Path, results: dict[str, Any], sheet: Image.Image, drawn: Sequence[Draws], animations: Sequence[Path]
) -> None:
    """Write results.md, index.html and, where there are draws, prior.png."""
    table, notes = way_table(results), notes_of(results)
    prior = [[draws.title, f"{draws.round_trip:.2f}"] for draws in drawn]
    lines = ["# Interpolation", "", *markdown_table(table.headings, table.rows), "", *[f"{note}\n" for note in notes]]
    pictures = [embed_image(sheet, "Every way between the first pairs, from the first image to the second.", None)]
    text = "From left to right: " + ", ".join(way["title"] for way in results["ways"]) + "."
    pictures += [animation(path, text) for path in animations if path.stat().st_size <= LARGEST_ANIMATION_BYTES]
    tables = [table]
    if drawn:
        headings = ["drawn from", "round trip (deviations)"]
        note = (
            "Channel statistics: a normal of each channel's own mean and deviation over the images. Round trip: rms of "
            "encode(decode(z)) - z in standard deviations of each channel. Positions are drawn independently, so that "
            "pictures are not expected of the first two: arranging latents is what a diffusion model does."
        )
        lines += ["", *markdown_table(headings, prior), "", note]
        tables.append(Table(headings, prior, [note]))
        sheet = prior_sheet(drawn)
        write_png(output / "prior.png", sheet)
        pictures.append(embed_image(sheet, "Draws decoded, one row for each prior.", None))
    write_text(output / "results.md", "\n".join(lines).rstrip() + "\n")
    pairs = results["protocol"]["pairs"]
    html = render(
        "Interpolation", f"What lies between two images, over {pairs} pair{'s' if pairs > 1 else ''}.",
        verdicts(results), [], tables, pictures,
    )  # fmt: skip
    write_text(output / "index.html", html)


def way_table(results: dict[str, Any]) -> Table:
    """One row for each way; intervals where there are several pairs."""
    rows = []
    for way in results["ways"]:
        cells = [way["title"]]
        for measure in MEASURES:
            value = way[measure]
            interval = f" ({value['low']:.2f} to {value['high']:.2f})" if results["protocol"]["pairs"] > 1 else ""
            cells.append(f"{value['mean']:.2f}{interval}")
        rows.append(cells)
    return Table(["way", *MEASURES.values()], rows, notes_of(results))


def notes_of(results: dict[str, Any]) -> list[str]:
    """What has to be known to read the table."""
    protocol = results["protocol"]
    height, width = protocol["size"]
    plural = "s" if protocol["pairs"] > 1 else ""
    meanings = "; ".join(f"{title}: {MEANINGS[measure]}" for measure, title in MEASURES.items())
    found = [
        f"{protocol['pairs']} pair{plural} of {width} x {height} pixels, {results['config']['frames']} frames each; "
        f"distance {protocol['distance']}. {meanings[0].upper()}{meanings[1:]}."
    ]
    if results["differences"]:
        told = []
        for measure, title in MEASURES.items():
            gap = results["differences"][measure]
            told.append(f"{title} {gap['mean']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f})")
        found.append(f"Latents minus those of the other, pair by pair: {'; '.join(told)}.")
    return found


def verdicts(results: dict[str, Any]) -> list[str]:
    """What the figures say, in sentences."""
    ways = {way["key"]: way for way in results["ways"]}
    latents = ways["latents"]
    found = [
        f"Half way through the latents the picture is at {latents['fade_psnr_db']['mean']:.1f} dB to the mixed pixels, "
        f"while the ends are at {latents['end_psnr_db']['mean']:.1f} dB to the images: "
        + (
            "the way is a cross-fade, and the two objects are seen through each other."
            if latents["fade_psnr_db"]["mean"] > latents["end_psnr_db"]["mean"] - 6
            else "the way is more than a cross-fade."
        )
    ]
    if results["differences"]:
        apart = [
            title
            for measure, title in MEASURES.items()
            if results["differences"][measure]["low"] > 0 or results["differences"][measure]["high"] < 0
        ]
        said = f"differ in {', '.join(apart)}" if apart else "do not differ in any measure"
        found.append(f"The two autoencoders {said} (95 % interval over pairs).")
    if "inverted" in ways:
        inverted, noised = (ways[key]["end_psnr_db"]["mean"] for key in ("inverted", "noised"))
        found.append(
            f"Through the diffusion model's noise the ends come back at {inverted:.1f} dB, noised and denoised at "
            f"{noised:.1f} dB: what is lost is no longer the image."
        )
    return found


def prior_sheet(drawn: Sequence[Draws]) -> Image.Image:
    """One row for each prior, its title below the first picture."""
    cells, captions = [], []
    for draws in drawn:
        cells += pixels.to_pil(draws.images)
        captions += [draws.title, *[""] * (len(draws.images) - 1)]
    return labelled_sheet(cells, captions, columns=len(drawn[0].images))


def animation(path: Path, text: str) -> Picture:
    """An animation as it is, embedded."""
    with Image.open(path) as file:
        width, height = file.size
        kind = (file.format or "WEBP").lower()
    data = base64.b64encode(path.read_bytes()).decode()
    return Picture(f"data:image/{kind};base64,{data}", text, width, height)
