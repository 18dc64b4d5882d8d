"""The model card of an autoencoder or a pipeline: README.md beside the weights, from recorded results only.

The words are in `templates/card.md` and `card_pipeline.md`. A record of other weights is refused, a missing one is
reported as missing; nothing is measured here. The sections: the card of an autoencoder, that of a pipeline, the
pictures beside a card, and records in words.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_vae import runtime

runtime.repair_torchvision()

import diffusers

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.lineage import OF_AUTOENCODER, beta_path, earlier_runs, read_runs, subsample
from ldm_vae.autoencoder.models import load_autoencoder, model_directory
from ldm_vae.autoencoder.rate import bits_per_dimension, bits_per_pixel
from ldm_vae.data.split import NEVER_TRAINED_ON
from ldm_vae.diffusion.fid import sentences as distribution_sentences
from ldm_vae.diffusion.generation import has_pipeline, pipeline_directory
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline, format_values, pipeline_card
from ldm_vae.errors import UserError
from ldm_vae.evaluation.diagnosis import recorded_verdicts
from ldm_vae.evaluation.plots import (
    Panel,
    autoencoder_panels,
    diffusion_panels,
    draw_panel,
    new_figure,
    read_alarms,
    read_metrics,
    save_svg,
)
from ldm_vae.evaluation.reconstruction import codec_lines, markdown_rows, read_evaluation
from ldm_vae.evaluation.study import check_not_enlarged, read_config_yaml, read_json
from ldm_vae.files import checksum, write_atomically, write_text
from ldm_vae.metrics import METRIC_TITLES
from ldm_vae.utils.image_grid import labeled_sheet
from ldm_vae.utils.progress import begin, beside, end, end_dry_run, say
from ldm_vae.utils.text import markdown_name, markdown_table, pluralize, python_text

CARD = "README.md"
NOT_RECORDED = "Not recorded, so not stated below: "
MARKER = "written by `ldm-vae model card`; the same command writes it anew"
HEALTH, RESULTS = "health.json", "results.json"


@dataclass(frozen=True)
class CardConfig:
    """`ldm-vae model card`.

    `model` is a run of `train-vae` or `train-diffusion`, the model in it, or a directory that `ldm-vae model convert`
    wrote. What the card says comes from its files and from the folders given here; what is not recorded is said to be
    missing. The command that made the model is repeated as it was typed, with its paths.

      ldm-vae model card runs/mine evaluation=runs/evaluation intended_use="Latents of flower photographs."
      ldm-vae model card runs/diffusion pictures=runs/samples observations=seen.md license=cc0-1.0

    Args:
        model: a run of `train-vae` or `train-diffusion`, or its model.
        evaluation: a results folder of `ldm-vae evaluate`.
        health: a folder with health.json; null: that of `evaluation`.
        intended_use: the purpose of the model, in your words.
        not_for: uses to avoid, in your words.
        data_credits: origin and license of the training images: a text file, or a YAML list of name, images, licence,
            credits, url.
        pictures: a folder of `evaluate` (for a pipeline, of `generate`) whose pictures are shown.
        seen: a text file with your observations about the pictures, good and bad.
        watts: power of the training machine, for an estimate of the energy; null: 10 W per core, on a CPU.
        license: license of the weights, as an identifier of the Hugging Face hub, for example apache-2.0.
        push_to_hub: upload the directory to this hub id (OWNER/NAME) afterwards.
    """

    model: str = "???"
    evaluation: str | None = None
    health: str | None = None
    intended_use: str | None = None
    not_for: str | None = None
    data_credits: str | None = None
    pictures: str | None = None
    seen: str | None = None
    watts: float | None = None
    license: str | None = None
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        if self.watts is not None and not 0 < self.watts < math.inf:  # nor is nan
            raise UserError(f"watts: {self.watts:g} is not the power of a machine; give watts above 0, as 250")


@dataclass(frozen=True)
class Records:
    """What was found about a model; an empty dictionary or None where nothing was."""

    training: dict[str, Any]
    run: dict[str, Any]
    config: dict[str, Any]
    earlier: list[dict[str, Any]]
    beta_path: list[list[float]]
    evaluation: dict[str, Any]
    health: dict[str, Any] | None
    credits: str | None

    def missing(self, config: CardConfig) -> list[str]:
        """Names of what is not recorded, in the order of the card."""
        present = {
            "the intended use": config.intended_use,
            "the data": self.config.get("data"),
            "credits of the data": self.credits,
            "how it was trained": self.config.get("phases"),
            "command, time and machine of the training": self.run,
            "the code's commit": self.run.get("versions", {}).get("commit"),
            "energy": energy_sentence(self.run, config.watts),
            "rate and beta": self.training.get("rate"),
            "an evaluation": self.evaluation,
            "a health report": self.health is not None,
            "pictures": config.pictures,
            "a licence": config.license,
        }
        return [name for name, value in present.items() if not value]


def make_card(config: CardConfig, *, overwrite: bool = False, dry_run: bool = False) -> int:
    """Write the card, upload it if asked. `dry_run`: read the records only. Returns: 0. Raises: UserError."""
    generates = has_pipeline(config.model)
    begin("model card", config.model, f"then to {config.push_to_hub}" if config.push_to_hub else "written there")
    write = write_pipeline_card if generates else write_card
    path, missing = write(config, overwrite=overwrite, dry_run=dry_run)
    unknown = f"not recorded: {', '.join(missing)}" if missing else "everything is recorded"
    if dry_run:
        end_dry_run(path, f"{unknown}; a few seconds")
        return 0
    if config.push_to_hub:
        say(f"uploaded: {push(path.parent, config.push_to_hub)}")
    task, ending = ("generate", "samples") if generates else ("evaluate", "evaluation")
    words = ["ldm-vae", task, config.model, f"output={beside(config.model, ending)}"]
    end(path, f"written; {unknown}", words)
    return 0


def write_card(config: CardConfig, *, overwrite: bool = False, dry_run: bool = False) -> tuple[Path, list[str]]:
    """Write README.md into the model's directory; return its path and the names of what is not recorded.

    Raises:
        UserError: no model there, a record that belongs to other weights or is damaged, or a foreign README.md.
    """
    directory = model_directory(Path(config.model))
    if directory is None:
        raise UserError(f"{config.model}: holds no autoencoder; give a run of `ldm-vae train-vae` or a model directory")
    path = directory / CARD
    check_replaceable(path, overwrite)
    autoencoder = load_autoencoder(directory)
    records = read_records(config, directory, autoencoder.fingerprint())
    check_nothing_lost(path, records.missing(config), overwrite)
    if dry_run:
        return path, records.missing(config)
    drawn = draw_curves(run_folder_of(directory), directory, autoencoder_panels, records.config)
    crops = write_crops(Path(config.pictures), directory, autoencoder.fingerprint()) if config.pictures else None
    write_text(path, render(config, records, autoencoder, title_of(directory), {"curves": drawn, "crops": crops}))
    return path, records.missing(config)


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Raises: UserError for a README.md of other origin."""
    if path.exists() and MARKER not in path.read_text(errors="replace") and not overwrite:
        raise UserError(f"{path}: was not written by this command; give --overwrite to replace it")


