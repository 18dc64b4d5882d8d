"""Which images a call of `generate` makes: for each one its class, its noise and its file."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm_vae import __version__, provenance
from ldm_vae.config import changed_keys
from ldm_vae.data.decoding import ImageRejected, decode_image
from ldm_vae.data.transforms import resize_center_crop
from ldm_vae.diffusion.editing import interpolation_weights, slerp
from ldm_vae.diffusion.pipeline import (
    DEFAULT_GUIDANCE,
    ClassMixture,
    LatentDiffusionPipeline,
    find_label,
    image_generator,
    make_guidance,
)
from ldm_vae.diffusion.samplers import FULL_INTERVAL, evaluations, first_step, flow_scheduler, sampler_name
from ldm_vae.diffusion.validation import compare_with_training
from ldm_vae.errors import UserError
from ldm_vae.files import (
    canonical_json,
    checksum,
    remove_leftovers,
    system_errors_explained,
    vanished,
    write_atomically,
    write_png,
)
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.format import read_manifest
from ldm_vae.runtime import compute_device
from ldm_vae.storage import open_folder
from ldm_vae.utils.image_grid import labelled_sheet
from ldm_vae.utils.text import pluralize


@dataclass(frozen=True)
class GenerateConfig:
    """What decides the images.

    Attributes:
        model: A pipeline directory, or the run directory of `train-diffusion`.
        labels: Names or ids, taken in turn; none: every class of the model in turn.
        count: Images; with `grid` rows of them, of one image per label.
        seed: Image i starts from the noise of (seed, i).
        steps: Steps of the sampler.
        sampler: euler, heun, dpm++ or unipc; None: the pipeline's scheduler.
        guidance: Strength of classifier-free guidance; None: 3 for a model with classes.
        guidance_interval: Lowest and highest t in [0, 1] at which guidance acts.
        guidance_rescale: 0 to 1, against the strong colours of strong guidance.
        autoguidance: Strength of autoguidance, for a pipeline with a second U-Net.
        grid: Every label from the same noise: what the label changes.
        interpolate: Two seeds, or two labels; `count` images from the one to the other.
        init: File of an image to start from.
        strength: Share of the steps that it goes through; None: 0.6, or 1 with a mask.
        mask: File of a picture of its size, white where it is to be painted anew.
        height, width: Pixels; None: the size of the training images.
        precision: Of the networks. Sampling itself is float32.
    """

    model: str
    labels: tuple[str, ...] = ()
    count: int = 16
    seed: int = 0
    steps: int = 30
    sampler: str | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] = FULL_INTERVAL
    guidance_rescale: float = 0.0
    autoguidance: float = 1.0
    grid: bool = False
    interpolate: tuple[str, str] | None = None
    init: str | None = None
    strength: float | None = None
    mask: str | None = None
    height: int | None = None
    width: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count: {self.count} is below 1")
        if self.count < len(self.labels) and not self.grid:
            raise UserError(
                f"count: {pluralize(self.count, 'image')} for {len(self.labels)} labels; give at least one per label"
            )
        if self.steps < 1:
            raise UserError(f"steps: {self.steps} is below 1")
        if self.grid and self.interpolate:
            raise UserError("grid: and interpolate ask for different images; give one of them")
        for name in ("strength", "mask"):
            if getattr(self, name) is not None and self.init is None:
                raise UserError(f"{name}: has no effect without an image; give init, or leave it out")


@dataclass(frozen=True)
class Noise:
    """What an image starts from: the noise of (seed, number), or one on the way from there to another seed's."""

    seed: int
    number: int
    towards: int | None = None
    share: float = 0.0

    def draw(self, shape: Sequence[int]) -> Tensor:
        """(c, h, w), standard normal, on the CPU."""
        noise = torch.randn(*shape, generator=image_generator(self.seed, self.number))
        if self.towards is None:
            return noise
        other = torch.randn(*shape, generator=image_generator(self.towards, self.number))
        return slerp(noise, other, self.share)


Row = tuple[ClassMixture | None, str | None, Noise]
"""Classes, caption and noise of an image."""


@dataclass(frozen=True)
class PlannedImage:
    """One image to make; `classes` is None for a model without them, `caption` what the sheet says."""

    index: int
    classes: ClassMixture | None
    caption: str | None
    noise: Noise
    path: Path


