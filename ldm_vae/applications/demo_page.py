"""The result of `ldm-vae demo` for people: index.html, one file that loads nothing, and demo.webp, one picture of all.

Owns what they show and say; the look is in `evaluation/templates/demo.html`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from ldm_vae.autoencoder.models import model_directory
from ldm_vae.data.sheets import PAPER, labelled_sheet
from ldm_vae.evaluation.html_pages import embed, embed_image, template_environment
from ldm_vae.evaluation.report import label_of
from ldm_vae.files import write_atomically, write_text
from ldm_vae.latents.words import counted

PICTURE = "demo.webp"
COLUMNS = 8
CARD = "README.md"
MEANS = ("raw_bytes", "latent_bytes", "file_bytes", "psnr_db", "file_psnr_db")
"""Of the figures of an image: the sentences say the mean over all images."""


@dataclass(frozen=True)
class Figures:
    """Of one image. `raw_bytes`: 8-bit pixels; `latent_bytes`: in half precision; `file_bytes`: compressed.

    `rate_bits_per_pixel` is what the posterior carries, None for an autoencoder without one; `jpeg_psnr_db` is of the
    best JPEG of at most `file_bytes`, None where there is none so small.
    """

    name: str
    raw_bytes: int
    latent_bytes: int
    file_bytes: int
    rate_bits_per_pixel: float | None
    psnr_db: float
    file_psnr_db: float
    jpeg_psnr_db: float | None


@dataclass(frozen=True)
class Reconstructed:
    """An image, its compressed file, and what that decodes to."""

    figures: Figures
    original: Image.Image
    decoded: Image.Image
    data: bytes


def write_page(
    output: Path, results: Mapping[str, Any], shown: Sequence[Reconstructed], models: Mapping[str, Path]
) -> None:
    """Write index.html and demo.webp; `results` is what results.json says, and the `seconds` so far."""
    samples = sorted((output / "samples").glob("[0-9][0-9][0-9][0-9]*.png"))
    labels = [label_of(path, output / "samples") for path in samples]
    sheet = picture(shown, [Image.open(path).convert("RGB") for path in samples], labels)
    write_atomically(output / PICTURE, lambda path: sheet.save(path, format="WEBP", quality=88, method=6))
    context = {
        "results": results,
        "sentences": sentences(results),
        "pairs": [
            (one.figures, embed_image(one.original, "original"), embed_image(one.decoded, "reconstruction"))
            for one in shown
        ],
        "samples": [
            (label, embed(path, f"generated: {label}" if label else "generated"))
            for label, path in zip(labels, samples)
        ],
        "cards": {name: link for name, path in models.items() if (link := card_link(path, output)) is not None},
    }
    write_text(output / "index.html", template_environment().get_template("demo.html").render(context))


def picture(shown: Sequence[Reconstructed], samples: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """A row of originals above their reconstructions, as often as it takes, then the samples."""
    cells, captions = [], []
    blank = Image.new("RGB", shown[0].original.size, PAPER)
    for first in range(0, len(shown), COLUMNS):
        part = shown[first : first + COLUMNS]
        empty = COLUMNS - len(part)
        cells += [*(one.original for one in part), *[blank] * empty]
        cells += [*(one.decoded for one in part), *[blank] * empty]
        captions += [*(["original"] * len(part)), *[""] * empty]
        captions += [
            *(f"{one.figures.file_psnr_db:.1f} dB, {one.figures.file_bytes / 1000:.1f} kB" for one in part),
            *[""] * empty,
        ]
    captions += [label or "generated" for label in labels]
    return labelled_sheet([*cells, *samples], captions, columns=COLUMNS)


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What was measured, in words."""
    images, config, autoencoder = results["images"], results["config"], results["autoencoder"]
    mean = {key: fmean(image[key] for image in images) for key in images[0] if key in MEANS}
    found = [
        f"A latent has {mean['raw_bytes'] / mean['latent_bytes']:.0f} times fewer bytes than the pixels "
        f"({mean['latent_bytes']:,.0f} of {mean['raw_bytes']:,.0f}, in half precision), and decodes to "
        f"{mean['psnr_db']:.1f} dB PSNR, the mean of {counted(len(images), 'image')} of {config['size']} pixels.",
        f"Quantised and entropy coded, as by ldm-vae compress, a file has {mean['file_bytes']:,.0f} bytes, "
        f"{8 * mean['file_bytes'] / config['size'] ** 2:.3f} bits per pixel and "
        f"{mean['raw_bytes'] / mean['file_bytes']:.0f} times fewer than the pixels, at {mean['file_psnr_db']:.1f} dB.",
    ]
    jpegs = [image["jpeg_psnr_db"] for image in images if image["jpeg_psnr_db"] is not None]
    if len(jpegs) == len(images):
        found.append(f"JPEG files of at most as many bytes: {fmean(jpegs):.1f} dB.")
    elif jpegs:
        found.append(f"JPEG can be as small for {len(jpegs)} of the {counted(len(images), 'image')} only.")
    rates = [image["rate_bits_per_pixel"] for image in images if image["rate_bits_per_pixel"] is not None]
    if rates:
        found.append(f"The rate, what the posterior says of an image: {fmean(rates):.3f} bits per pixel.")
    speeds = results["images_per_second"]
    found.append(
        f"The autoencoder has {autoencoder['parameters'] / 1e6:.1f} million parameters. Encoding an image and decoding "
        f"it twice, from its latent and from its file: {speeds['reconstructed']:.2g} images/s; generating "
        f"{speeds['generated']:.2g} images/s ({counted(config['steps'], 'step')}, {config['precision']}), on "
        f"{results['protocol']['versions']['machine']}."
    )
    if results["bundled"]:
        found.append("The images are synthetic and bundled; name files or folders to see your own.")
    if results["rejected"]:
        listed = "; ".join(f"{Path(name).name} ({reason})" for name, reason in results["rejected"])
        found.append(f"Left out: {counted(len(results['rejected']), 'image')} that could not be read: {listed}.")
    return found


def card_link(model: Path, output: Path) -> str | None:
    """The way from the page to the model's card; None where there is none."""
    card = next((one / CARD for one in (model, model_directory(model)) if one and (one / CARD).is_file()), None)
    return Path(os.path.relpath(card.resolve(), output.resolve())).as_posix() if card else None
