"""`ldm-vae directions fit`: the settings, and the folder with directions for every attribute that has one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_vae import provenance
from ldm_vae.applications.directions import fitting
from ldm_vae.applications.directions.files import FOLDER, Directions, save_directions
from ldm_vae.applications.directions.fitting import Direction
from ldm_vae.applications.directions.samples import PIXELS, Samples, Wanted, check_continuous, gather
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.split import Part
from ldm_vae.errors import UserError
from ldm_vae.evaluation.fidelity.reconstruction import compute_device
from ldm_vae.evaluation.result_folder import alone_in, publishing
from ldm_vae.evaluation.sweeps.sweep_page import markdown_table
from ldm_vae.files import write_text


@dataclass(frozen=True)
class FitDirectionsConfig:
    """`ldm-vae directions fit`.

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the directions.
        latents: a set that `ldm-vae encode` wrote, instead of images.
        part: train, held_out or all, of the images.
        resolution: side of the centre crop in pixels, a multiple of the downsampling.
        count: at most so many images, evenly spread; null: all.
        attributes_from: any of pixels (brightness, contrast, saturation, red_green, yellow_blue, sharpness), labels
            (each class against the others), scene (what is known of the synthetic set), or paths of .csv and .jsonl
            tables with a column `file` or `id`; `[]` for directions without labels only.
        circles: columns of tables that are in turns, as a hue: each becomes a cosine and a sine.
        attributes: only these; null: every one that has a direction.
        methods: difference, probe, pca, sefa.
        components: so many directions of pca and of sefa, at most one a channel.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    latents: str | None = None
    part: Part = "train"
    resolution: int = 256
    count: int | None = 1000
    attributes_from: list[str] = field(default_factory=lambda: [PIXELS])
    circles: list[str] = field(default_factory=list)
    attributes: list[str] | None = None
    methods: list[str] = field(default_factory=lambda: [*fitting.LABELLED, *fitting.UNLABELLED])
    components: int = 4
    device: str = "auto"

    def __post_init__(self) -> None:
        known = (*fitting.LABELLED, *fitting.UNLABELLED)
        for method in self.methods:
            if method not in known:
                raise UserError(f"methods: {method!r} is no method; choose among {', '.join(known)}")
        if not self.methods:
            raise UserError(f"methods: none; choose among {', '.join(known)}")
        if self.components < 1:
            raise UserError(f"components: {self.components} is below 1")
        if self.count is not None and self.count < 1:
            raise UserError(f"count: {self.count} is not above 0; leave it out for all images")
        if not self.attributes_from and not set(self.methods) & set(fitting.UNLABELLED):
            raise UserError("attributes_from: none, and no method works without; add pixels, or the method pca")


def fit(config: FitDirectionsConfig, overwrite: bool = False) -> Directions:
    """Fit and write `directions/`, results.md and run.json.

    Raises:
        UserError: the output is not empty and not `overwrite`, an attribute that was asked for has no direction, or
            whatever `samples.gather` refuses.
    """
    started = time.time()
    output = Path(config.output)
    if (output / provenance.RUN_RECORD).exists() and not ((output / FOLDER).exists() and overwrite):
        raise UserError(f"{output}: holds another result; give another output, or --overwrite")
    autoencoder = load_autoencoder(config.autoencoder).to(compute_device(config.device))
    check_continuous(autoencoder, f"autoencoder {config.autoencoder}")
    with alone_in(output):
        wanted = Wanted(
            config.data, config.part, config.resolution, config.count, config.attributes_from, config.circles,
            config.latents,
        )  # fmt: skip
        samples = gather(wanted, autoencoder)
        directions, left_out = find_directions(config, samples, autoencoder)
        found = Directions(directions, encoder_fingerprint(autoencoder), samples.record, left_out)
        with publishing(output):
            save_directions(found, output)
            write_text(output / "results.md", markdown(found))
            provenance.write_run_record(output, None, started, time.time() - started, images=len(samples.ids))
    return found


def find_directions(
    config: FitDirectionsConfig, samples: Samples, autoencoder: Any
) -> tuple[list[Direction], dict[str, str]]:
    """The directions, and why attributes have none. Raises: UserError."""
    chosen = {attribute.name: attribute for attribute in samples.attributes}
    if config.attributes is not None:
        for name in config.attributes:
            if name not in chosen:
                raise UserError(f"attributes: {name!r} is unknown; there are: {', '.join(chosen) or 'none'}")
        chosen = {name: chosen[name] for name in config.attributes}
    found: list[Direction] = []
    left_out = {name: problem for name, attribute in chosen.items() if (problem := attribute.problem())}
    for name, problem in left_out.items():
        if config.attributes is not None or len(left_out) == len(chosen):
            raise UserError(f"attributes: {name!r} {problem}; give other images, or leave it out")
    for name, attribute in chosen.items():
        if name not in left_out:
            fitted = fitting.labelled(samples.pooled, attribute)
            found += [direction for direction in fitted if direction.method in config.methods]
    if "pca" in config.methods:
        found += fitting.principal(samples.pooled, config.components)
    if "sefa" in config.methods:
        found += fitting.closed_form(autoencoder, samples.pooled, config.components)
    return found, left_out


def markdown(found: Directions) -> str:
    """The table of results.md."""
    rows = []
    for direction in found.directions:
        told = direction.told
        rows.append([direction.name, direction.attribute or "none", f"{told['measure']} {told['value']:.2f}"])
    lines = markdown_table(["direction", "attribute", "told by pooled latents"], rows)
    lines += [
        "",
        f"Fitted to {found.images['count']} images. AUROC and R2 are of images that the probe was not fitted to.",
    ]
    lines += [f"Left out: `{name}` {problem}." for name, problem in found.left_out.items()]
    return "# Directions\n\n" + "\n".join(lines) + "\n"