def check_nothing_lost(path: Path, missing: Collection[str], overwrite: bool) -> None:
    """Raises: UserError for a card that states what the new one would not."""
    text = path.read_text(errors="replace") if path.exists() and not overwrite else ""
    if MARKER not in text:
        return
    before = next((line for line in text.splitlines() if line.startswith(NOT_RECORDED)), "")
    before = f", {before.removeprefix(NOT_RECORDED).rstrip('.')}, "
    if lost := [name for name in missing if f", {name}, " not in before]:
        raise UserError(
            f"{path}: states {', '.join(lost)}, and the new card would not; give them again, or --overwrite"
        )


def run_folder_of(directory: Path) -> Path:
    """The folder with run.json and config.yaml of a model: its run, or, for a shared model, that of the weights."""
    return directory.parent if directory.name in ("autoencoder", "pipeline") else directory


def read_records(config: CardConfig, directory: Path, identity: str) -> Records:
    """Everything recorded about the autoencoder with the fingerprint `identity`. Raises: UserError."""
    training = read_json(directory / "training.json")
    check_identity(training.get("fingerprint"), identity, directory / "training.json")
    run_folder = run_folder_of(directory)
    run = read_json(run_folder / "run.json")
    settings = read_config_yaml(run_folder / "config.yaml")
    rate = training.get("rate") or {}
    path = rate.get("beta_path") or beta_path(run_folder / "metrics.jsonl")
    evaluation: dict[str, Any] = {}
    if config.evaluation:
        _required(Path(config.evaluation) / RESULTS, "ldm-vae evaluate")
        evaluation = read_evaluation(config.evaluation)
        check_identity(evaluation["autoencoder"]["fingerprint"], identity, Path(config.evaluation) / RESULTS)
        check_not_enlarged(Path(config.evaluation) / RESULTS, evaluation)
    health = None
    folder = config.health or config.evaluation
    if folder and (config.health or (Path(folder) / HEALTH).is_file()):
        health = _required(Path(folder) / HEALTH, "ldm-vae diagnose")
        check_identity(health.get("autoencoder", {}).get("fingerprint"), identity, Path(folder) / HEALTH)
        check_not_enlarged(Path(folder) / HEALTH, health)
    earlier, credits = earlier_runs(run_folder), read_credits(config.data_credits)
    return Records(training, run, settings, earlier, path, evaluation, health, credits)


