"""The model card of a pipeline: README.md in its directory, from what it and its run record.

Owns gathering and the sentences about a generator; the words are in `templates/card_pipeline.md`. As with autoencoders
nothing is measured here, and what is not recorded is said to be missing.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ldm_vae.autoencoder.ancestry import OF_AUTOENCODER, read_runs
from ldm_vae.autoencoder.models import downsampling
from ldm_vae.diffusion import saving
from ldm_vae.diffusion.generation import pipeline_directory
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.errors import UserError
from ldm_vae.evaluation import card_facts as facts
from ldm_vae.evaluation.card import (
    CARD,
    MARKER,
    NOT_RECORDED,
    CardConfig,
    check_nothing_lost,
    check_replaceable,
    fill,
    run_folder_of,
)
from ldm_vae.evaluation.card_pictures import draw_curves, write_samples
from ldm_vae.evaluation.plots import diffusion_panels
from ldm_vae.evaluation.result_folder import read_json, read_yaml
from ldm_vae.files import write_text

SETTINGS = ("batch", "label_dropout", "shift")
TRAINING_SETTINGS = ("learning_rate", "weight_decay", "ema_decay", "seed")


def write_pipeline_card(config: CardConfig) -> tuple[Path, list[str]]:
    """Write README.md into the pipeline's directory; return its path and the names of what is not recorded.

    Raises:
        UserError: no pipeline there, a setting that is for autoencoders, or a foreign README.md.
    """
    for name in ("evaluation", "health"):
        if getattr(config, name) is not None:
            raise UserError(f"--{name}: is about autoencoders; give it for the card of the autoencoder")
    directory = pipeline_directory(config.model)
    pipeline = LatentDiffusionPipeline.from_pretrained(directory, use_safetensors=True)
    path = directory / CARD
    generated = saving.card(pipeline, "DIRECTORY")
    check_replaceable(path, config.overwrite or (path.is_file() and path.read_text(errors="replace") == generated))
    place = run_folder_of(directory)
    run, settings = read_json(place / "run.json"), read_yaml(place / "config.yaml")
    credits, seen = facts.read_credits(config.data_credits), facts.read_text("--seen", config.seen)
    energy = facts.energy_sentence(run, config.watts)
    present = {
        "the intended use": config.intended_use,
        "credits of the data": credits,
        "how it was trained": settings,
        "command, time and machine of the training": run,
        "the code's commit": run.get("versions", {}).get("commit"),
        "energy": energy,
        "held-out figures": run.get("metrics"),
        "pictures": config.pictures,
        "what was seen in them": seen,
        "a licence": config.license,
    }
    missing = [name for name, value in present.items() if not value]
    check_nothing_lost(path, missing, config.overwrite)
    pictures = {
        "curves": draw_curves(place, directory, diffusion_panels, settings),
        "samples": write_samples(Path(config.pictures), directory) if config.pictures else None,
    }
    folder = directory.resolve()
    title = folder.parent.name if folder.name == "pipeline" else folder.name
    height, width = pipeline.image_size()
    context: dict[str, Any] = {
        "card_data": front_matter(config).to_yaml(),
        "marker": MARKER,
        "title": title,
        "height": height,
        "width": width,
        "labels": pipeline.labels,
        "unet_parameters": sum(parameter.numel() for parameter in pipeline.unet.parameters()),
        "autoencoder": f"{type(pipeline.autoencoder).__name__}, {downsampling(pipeline.autoencoder)}x, "
        f"{len(pipeline.normalizer.mean)} channels",
        "encoder_fingerprint": pipeline.config["encoder_fingerprint"],
        "preprocessing": saving.described(pipeline.config["preprocessing"] or {}),
        "missing": missing,
        "not_recorded": NOT_RECORDED,
        "intended_use": config.intended_use,
        "not_for": config.not_for,
        "credits": credits,
        "training": training_rows(settings) + facts.run_rows(run),
        "command": shlex.join(run.get("command", [])),
        "energy": energy,
        "earlier": [facts.earlier_run(record, config.watts) for record in read_runs(directory / OF_AUTOENCODER)],
        "figures": figure_rows(run.get("metrics") or {}),
        "protocol": protocol_sentences(settings),
        "seen": seen,
    }
    write_text(path, fill("card_pipeline.md", context | pictures))
    return path, missing


def front_matter(config: CardConfig) -> Any:
    """The hub's metadata. Raises: UserError when its rules refuse it."""
    from huggingface_hub import ModelCardData

    try:
        return ModelCardData(
            library_name="ldm_vae",
            license=config.license,
            pipeline_tag="unconditional-image-generation",
            tags=["latent-diffusion", "ldm_vae"],
        )
    except ValueError as error:
        raise UserError(f"card: the hub's metadata rules refuse it ({error}); correct the option it names") from error


def training_rows(config: dict[str, Any]) -> facts.Rows:
    """Data, U-Net, schedule and optimiser, as far as they are recorded."""
    rows: facts.Rows = []
    for name in ("latents", "autoencoder"):
        if config.get(name):
            rows.append((name, str(config[name])))
    unet = {key: value for key, value in (config.get("unet") or {}).items() if value not in (None, 0, 0.0, False)}
    if unet:
        rows.append(("U-Net", ", ".join(f"{key} {value}" for key, value in unet.items())))
    crops = config.get("crops") or {}
    if crops.get("size"):
        rows.append(("crops of latents", f"{crops['size']} positions on {crops['share']:.0%} of the steps"))
    training = config.get("training") or {}
    for names, values in ((SETTINGS, config), (TRAINING_SETTINGS, training)):
        rows += [(name.replace("_", " "), f"{values[name]:g}") for name in names if values.get(name) is not None]
    return rows


def figure_rows(metrics: dict[str, Any]) -> facts.Rows:
    """What the training measured at its end."""
    return [(name, f"{value:.4g}") for name, value in metrics.items() if isinstance(value, (int, float))]


def protocol_sentences(config: dict[str, Any]) -> list[str]:
    """What the figures are of."""
    found = []
    if config.get("held_out") is not None:
        found.append(
            f"held_out/flow: mean squared error of the velocity on the {config['held_out']:.0%} of the latents that "
            "training never sees, averaged weights, the same noise at every look; t0.5 is half noise."
        )
    if config.get("neighbours"):
        found.append(
            "samples/copy_rate: share of the preview samples less than a third as far from one of "
            f"{config['neighbours']} training latents as from any other: images learnt by heart."
        )
    return [*found, "One training, one seed: no interval over trainings is known."]