def plan(config: GenerateConfig, names: Sequence[str], folder: Path) -> list[PlannedImage]:
    """Every image, in the order of the sheet.

    Raises:
        UserError: an unknown label, or seeds and labels that do not go together.
    """
    wanted = [names[find_label(label, names)] for label in config.labels] or list(names)
    rows: list[Row]
    if config.interpolate:
        rows = _interpolation(config, config.interpolate, names)
    elif config.grid:
        if len(wanted) < 2:
            raise UserError(f"grid: {len(wanted)} classes to compare; give two labels or more")
        rows = [({label: 1.0}, label, Noise(config.seed, n)) for n in range(config.count) for label in wanted]
    elif wanted:
        turn = [wanted[index % len(wanted)] for index in range(config.count)]
        rows = [({label: 1.0}, label, Noise(config.seed, index)) for index, label in enumerate(turn)]
    else:
        rows = [(None, None, Noise(config.seed, index)) for index in range(config.count)]
    return [
        PlannedImage(index, classes, caption, noise, folder / image_name(index, caption))
        for index, (classes, caption, noise) in enumerate(rows)
    ]


def _interpolation(config: GenerateConfig, ends: tuple[str, str], names: Sequence[str]) -> list[Row]:
    """Whole numbers are seeds, anything else is a label."""
    places = interpolation_weights(config.count)
    if all(end.isdecimal() for end in ends):
        if names and len(config.labels) != 1:
            raise UserError("interpolate: between two seeds the label stays the same; give one label")
        label = names[find_label(config.labels[0], names)] if names else None
        classes = None if label is None else {label: 1.0}
        first, last = (int(end) for end in ends)
        return [(classes, label, Noise(first, 0, last, share)) for share in places]
    if config.labels:
        raise UserError("interpolate: its two labels are all labels there are; leave out the others")
    first_label, last_label = (names[find_label(end, names)] for end in ends)
    if first_label == last_label:
        raise UserError(f"interpolate: {first_label!r} twice; give two labels, or two seeds")
    rows: list[Row] = []
    for share in places:
        caption = f"{first_label} {round(100 * (1 - share))} %"
        rows.append(({first_label: 1 - share, last_label: share}, caption, Noise(config.seed, 0)))
    return rows


def image_name(index: int, caption: str | None) -> str:
    """`0007_red-ball.png`."""
    word = re.sub(r"[^\w]+", "-", caption).strip("-").lower() if caption else ""
    return f"{index:04d}_{word}.png" if word else f"{index:04d}.png"


# A folder of generated images: PNG files that carry their own parameters, a contact sheet and `run.json`.

logger = logging.getLogger(__name__)

SHEET = "sheet.png"
PAIRS = "neighbours.png"
SHEET_IMAGES = 120
NEIGHBOURS = 2048
PNG_KEY = "parameters"


def generate(
    config: GenerateConfig,
    output: str | Path,
    *,
    batch: int = 8,
    device: str = "auto",
    overwrite: bool = False,
    neighbours: str | None = None,
) -> tuple[int, float]:
    """Write `0000_label.png` ..., `sheet.png` and `run.json` into `output`; only what is missing.

    Args:
        config: What to generate.
        output: A folder that is new, or holds the same images, or (with `overwrite`) any other ones.
        batch: Images per pass; changes memory and speed.
        device: auto, cpu, cuda, ... ; under a launcher each process takes its own part of the images.
        overwrite: Replace the images of another call.
        neighbours: The latents that the model was trained on: `neighbours.png` shows the nearest to each image of the
            sheet, and `run.json` has the copy rate.

    Returns:
        The number of images that this process made now, and its images per second.

    Raises:
        UserError: a setting or the folder is not usable, another call is at work in it, or nothing more can be written.
    """
    from accelerate import PartialState

    if batch < 1:
        raise UserError(f"batch: {batch} is below 1")
    started = time.time()
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder")
    state = PartialState(cpu=device == "cpu")
    pipeline = load_pipeline(config, state.device if device in ("auto", state.device.type) else compute_device(device))
    parameters = resolve_parameters(config, pipeline)
    training = open_training_latents(neighbours, pipeline, parameters["height"], parameters["width"])
    pictures_in = read_input_images(config, parameters["height"], parameters["width"])
    pictures = plan(config, pipeline.labels, folder)
    finished = check_folder(folder, parameters, pictures, overwrite)
    finished = finished and (training is None or (folder / PAIRS).exists())
    if state.is_main_process and parameters["guidance"] <= 0:
        what = "not used" if parameters["guidance"] == 0 else "avoided"
        logger.warning(
            "guidance: at %g the label is %s, though the images are named after it; 1 is the label alone, %g is usual",
            parameters["guidance"], what, DEFAULT_GUIDANCE,
        )  # fmt: skip
    state.wait_for_everyone()  # every process has seen the folder as it was
    advice = "finished images stay, and the same command makes the others"
    with contextlib.ExitStack() as held, system_errors_explained(folder, advice):
        if state.is_main_process and not finished:
            held.enter_context(open_folder(folder).lock(provenance.RUN_LOCK))
            check_folder(folder, parameters, pictures, overwrite)  # by now another call may have been here
            prepare_folder(folder, pictures, overwrite)
            provenance.write_run_record(folder, None, started, 0, finished=False, parameters=parameters)
        state.wait_for_everyone()
        missing = [picture for picture in pictures if not picture.path.exists()]
        mine = missing[state.process_index :: state.num_processes]
        sampling = time.time()
        make(pipeline, mine, config, parameters, pictures_in, batch, show=state.is_main_process)
        speed = len(mine) / (time.time() - sampling) if mine else 0.0
        state.wait_for_everyone()
        if state.is_main_process and not finished:
            figures: dict[str, Any] = {"images": len(pictures)}
            if mine:
                figures["images_per_second"] = round(speed * state.num_processes, 3)
            figures |= make_sheets(folder, pictures[:SHEET_IMAGES], pipeline, training, state)
            provenance.write_run_record(folder, None, started, time.time() - started, parameters=parameters, **figures)
    return len(mine), speed