def render(config: CardConfig, records: Records, autoencoder: Autoencoder, title: str, pictures: dict[str, Any]) -> str:
    """The card as text, front matter included. `pictures`: `curves` and `crops`, None where there are none."""
    name = type(autoencoder).__name__
    stock = hasattr(diffusers, name)
    factor, channels = autoencoder.downsampling, autoencoder.latent_channels
    evaluation, only = records.evaluation, autoencoder.only_side
    held_out = {} if records.training.get("held_out_enlarged") else records.training.get("held_out", {})
    sides = known_sides(factor, only)
    context: dict[str, Any] = {
        "card_data": autoencoder_front_matter(config, records, stock, title).to_yaml(),
        "marker": MARKER,
        "title": title,
        "stock_class": stock,
        "class_name": name,
        "plain_latents": stock and autoencoder.deterministic,
        "parameters": sum(parameter.numel() for parameter in autoencoder.parameters()),
        "latent_channels": channels,
        "downsampling": factor,
        "only_side": only,
        "sides": sides,
        "fingerprint": autoencoder.fingerprint(),
        "rounded_from": records.training.get("rounded_from"),
        "scaling_factor": autoencoder.config.get("scaling_factor"),
        "missing": records.missing(config),
        "not_recorded": NOT_RECORDED,
        "intended_use": config.intended_use,
        "not_for": config.not_for,
        "seen": read_text("--seen", config.seen),
        "energy": energy_sentence(records.run, config.watts, records.config.get("initial")),
        "earlier": [earlier_run(record, config.watts) for record in records.earlier],
        "data": data_rows(records.config),
        "data_credits": records.credits,
        "training": training_rows(records.config, records.run),
        "command": shlex.join(records.run.get("command", [])),
        "rate": rate_sentences(records.training, records.evaluation, factor, channels),
        "beta_path": subsample(records.beta_path, 8),
        "evaluation": evaluation_facts(evaluation) if evaluation else None,
        "held_out_psnr": held_out.get("held_out/psnr"),
        "verdicts": None if records.health is None else recorded_verdicts(records.health),
        "limits": limits(records.config, evaluation, records.health, sides, stock),
    }
    return fill("card.md", context | pictures)


def fill(template: str, context: dict[str, Any]) -> str:
    """A card's Markdown, whose front matter the hub would accept."""
    from huggingface_hub import ModelCard
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ldm_vae.evaluation"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"markdown_name": markdown_name, "python_text": python_text}
    text = environment.get_template(template).render(context)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    ModelCard(text)  # parses and so validates the front matter
    return text.rstrip() + "\n"


