"""A folder of generated images: PNG files that carry their own parameters, a contact sheet and `run.json`.

Owns files, batches and the division over processes. Image i is a function of (model, settings, seed, i) alone, so an
interrupted folder is completed by the same call, and more processes give the same images.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm_vae import __version__, provenance
from ldm_vae.config import changed_keys
from ldm_vae.data.sheets import labelled_sheet
from ldm_vae.diffusion.pipeline import DEFAULT_GUIDANCE, LatentDiffusionPipeline, find_label, image_generator
from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json, checksum, write_atomically

SHEET = "sheet.png"
SHEET_IMAGES = 120
PNG_KEY = "parameters"


@dataclass(frozen=True)
class GenerationConfig:
    """What decides the images.

    Attributes:
        model: A pipeline directory, or the run directory of `train-diffusion`.
        labels: Names or ids, taken in turn; none: every class of the model in turn.
        count: Images.
        seed: Image i starts from the noise of (seed, i).
        steps: Steps of the sampler.
        guidance: Strength of classifier-free guidance; None: 3 for a model with classes.
        height, width: Pixels; None: the size of the training images.
        precision: Of the networks. Sampling itself is float32.
    """

    model: str
    labels: tuple[str, ...] = ()
    count: int = 16
    seed: int = 0
    steps: int = 30
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.count < max(1, len(self.labels)):
            raise UserError(f"count: {self.count} images for {len(self.labels)} labels; give at least one per label")
        if self.steps < 1:
            raise UserError(f"steps: {self.steps} is below 1")


@dataclass(frozen=True)
class Picture:
    """One image to make; `label` is its class name, None without classes."""

    index: int
    label: str | None
    path: Path


def generate(
    config: GenerationConfig, output: str | Path, *, batch: int = 8, device: str = "auto", overwrite: bool = False
) -> tuple[int, float]:
    """Write `0000_label.png` ..., `sheet.png` and `run.json` into `output`; only what is missing.

    Args:
        config: What to generate.
        output: A folder that is new, or holds the same images, or (with `overwrite`) any other ones.
        batch: Images per pass; changes memory and speed.
        device: auto, cpu, cuda, ... ; under a launcher each process takes its own part of the images.
        overwrite: Replace the images of another call.

    Returns:
        The number of images that this process made now, and its images per second.
    """
    from accelerate import PartialState

    if batch < 1:
        raise UserError(f"batch: {batch} is below 1")
    started = time.time()
    state = PartialState(cpu=device == "cpu")
    target = state.device if device in ("auto", "cpu", "cuda") else torch.device(device)
    pipeline = load_pipeline(config, target)
    parameters = describe(config, pipeline)
    folder = Path(output)
    pictures = plan(config, pipeline.labels, folder)
    finished = check_folder(folder, parameters, pictures, overwrite)
    state.wait_for_everyone()  # every process has seen the folder as it was
    if state.is_main_process and not finished:
        prepare_folder(folder, pictures, overwrite)
        provenance.write_run_record(folder, None, started, 0, finished=False, parameters=parameters)
    state.wait_for_everyone()
    missing = [picture for picture in pictures if not picture.path.exists()]
    mine = missing[state.process_index :: state.num_processes]
    sampling = time.time()
    make(pipeline, mine, config, parameters, batch, show=state.is_main_process)
    speed = len(mine) / (time.time() - sampling) if mine else 0.0
    state.wait_for_everyone()
    if state.is_main_process and not finished:
        shown = pictures[:SHEET_IMAGES]
        sheet = labelled_sheet([Image.open(p.path) for p in shown], [p.label for p in shown if p.label is not None])
        write_atomically(folder / SHEET, lambda path: sheet.save(path, format="PNG"))
        figures = {"images": len(pictures), "images_per_second": round(speed * state.num_processes, 3)}
        provenance.write_run_record(folder, None, started, time.time() - started, parameters=parameters, **figures)
    return len(mine), speed


def load_pipeline(config: GenerationConfig, device: torch.device) -> LatentDiffusionPipeline:
    """The pipeline on its device and in its precision, without a progress bar of its own."""
    pipeline = LatentDiffusionPipeline.from_pretrained(pipeline_directory(config.model), use_safetensors=True)
    pipeline.to(device)
    if config.precision == "bf16":
        for module in (pipeline.unet, pipeline.autoencoder):
            torch.nn.Module.to(module, torch.bfloat16)  # diffusers' own `to` warns of an empty list
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_directory(model: str) -> Path:
    """The directory with `model_index.json`: the one given, or its `pipeline/`."""
    directory = Path(model).expanduser()
    for candidate in (directory, directory / "pipeline"):
        if (candidate / "model_index.json").is_file():
            return candidate
    what = "holds no model_index.json" if directory.is_dir() else "no such directory"
    raise UserError(f"{model}: {what}; give the directory of a pipeline, `train-diffusion` writes RUN/pipeline")


def describe(config: GenerationConfig, pipeline: LatentDiffusionPipeline) -> dict[str, Any]:
    """The settings with every default filled in, and the identity of the weights: equal ones give equal images."""
    if not pipeline.labels and config.guidance not in (None, 1.0):
        raise UserError(f"guidance: {config.guidance} has no effect on a model without classes; leave it out")
    settings = asdict(config)
    del settings["model"]  # the checksums say which one it was, wherever it lies
    settings["labels"] = [pipeline.labels[find_label(label, pipeline.labels)] for label in config.labels]
    if config.guidance is None:
        settings["guidance"] = DEFAULT_GUIDANCE if pipeline.labels else 1.0
    height, width = pipeline.image_size(config.height, config.width)
    directory = pipeline_directory(config.model)
    parts = ("unet", "autoencoder")
    weights = {part: [checksum(path) for path in sorted(directory.glob(f"{part}/*.safetensors"))] for part in parts}
    return settings | {
        "height": height,
        "width": width,
        **weights,
        "scheduler": type(pipeline.scheduler).__name__,
    }


def plan(config: GenerationConfig, names: Sequence[str], folder: Path) -> list[Picture]:
    """Index, class and file of every image."""
    wanted = [names[find_label(label, names)] for label in config.labels] or list(names)
    pictures = []
    for index in range(config.count):
        label = wanted[index % len(wanted)] if wanted else None
        word = re.sub(r"[^\w]+", "-", label).strip("-").lower() if label else ""
        name = f"{index:04d}_{word}.png" if word else f"{index:04d}.png"
        pictures.append(Picture(index, label, folder / name))
    return pictures


def check_folder(folder: Path, parameters: dict[str, Any], pictures: Sequence[Picture], overwrite: bool) -> bool:
    """True when the folder already holds exactly these images, finished.

    Raises:
        UserError: it holds something else, and nobody said that it may be overwritten.
    """
    if overwrite or not folder.exists() or not any(folder.iterdir()):
        return False
    path = folder / provenance.RUN_RECORD
    try:
        record = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        record = {}
    if "parameters" not in record:
        raise UserError(f"{folder}: is not empty and no result of `generate`; give another --out, or --overwrite")
    changes = changed_keys(record["parameters"], parameters)
    if changes:
        words = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changes.items())
        raise UserError(f"{folder}: holds other images ({words}); give another --out, or --overwrite")
    return bool(record.get("finished")) and all(picture.path.exists() for picture in pictures)


def prepare_folder(folder: Path, pictures: Sequence[Picture], overwrite: bool) -> None:
    """Make the folder; with `overwrite`, remove the images of an earlier call."""
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for path in folder.glob("[0-9][0-9][0-9][0-9]*.png"):
            path.unlink()


def make(
    pipeline: LatentDiffusionPipeline,
    pictures: Sequence[Picture],
    config: GenerationConfig,
    parameters: dict[str, Any],
    batch: int,
    show: bool,
) -> None:
    """Generate and save, batch by batch, under a progress bar."""
    from tqdm import tqdm

    steps = config.steps
    quiet = not show or not pictures
    with tqdm(total=len(pictures), desc="generating", unit="image", dynamic_ncols=True, disable=quiet) as bar:

        def progress(_: Any, index: int, *__: Any) -> dict[str, Any]:
            bar.set_postfix_str(f"step {index + 1}/{steps}")
            return {}

        for first in range(0, len(pictures), batch):
            part = pictures[first : first + batch]
            (images,) = pipeline(
                labels=[pipeline.labels.index(p.label) for p in part if p.label is not None] or None,
                num_images=len(part),
                height=config.height,
                width=config.width,
                num_inference_steps=steps,
                guidance_scale=parameters["guidance"],
                generator=[image_generator(config.seed, picture.index) for picture in part],
                return_dict=False,
                callback_on_step_end=progress,
            )
            for picture, image in zip(part, images):
                save_png(image, picture, parameters)
            bar.update(len(part))


def save_png(image: Image.Image, picture: Picture, parameters: dict[str, Any]) -> None:
    """Write atomically, with everything needed to make the image again as JSON in the text chunk `parameters`."""
    info = PngInfo()
    own = {key: value for key, value in parameters.items() if key not in ("labels", "count")}
    info.add_itxt(PNG_KEY, canonical_json(own | {"index": picture.index, "label": picture.label}))
    info.add_text("Software", f"ldm_vae {__version__}")
    write_atomically(picture.path, lambda path: image.save(path, format="PNG", pnginfo=info))