def open_training_latents(
    latents: str | None, pipeline: LatentDiffusionPipeline, height: int, width: int
) -> LatentDataset | None:
    """Posterior means, not mirrored. Raises: UserError for latents of another model or size, or fewer than two."""
    if latents is None:
        return None
    manifest = read_manifest(latents)
    pipeline.check_latents(manifest)
    training = LatentDataset(latents, posterior="mean" if manifest.content == "moments" else None, flip=False)
    shape, known = pipeline.latent_shape(height, width), manifest.latent_shape
    if shape != tuple(known):
        raise UserError(
            f"neighbours: latents of {shape[1]} x {shape[2]} cannot be compared with {known[1]} x {known[2]}; "
            "leave out the size"
        )
    if len(training) < 2:
        raise UserError(f"{latents}: {len(training)} latents have no second nearest; give the set of the training")
    return training


def make_sheets(
    folder: Path,
    shown: Sequence[PlannedImage],
    pipeline: LatentDiffusionPipeline,
    training: LatentDataset | None,
    state: Any,
) -> dict[str, int]:
    """Write the sheet of the images and, with the latents of the training, that of their neighbours: its figures."""
    images, captions = [Image.open(p.path) for p in shown], [p.caption for p in shown if p.caption]
    write_png(folder / SHEET, labelled_sheet(images, captions))
    if training is None:
        return {}
    pairs, copies = compare_with_training(pipeline, images, captions, training, NEIGHBOURS)
    write_png(folder / PAIRS, pairs)
    state.print(
        f"{folder / PAIRS}: {copies.copies} of {copies.samples} images are copies of one of {copies.compared} "
        "training latents"
    )
    return {"copies": copies.copies, "compared_images": copies.samples, "compared_latents": copies.compared}


def load_pipeline(config: GenerateConfig, device: torch.device) -> LatentDiffusionPipeline:
    """The pipeline on its device and in its precision, without a progress bar of its own."""
    pipeline = LatentDiffusionPipeline.from_pretrained(pipeline_directory(config.model), use_safetensors=True)
    pipeline.to(device)
    if config.precision == "bf16":
        for module in pipeline.components.values():
            if not isinstance(module, torch.nn.Module):
                continue
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


def resolve_parameters(config: GenerateConfig, pipeline: LatentDiffusionPipeline) -> dict[str, Any]:
    """The settings with every default filled in, and what weights and files hold: equal ones give equal images."""
    if not pipeline.labels and config.guidance not in (None, 1.0):
        raise UserError(f"guidance: {config.guidance} has no effect on a model without classes; leave it out")
    settings = asdict(config)
    del settings["model"]  # the checksums say which one it was, wherever it lies
    settings["labels"] = [pipeline.labels[find_label(label, pipeline.labels)] for label in config.labels]
    if config.guidance is None:
        settings["guidance"] = DEFAULT_GUIDANCE if pipeline.labels else 1.0
    make_guidance(
        settings["guidance"], config.autoguidance, config.guidance_interval, config.guidance_rescale,
        labelled=bool(pipeline.labels), weak=pipeline.autoguidance_unet is not None,
    )  # fmt: skip
    settings["height"], settings["width"] = pipeline.image_size(config.height, config.width)
    settings["guidance_interval"] = list(config.guidance_interval)
    settings["interpolate"] = list(config.interpolate) if config.interpolate else None
    scheduler = flow_scheduler(1.0, config.sampler) if config.sampler else pipeline.scheduler
    settings["sampler"] = sampler_name(scheduler)
    first = 0
    if config.init is not None:
        if config.strength is None:
            settings["strength"] = 0.6 if config.mask is None else 1.0
        first = first_step(config.steps, settings["strength"])
        for name in ("init", "mask"):
            settings[name] = None if settings[name] is None else checksum(existing_file(settings[name], name))
    settings["evaluations"] = evaluations(settings["sampler"], config.steps, first)
    directory = pipeline_directory(config.model)
    parts = ["unet", "autoencoder"] + ["autoguidance_unet"] * (config.autoguidance != 1)
    weights = {part: [checksum(path) for path in sorted(directory.glob(f"{part}/*.safetensors"))] for part in parts}
    return settings | weights