def front_matter(license: str | None, **values: Any) -> Any:
    """The hub's metadata as validated `ModelCardData`. Raises: UserError when the hub's rules refuse it."""
    from huggingface_hub import ModelCardData

    try:
        return ModelCardData(license=license, **values)
    except ValueError as error:
        raise UserError(f"card: the hub's metadata rules refuse it ({error}); correct the option it names") from error


def autoencoder_front_matter(config: CardConfig, records: Records, stock: bool, title: str) -> Any:
    """The metadata of an autoencoder; `stock`: diffusers loads it alone."""
    results = eval_results(records.evaluation) if records.evaluation else None
    dataset = hub_dataset(records.config)
    return front_matter(
        config.license,
        library_name="diffusers" if stock else "ldm_vae",
        tags=["autoencoder", "image-reconstruction", "latent-diffusion", "ldm_vae"],
        datasets=[dataset] if dataset else None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def eval_results(evaluation: dict[str, Any]) -> list[Any]:
    """One `EvalResult` a metric of the first row, decode(mean), with its interval and protocol."""
    from huggingface_hub import EvalResult

    row, protocol = evaluation["rows"][0], evaluation["protocol"]
    dataset = hub_dataset(evaluation["config"])
    return [
        EvalResult(
            task_type="image-reconstruction",
            task_name="Image reconstruction",
            dataset_type=dataset or evaluation["config"]["data"]["source"],
            dataset_name=dataset or data_name(evaluation["config"]),
            dataset_split=protocol["images"]["part"],
            dataset_args={
                "images": protocol["images"]["count"],
                "resolution": protocol["resolution"],
                "fingerprint": protocol["images"]["fingerprint"],
            },
            metric_type=metric,
            metric_name=f"{METRIC_TITLES.get(metric, metric)}, {row['name']}",
            metric_value=value["mean"],
            metric_args={"interval_95_percent": [value["low"], value["high"]]},
        )
        for metric, value in row["metrics"].items()
    ]


def push(directory: Path, repository: str, api: Any = None) -> str:
    """Upload the directory to the hub as one commit; a repository that is not there yet is made, private.

    Args:
        repository: `OWNER/NAME`, or `NAME` for your own account.
        api: a `huggingface_hub.HfApi`; None makes one with the stored login.

    Raises:
        UserError: no login, no right, no network; the hub's words in it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = api or HfApi()
    try:
        url = api.create_repo(repository, repo_type="model", private=True, exist_ok=True)
        api.upload_folder(folder_path=directory, repo_id=url.repo_id, commit_message="Model and card of ldm_vae")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--push-to-hub {repository}: {words[0]}; log in with `hf auth login` and try again") from error
    return str(url)


def title_of(directory: Path) -> str:
    """The folder's name; for `RUN/autoencoder` and `RUN/pipeline` that of the run."""
    return run_folder_of(directory.resolve()).name


def _required(path: Path, command: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a folder that `{command}` wrote")
    return read_json(path)


# The model card of a pipeline: README.md in its directory, from what it and its run record.

SETTINGS = ("batch", "label_dropout", "shift")
TRAINING_SETTINGS = ("learning_rate", "weight_decay", "ema_decay", "seed")


def write_pipeline_card(
    config: CardConfig, *, overwrite: bool = False, dry_run: bool = False
) -> tuple[Path, list[str]]:
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
    generated = pipeline_card(pipeline)
    check_replaceable(path, overwrite or (path.is_file() and path.read_text(errors="replace") == generated))
    place = run_folder_of(directory)
    run, settings = read_json(place / "run.json"), read_config_yaml(place / "config.yaml")
    credits, seen = read_credits(config.data_credits), read_text("--seen", config.seen)
    energy = energy_sentence(run, config.watts)
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
    check_nothing_lost(path, missing, overwrite)
    if dry_run:
        return path, missing
    pictures = {
        "curves": draw_curves(place, directory, diffusion_panels, settings),
        "samples": write_samples(Path(config.pictures), directory) if config.pictures else None,
    }
    height, width = pipeline.image_size()
    context: dict[str, Any] = {
        "card_data": front_matter(
            config.license,
            library_name="ldm_vae",
            pipeline_tag="unconditional-image-generation",
            tags=["latent-diffusion", "ldm_vae"],
        ).to_yaml(),
        "marker": MARKER,
        "title": title_of(directory),
        "height": height,
        "width": width,
        "labels": pipeline.labels,
        "unet_parameters": sum(parameter.numel() for parameter in pipeline.unet.parameters()),
        "autoencoder": f"{type(pipeline.autoencoder).__name__}, {pipeline.autoencoder.downsampling}x, "
        f"{len(pipeline.normalizer.mean)} channels",
        "encoder_fingerprint": pipeline.config["encoder_fingerprint"],
        "preprocessing": format_values(pipeline.config["preprocessing"] or {}),
        "missing": missing,
        "not_recorded": NOT_RECORDED,
        "intended_use": config.intended_use,
        "not_for": config.not_for,
        "credits": credits,
        "training": diffusion_training_rows(settings) + run_rows(run),
        "command": shlex.join(run.get("command", [])),
        "energy": energy,
        "earlier": [earlier_run(record, config.watts) for record in read_runs(directory / OF_AUTOENCODER)],
        "figures": figure_rows(run.get("metrics") or {}),
        "protocol": protocol_sentences(settings),
        "seen": seen,
    }
    write_text(path, fill("card_pipeline.md", context | pictures))
    return path, missing


def diffusion_training_rows(config: dict[str, Any]) -> Rows:
    """Data, U-Net, schedule and optimizer, as far as they are recorded."""
    rows: Rows = []
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


def figure_rows(metrics: dict[str, Any]) -> Rows:
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
            f"{config['neighbours']} training latents as from any other: memorized images."
        )
    return [*found, "One training, one seed: no interval over trainings is known."]


# The pictures of a model card, files beside it: training curves, and crops or samples, good and bad.

CURVES, CROPS, SAMPLES = "curves.svg", "crops.webp", "samples.webp"
OF_EACH = 3
"""Number of the best images and of the worst images to show."""
WINDOW = 160
WINDOW_STRIDE = 32
LARGEST_SIDE = 1600
"""Longest side in pixels of a sheet of samples."""


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
            f"--pictures: {evaluation}/results.json is not a result of this version's `ldm-vae evaluate`, or its "
            f"pictures are damaged ({type(error).__name__}: {error}); give a new folder of {command}"
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
    sheet = labeled_sheet(cells, captions, side=2 * WINDOW, columns=2 * OF_EACH)
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


# Records in words: tables and sentences of the model card. Each restates a file; what is not there is left out.

Rows = list[tuple[str, str]]
WATTS_PER_CORE = 10.0
"""Power of a server's processor core under load, with its share of memory and cooling: an order of magnitude."""
SOURCE_KEYS = ("name", "images", "licence", "credits")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_identity(recorded: str | None, identity: str, where: Path) -> None:
    """Raises: UserError when a record names the fingerprint of other weights."""
    if recorded is not None and recorded != identity:
        raise UserError(
            f"{where}: is about {recorded[:19]}..., the model is {identity[:19]}...; give the record of this model"
        )


def data_name(config: dict[str, Any]) -> str:
    """The images in one word: a dataset's name, a folder's name, or `synthetic`."""
    data = config.get("data") or {}
    if data.get("source") == "datasets":
        return str(data.get("datasets", {}).get("name") or "datasets")
    return Path(str(data["path"])).name if data.get("path") else str(data.get("source", "not recorded"))


def hub_dataset(config: dict[str, Any]) -> str | None:
    """The hub id of the dataset, where the images came from one."""
    data = config.get("data") or {}
    name = str((data.get("datasets") or {}).get("name") or "")
    return name if data.get("source") == "datasets" and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def read_text(option: str, path: str | None) -> str | None:
    """A text that the user gave by a file. Raises: UserError."""
    if path is None:
        return None
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path} cannot be read as text ({error})") from error


def read_credits(path: str | None) -> str | None:
    """Origin and licences of the data in Markdown: a text as it is, of a YAML list of sources a table.

    Each source has `name`, `images` (how many), `licence` and `credits`, and may have `url`.

    Raises:
        UserError: the file cannot be read, or a source lacks one of these.
    """
    text = read_text("--data-credits", path)
    if text is None or Path(str(path)).suffix not in (".yaml", ".yml"):
        return text
    import yaml

    try:
        sources = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--data-credits: {path} is not YAML ({' '.join(str(error).split())}); correct it") from error
    rows = []
    for source in sources if isinstance(sources, list) else [None]:
        if not isinstance(source, dict) or not {*SOURCE_KEYS} <= source.keys() <= {*SOURCE_KEYS, "url"}:
            raise UserError(
                f"--data-credits: {path} is not a list of sources with {', '.join(SOURCE_KEYS)} and maybe url"
            )
        name, *cells = (str(source[key]).strip().replace("|", "/").replace("\n", " ") for key in SOURCE_KEYS)
        rows.append([f"[{name}]({source['url']})" if source.get("url") else name, *cells])
    return "\n".join(markdown_table(["images of", "number", "license", "credits"], rows))


def energy_sentence(run: dict[str, Any], watts: float | None, initial: str | None = None) -> str | None:
    """A guess from hours and power; None where the time, or the power of an accelerator, is not known.

    `initial`: what the run started from, whose own energy is not in it.
    """
    cores = re.search(r"(\d+) cores", str(run.get("versions", {}).get("machine")))
    if "seconds" not in run or (watts is None and (cores is None or run.get("device") != "cpu")):
        return None
    hours = float(run["seconds"]) / 3600
    if watts is None and cores is not None:
        watts, words = WATTS_PER_CORE * int(cores[1]), f"{cores[1]} cores x {WATTS_PER_CORE:g} W"
    else:
        words = f"{watts:g} W"
    kilowatt_hours = hours * float(watts or 0) / 1000
    sentence = f"Energy, guessed and not measured: {hours:.2f} hours x {words} = {kilowatt_hours:.3f} kWh."
    return sentence if initial is None else f"{sentence} That of {initial}, which it started from, comes on top."