def existing_file(path: str, name: str) -> Path:
    """Raises: UserError when it is no file."""
    if not Path(path).is_file():
        raise UserError(f"{name}: {path} is no file; give the file of an image")
    return Path(path)


def read_input_images(config: GenerateConfig, height: int, width: int) -> dict[str, np.ndarray]:
    """`init` (h, w, 3) and `mask` (h, w, 1) where given, uint8, scaled to cover the size and cropped around the centre.

    Raises:
        UserError: a file that is no image, or a mask of another size.
    """
    found: dict[str, np.ndarray] = {}
    for name, path in (("init", config.init), ("mask", config.mask)):
        if path is not None:
            try:
                found[name] = decode_image(existing_file(path, name).read_bytes())
            except ImageRejected as error:
                raise UserError(f"{name}: {path} cannot be read ({error}); give the file of an image") from error
    if "mask" in found and found["mask"].shape != found["init"].shape:
        sizes = [" x ".join(map(str, found[name].shape[:2])) for name in ("mask", "init")]
        raise UserError(f"mask: {sizes[0]} pixels for an image of {sizes[1]}; give one of the same size")
    return {
        name: resize_center_crop(pixels, (height, width))[..., : 1 if name == "mask" else 3]
        for name, pixels in found.items()
    }


def check_folder(folder: Path, parameters: dict[str, Any], pictures: Sequence[PlannedImage], overwrite: bool) -> bool:
    """True when the folder already holds exactly these images, finished.

    Raises:
        UserError: it holds something else, and nobody said that it may be overwritten.
    """
    passing = (provenance.RUN_LOCK, ".tmp-")
    if overwrite or not folder.exists() or all(path.name.startswith(passing) for path in folder.iterdir()):
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


def prepare_folder(folder: Path, pictures: Sequence[PlannedImage], overwrite: bool) -> None:
    """Remove what killed calls left behind; with `overwrite`, the images of an earlier call."""
    remove_leftovers(folder)
    if overwrite:
        for path in [*folder.glob("[0-9][0-9][0-9][0-9]*.png"), folder / PAIRS]:
            path.unlink(missing_ok=True)


def make(
    pipeline: LatentDiffusionPipeline,
    pictures: Sequence[PlannedImage],
    config: GenerateConfig,
    parameters: dict[str, Any],
    pictures_in: Mapping[str, np.ndarray],
    batch: int,
    show: bool,
) -> None:
    """Generate and save, batch by batch, under a progress bar."""
    from tqdm import tqdm

    height, width = parameters["height"], parameters["width"]
    quiet = not show or not pictures
    with tqdm(total=len(pictures), desc="generating", unit="image", dynamic_ncols=True, disable=quiet) as bar:

        def progress(_: Any, index: int, *__: Any) -> None:
            bar.set_postfix_str(f"step {index + 1}")

        for first in range(0, len(pictures), batch):
            part = pictures[first : first + batch]
            (images,) = pipeline(
                labels=[picture.classes for picture in part if picture.classes] or None,
                num_images=len(part),
                latents=torch.stack([picture.noise.draw(pipeline.latent_shape(height, width)) for picture in part]),
                num_inference_steps=config.steps,
                guidance_scale=parameters["guidance"],
                guidance_interval=config.guidance_interval,
                guidance_rescale=config.guidance_rescale,
                autoguidance_scale=config.autoguidance,
                sampler=config.sampler,
                strength=parameters["strength"],
                return_dict=False,
                callback_on_step_end=progress,
                image=pictures_in.get("init"),
                mask=pictures_in.get("mask"),
            )
            if not (part[0].path.parent / provenance.RUN_RECORD).exists():
                raise vanished()
            for picture, image in zip(part, images):
                save_png(image, picture, parameters)
            bar.update(len(part))


def save_png(image: Image.Image, picture: PlannedImage, parameters: dict[str, Any]) -> None:
    """Write atomically, with everything needed to make the image again as JSON in the text chunk `parameters`."""
    info = PngInfo()
    own = {key: value for key, value in parameters.items() if key not in ("labels", "count")}
    own |= {"index": picture.index, "label": picture.caption, "noise": asdict(picture.noise)}
    info.add_itxt(PNG_KEY, canonical_json(own | {"classes": picture.classes}))
    info.add_text("Software", f"ldm_vae {__version__}")
    write_atomically(picture.path, lambda path: image.save(path, format="PNG", pnginfo=info))