def earlier_run(record: dict[str, Any], watts: float | None) -> dict[str, str]:
    """An earlier run of the model: its `title`, its cost in a `sentence`, its `command`, and, as words
    to be added to it, the `settings` beside the defaults that it does not name.
    """
    rows = dict(run_rows(record))
    took = f", {rows['wall time']}" if "wall time" in rows else ""
    steps = pluralize(record["steps"], "step") if "steps" in record else "steps not recorded"
    where = f" on {rows.get('machine', 'a machine not recorded')}, commit {rows.get('commit', 'not recorded')}."
    parts = [f"{str(record.get('started', ''))[:10]}: {steps}{took}{where}", energy_sentence(record, watts) or ""]
    words = [str(word) for word in record.get("command", [])]
    settings = unnamed_settings(record.get("settings") or {}, words)
    return {
        "title": str(record.get("name")),
        "sentence": " ".join(parts).strip(),
        "command": shlex.join(words),
        "settings": shlex.join(f"{key}={_as_yaml(value)}" for key, value in settings.items()),
    }


def unnamed_settings(settings: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """The settings (dotted keys) that are not among the words of a command."""
    named = [f"{word.partition('=')[0]}." for word in words if "=" in word]
    return {
        key: value
        for key, value in settings.items()
        if not any(f"{key}.".startswith(other) or other.startswith(f"{key}.") for other in named)
    }


def _as_yaml(value: Any) -> str:
    """On one line, as short as it may be: what it means after `key=`."""
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("...\n").strip()


def data_rows(config: dict[str, Any]) -> Rows:
    """Where the images came from and how they were cropped."""
    data, crop = config.get("data") or {}, config.get("crop") or {}
    if not data:
        return []
    rows = [("source", str(data.get("source"))), ("images", data_name(config))]
    datasets = data.get("datasets") or {}
    for name in ("subset", "split", "revision"):
        if data.get("source") == "datasets" and datasets.get(name):
            rows.append((name, str(datasets[name])))
    synthetic = data.get("synthetic") or {}
    if data.get("source") == "synthetic":
        rows += [(f"synthetic {name}", str(value)) for name, value in synthetic.items()]
    rows.append(("share held out", f"{data.get('held_out'):g}"))
    if config.get("repeat"):
        rows.append(("seen more often", ", ".join(f"{name} x {times}" for name, times in config["repeat"].items())))
    if crop:
        rows.append(
            ("short side before cropping", f"{crop.get('short_side_min')} to {crop.get('short_side_max')} pixels")
        )
        rows.append(("mirrored", "half of the crops" if crop.get("flip") else "no"))
    return rows


def training_rows(config: dict[str, Any], run: dict[str, Any]) -> Rows:
    """Architecture, phases, objective, optimizer, and what the run cost."""
    rows: Rows = []
    autoencoder = config.get("autoencoder") or {}
    if autoencoder and not config.get("initial"):  # whose architecture is taken
        named = [f"{key} {value}" for key, value in autoencoder.items() if value not in (None, 0)]
        rows.append(("autoencoder", ", ".join(named)))
    if config.get("initial"):
        trained = config.get("train")
        rows.append(("started from", f"{config['initial']}; trained: {trained or 'everything'}"))
    for number, phase in enumerate(config.get("phases") or [], start=1):
        rows.append((f"phase {number}", f"{phase['steps']} steps, {phase['batch']} crops of {phase['crop']} pixels"))
    weights = {key: value for key, value in (config.get("loss") or {}).items() if isinstance(value, float) and value}
    if weights:
        rows.append(("loss weights", ", ".join(f"{key} {value:g}" for key, value in weights.items())))
    settings = config.get("training") or {}
    for name in ("learning_rate", "weight_decay", "ema_decay", "seed"):
        if settings.get(name) is not None:
            rows.append((name.replace("_", " "), f"{settings[name]:g}"))
    return rows + run_rows(run)


def run_rows(run: dict[str, Any]) -> Rows:
    """Steps, time, machine and versions, as far as they are recorded."""
    versions = run.get("versions", {})
    found = {
        "steps done": run.get("steps"),
        "precision": run.get("precision"),
        "started": run.get("started"),
        "wall time": f"{timedelta(seconds=round(run['seconds']))} (h:mm:ss)" if "seconds" in run else None,
        "machine": versions.get("machine"),
        "device, processes": f"{run['device']}, {run.get('processes')}" if "device" in run else None,
        "commit": versions.get("commit"),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items() if k not in ("machine", "commit")) or None,
    }
    return [(name, str(value)) for name, value in found.items() if value is not None]


def known_sides(factor: int, only: int | None) -> str:
    """What height and width of an image must be; `only`: of an autoencoder that knows one size."""
    return f"{only} pixels, scale others" if only else f"multiples of {factor} pixels, pad others"


def rate_sentences(training: dict[str, Any], evaluation: dict[str, Any], factor: int, channels: int) -> list[str]:
    """Mode, target, beta in both conventions, and the rate that was measured."""
    rate = training.get("rate") or {}
    sentences = []
    if training.get("kind") not in (None, "kl"):
        sentences.append(f"Of kind {training['kind']}: beta weighs no divergence of a posterior.")
        rate = {}
    if rate and (training.get("initial") or {}).get("train") == ["decoder"]:  # see `autoencoder.record.write_record`
        sentences.append("The last run trained the decoder alone; target, beta and steps are those of the encoder.")
    if rate.get("mode") == "target":
        sentences.append(f"Controlled toward {rate.get('target_nats')} nats per latent dimension.")
    elif rate.get("mode"):
        sentences.append(f"Mode: {rate['mode']}.")
    if rate.get("final_beta") is not None:
        weight = rate["final_beta"] * 3 * factor**2 / channels
        sentences.append(
            f"Final beta {rate['final_beta']:.3g} on means per element; a KL weight of {weight:.3g} in the convention "
            f"of Stable Diffusion (sums over the image; beta = w c / {3 * factor**2})."
        )
    if rate.get("pinned_share"):
        sentences.append(f"Beta was at a bound, the target missed, in {rate['pinned_share']:.1%} of the steps.")
    measured = (evaluation.get("rate") or {}).get("nats_per_dim")
    where = "in the evaluation"
    if measured is None and training.get("kind") in (None, "kl"):  # for other kinds the divergence is not a rate
        measured = (training.get("held_out") or {}).get("held_out/nats_per_dim")
        where = "on the images that training validates on"
    if measured is not None:
        sentences.append(
            f"Measured {where}: {measured:.3f} nats = {bits_per_dimension(measured):.3f} bits per latent dimension = "
            f"{bits_per_pixel(measured, channels, factor):.3f} bits per pixel."
        )
    return sentences


def evaluation_facts(evaluation: dict[str, Any]) -> dict[str, Any]:
    """`table` of all rows with intervals, and the protocol in `sentences`."""
    protocol, gain = evaluation["protocol"], evaluation.get("gain_over_linear_db")
    images, preprocessing = protocol["images"], protocol["preprocessing"]
    name, side = data_name(evaluation["config"]), protocol["resolution"]
    sentences = [
        f"{pluralize(images['count'], 'image')} ({images['part']}) of {name}, set `{images['fingerprint']}`.",
        f"{side} x {side} pixels: {preprocessing['fit']}, {preprocessing['filter']}.",
        f"{protocol['range']}; {protocol['average']}.",
        f"Precision {protocol['precision']}; LPIPS network: {protocol.get('lpips') or 'none'}.",
    ]
    if any("over_budget" in row for row in evaluation["rows"]):  # of codecs
        sentences += codec_lines(evaluation)
    if gain:
        sentences.append(f"Gain over the linear baseline on the same pixels: {_signed(gain)} dB.")
    if evaluation.get("distribution"):
        sentences += distribution_sentences(evaluation["distribution"])
    if evaluation.get("rejected"):
        sentences.append(f"Left out: {pluralize(len(evaluation['rejected']), 'image')} that could not be read.")
    return {"table": markdown_rows(evaluation), "sentences": sentences}


def _signed(value: dict[str, float]) -> str:
    return f"{value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"


def limits(
    config: dict[str, Any], evaluation: dict[str, Any], health: dict[str, Any] | None, sides: str, stock: bool
) -> list[str]:
    """What follows from the records about where the model is known to work, and where nothing is known.

    `sides`: what height and width must be, see `known_sides`.
    """
    sentences = [f"Reconstructions lose detail. Height and width must be {sides}."]
    if not stock:
        sentences.append("Stock diffusers cannot load this class; install ldm_vae, or export to ONNX or TorchScript.")
    crops = [phase["crop"] for phase in config.get("phases") or []]
    if crops:
        sentences.append(f"Trained on crops of at most {max(crops)} pixels of the images named above, no others.")
    if evaluation:
        protocol = evaluation["protocol"]
        sentences.append(
            f"Measured on {pluralize(protocol['images']['count'], 'image')} at {protocol['resolution']} pixels; "
            "nothing is recorded about other images, sizes or color spaces."
        )
        if protocol["images"]["part"] not in NEVER_TRAINED_ON:
            sentences.append(f"The measured images ({protocol['images']['part']}) include images of the training.")
    else:
        sentences.append("No evaluation is recorded: how well it reconstructs unseen images is not known.")
    if health is not None and any(verdict["severity"] == "fail" for verdict in recorded_verdicts(health)):
        sentences.append("The health report found at least one failure; see above before building on the latents.")
    return sentences
