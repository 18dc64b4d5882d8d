"""`ldm-vae generate`: make a folder of images with a trained pipeline.

    GenerateConfig -> plan: class, noise and file of each image -> LatentDiffusionPipeline, batch by batch
                   -> PNG files with their parameters, a contact sheet and `run.json`

The same call completes an incomplete folder. A folder is never overwritten without `overwrite`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm_vae import provenance
from ldm_vae.config import changed_keys, check_positive, plain_settings
from ldm_vae.data.decoding import ImageRejected, read_image, read_mask
from ldm_vae.data.image_input import mask_values
from ldm_vae.data.samples import Enlarged, crop_image, enlarged_record, enlarged_sentences
from ldm_vae.data.survey import describe_classes
from ldm_vae.diffusion.editing import InitImage, default_strength, interpolation_weights, read_init_image, slerp
from ldm_vae.diffusion.pipeline import (
    DEFAULT_GUIDANCE,
    ClassMixture,
    LatentDiffusionPipeline,
    find_label,
    image_generator,
    make_guidance,
)
from ldm_vae.diffusion.samplers import FULL_INTERVAL, evaluations, first_step, flow_scheduler, sampler_name
from ldm_vae.diffusion.saving import INDEX
from ldm_vae.diffusion.validation import Copies, compare_with_training
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
from ldm_vae.paths import PICTURE, PIPELINE
from ldm_vae.runtime import check_accelerate, compute_device
from ldm_vae.storage import open_folder
from ldm_vae.training.distributed import run_on_main
from ldm_vae.utils.image_grid import labeled_sheet
from ldm_vae.utils.progress import Progress, begin, beside, end, end_dry_run, say
from ldm_vae.utils.text import duration_text, pluralize, short_name
from ldm_vae.version import __version__

logger = logging.getLogger(__name__)

SHEET = "sheet.png"
PAIRS = "neighbours.png"
SHEET_IMAGES = 120
COMPARED_LATENTS = 2048
VISIBLE_SECONDS = 60.0
"""Longest wait for a file of another process to appear on a network disk."""
PNG_KEY = "parameters"
HOW_ONLY = ("model", "output", "size", "batch", "device", "neighbours")
"""Settings that do not affect the pixels, or that the parameters of an image hold in another form."""


@dataclass(frozen=True)
class GenerateConfig:
    """`ldm-vae generate`: generate images, with or without class labels.

    The same command completes an interrupted folder. Without labels a model with classes makes every class in turn.

      ldm-vae generate runs/quickstart/diffusion count=40 output=samples
      ldm-vae generate runs/mine labels=[cat,3] guidance=4 resolution=512x768 output=cats
      ldm-vae generate runs/mine --grid count=4 sampler=heun steps=15 output=grid
      ldm-vae generate runs/mine interpolate=[cat,dog] count=8 output=between
      ldm-vae generate runs/mine labels=dog init=cat.jpg strength=0.5 count=4 output=variations
      ldm-vae generate runs/mine labels=dog init=room.jpg mask=sofa.png output=room

    Attributes:
        model: A diffusion pipeline or run.
        output: Folder for the images: new, or with some of the same images.
        labels: Names or ids, used in turn; empty: every class of the model in turn.
        count: Number of images; with `grid`, number of rows with one image per label.
        seed: Seed of the noise: image i starts from the noise of (seed, i).
        steps: Number of steps of the sampler.
        sampler: euler, heun, dpm++ or unipc; None: the pipeline's scheduler.
        guidance: Strength of classifier-free guidance; None: 3 for a model with classes.
        guidance_interval: Lowest and highest t in [0, 1] with guidance; 1 is pure noise.
        guidance_rescale: 0 to 1, reduces the strong colors of strong guidance; 0.7 is usual.
        autoguidance: Strength of autoguidance, for a pipeline with a second U-Net; 1 is off.
        grid: Make every label from the same noise, which shows the effect of the label.
        interpolate: Two seeds, or two labels; makes `count` images between them.
        init: File of an image to start from, scaled and cropped to the size.
        strength: Share of the steps that are applied to it; None: 0.6, or 1 with a mask.
        mask: File of an image of the same size, white where `init` is repainted.
        size: Size in pixels: 512, or height x width as 512x768; None: the size of the training images.
        precision: Precision of the networks: fp32 or bf16. Sampling itself is float32.
        batch: Images per forward pass; affects memory and speed.
        device: auto, cpu, cuda, cuda:1, ...; under a launcher each process takes its own part of the images.
        neighbours: The folder of the training latents, or its URL: `neighbours.png` shows the nearest of them to each
            image of the sheet, and the copy rate is printed and recorded.
    """

    model: str = "???"
    output: str = "???"
    labels: tuple[str, ...] = ()
    count: int = 16
    seed: int = 0
    steps: int = 30
    sampler: Literal["euler", "heun", "dpm++", "unipc"] | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] = FULL_INTERVAL
    guidance_rescale: float = 0.0
    autoguidance: float = 1.0
    grid: bool = False
    interpolate: tuple[str, str] | None = None
    init: str | None = None
    strength: float | None = None
    mask: str | None = None
    size: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: int = 8
    device: str = "auto"
    neighbours: str | None = None

    def __post_init__(self) -> None:
        check_positive(self, "count", "steps", "batch")
        if self.count < len(self.labels) and not self.grid:
            raise UserError(
                f"count: {pluralize(self.count, 'image')} for {len(self.labels)} labels; give at least one per label"
            )
        if self.grid and self.interpolate:
            raise UserError("grid: and interpolate ask for different images; give one of them")
        for name in ("strength", "mask"):
            if getattr(self, name) is not None and self.init is None:
                raise UserError(f"{name}: has no effect without an image; give init, or leave it out")
        self.sides()

    def sides(self) -> tuple[int | None, int | None]:
        """(height, width) in pixels of `size`, each None for the training size. Raises: UserError."""
        if self.size is None:
            return None, None
        sides = str(self.size).lower().split("x")
        if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
            raise UserError(f"size: {self.size!r} is not a size; give 512, or height x width as 512x768")
        return int(sides[0]), int(sides[-1])


@dataclass(frozen=True)
class GenerationResult:
    """The result of `generate`.

    Attributes:
        folder: Folder of the images.
        images: Number of images in it.
        made: Number of images that this process made; 0 if all existed.
        images_per_second: Rate of this process; 0 if it made none.
        copies: Number of copies of training latents; None without `neighbours`, and in all but the main process.
    """

    folder: Path
    images: int
    made: int
    images_per_second: float
    copies: Copies | None


def generate(config: GenerateConfig, *, overwrite: bool = False, dry_run: bool = False) -> GenerationResult:
    """Write the missing ones of `0000_label.png` ..., `sheet.png` and `run.json` into `config.output`.

    Args:
        config: What to generate.
        overwrite: Replace the images of another call in that folder.
        dry_run: Open everything, check the folder and time two steps; write nothing.

    Raises:
        UserError: a setting or the folder is not usable, another call is using it, or the disk is full.
    """
    config = plain_settings(config)
    from accelerate import PartialState

    started = time.time()
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder")
    check_accelerate()
    state = PartialState(cpu=config.device == "cpu")
    device = state.device if config.device in ("auto", state.device.type) else compute_device(config.device)
    pipeline = load_pipeline(config.model, device, config.precision)
    parameters = resolve_parameters(config, pipeline)
    size = parameters["height"], parameters["width"]
    training = open_training_latents(config.neighbours, pipeline, *size)
    enlarged = Enlarged()
    init = read_input(config, *size, pipeline.autoencoder.downsampling, enlarged)
    images = plan_images(config, pipeline.labels)

    def is_finished() -> bool:
        found = check_folder(folder, parameters, images, overwrite)
        return found and (training is None or (folder / PAIRS).exists())

    finished = run_on_main(state, is_finished)  # before anything in the folder changes
    if state.is_main_process:
        warn_of_unused_labels(parameters["guidance"])
        begin("generate", *_described(config, parameters, images), str(device), f"to {folder}")
    if dry_run:
        seconds = len(images) * seconds_an_image(pipeline, images, config, parameters, init)
        end_dry_run(folder, "all images are there" if finished else f"about {duration_text(seconds)}")
        return GenerationResult(folder, len(images), 0, 0.0, None)
    copies = None
    advice = "finished images stay, and the same command makes the others"
    with contextlib.ExitStack() as stack, system_errors_explained(folder, advice):

        def take() -> list[int]:
            """Lock the folder; the numbers of the images to make. No other process looks for itself what is there."""
            stack.enter_context(open_folder(folder).lock(provenance.RUN_LOCK))
            check_folder(folder, parameters, images, overwrite)  # another call may have been here meanwhile
            prepare_folder(folder, overwrite)
            provenance.write_run_record(folder, None, started, 0, finished=False, parameters=parameters)
            return [image.index for image in images if not image.path.exists()]

        missing = [] if finished else run_on_main(state, take)
        if not (finished or state.is_main_process):
            stack.enter_context(open_folder(folder).watch(provenance.RUN_LOCK))
        mine = [images[index] for index in missing[state.process_index :: state.num_processes]]
        sampling = time.time()
        make_images(pipeline, mine, config, parameters, init, show=state.is_main_process)
        speed = len(mine) / (time.time() - sampling) if mine else 0.0
        run_on_main(state, lambda: check_images_there(folder, images, VISIBLE_SECONDS * (state.num_processes > 1)))
        if state.is_main_process and not finished:
            record: dict[str, Any] = {"images": len(images), **enlarged_record(enlarged)}
            if mine:
                record["images_per_second"] = round(speed * state.num_processes, 3)
            copies = write_sheets(folder, images[:SHEET_IMAGES], pipeline, training)
            if copies is not None:
                record |= {"copies": copies.copies, "compared_images": copies.samples}
                record["compared_latents"] = copies.compared
            provenance.write_run_record(folder, None, started, time.time() - started, parameters=parameters, **record)
    result = GenerationResult(folder, len(images), len(mine), speed, copies)
    for line in enlarged_sentences([side for _, side in enlarged], 1):
        say(line)
    say_result(config, result)
    return result


def _described(config: GenerateConfig, parameters: Mapping[str, Any], images: Sequence[PlannedImage]) -> list[str]:
    """A description of the images, for the first line."""
    names = list(dict.fromkeys(image.caption for image in images if image.caption))
    size = f"{parameters['height']} x {parameters['width']} pixels"
    how = f"{pluralize(config.steps, 'step')} of {parameters['sampler']}, guidance {parameters['guidance']:g}"
    begins_with = f"starting from {config.init}" if config.init else ""
    of_what = "between " + " and ".join(config.interpolate) if config.interpolate else describe_classes(names)
    count = f"{pluralize(len(images), 'image')} {of_what}"
    return [count, size, how, begins_with, config.model, config.precision]


def say_result(config: GenerateConfig, result: GenerationResult) -> None:
    """Print the result."""
    if result.copies is not None:
        say(
            f"{result.folder / PAIRS}: {result.copies.copies} of {result.copies.samples} images are copies of one of "
            f"{pluralize(result.copies.compared, 'training latent')}"
        )
    what = "these images are there already; nothing to do"
    if result.made:
        speed = result.images_per_second
        what = f"{pluralize(result.made, 'image')} and {SHEET}, {speed:.2f} images/s ({1 / speed:.2f} s each)"
    words = ["ldm-vae", "generate", config.model, f"count={config.count}", f"seed={config.seed + 1}"]
    end(result.folder, what, [*words, f"output={beside(result.folder, f'seed{config.seed + 1}')}"])


def warn_of_unused_labels(guidance: float) -> None:
    if guidance <= 0:
        logger.warning(
            "guidance: at %g the label is %s, though the images are named after it; 1 is the label alone, %g is usual",
            guidance, "not used" if guidance == 0 else "avoided", DEFAULT_GUIDANCE,
        )  # fmt: skip


# The plan: for each image its class, its noise and its file.


@dataclass(frozen=True)
class Noise:
    """The initial noise of an image: that of (seed, number), or an interpolation to that of another seed."""

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


@dataclass(frozen=True)
class PlannedImage:
    """One image to make. `classes`: None for a model without classes; `caption`: its text on the sheet."""

    index: int
    classes: ClassMixture | None
    caption: str | None
    noise: Noise
    path: Path


Row = tuple[ClassMixture | None, str | None, Noise]
"""Classes, caption and noise of an image."""


def plan_images(config: GenerateConfig, names: Sequence[str]) -> list[PlannedImage]:
    """Every image of a model with classes of these `names`, in the order of the sheet.

    Raises:
        UserError: an unknown label, or seeds and labels that do not go together.
    """
    labels = [names[find_label(label, names)] for label in config.labels] or list(names)
    rows: list[Row]
    if config.interpolate:
        rows = _interpolation(config, config.interpolate, names)
    elif config.grid:
        if len(labels) < 2:
            raise UserError(f"grid: {len(labels)} classes to compare; give two labels or more")
        rows = [({label: 1.0}, label, Noise(config.seed, n)) for n in range(config.count) for label in labels]
    elif labels:
        turn = [labels[index % len(labels)] for index in range(config.count)]
        rows = [({label: 1.0}, label, Noise(config.seed, index)) for index, label in enumerate(turn)]
    else:
        rows = [(None, None, Noise(config.seed, index)) for index in range(config.count)]
    return [
        PlannedImage(index, classes, caption, noise, Path(config.output) / image_name(index, caption))
        for index, (classes, caption, noise) in enumerate(rows)
    ]


def _interpolation(config: GenerateConfig, ends: tuple[str, str], names: Sequence[str]) -> list[Row]:
    """Whether the texts are seeds, which are whole numbers; other texts are labels."""
    weights = interpolation_weights(config.count)
    if all(end.isdecimal() for end in ends):
        if names and len(config.labels) != 1:
            raise UserError("interpolate: between two seeds the label stays the same; give one label")
        label = names[find_label(config.labels[0], names)] if names else None
        classes = None if label is None else {label: 1.0}
        first, last = (int(end) for end in ends)
        return [(classes, label, Noise(first, 0, last, weight)) for weight in weights]
    if config.labels:
        raise UserError("interpolate: uses its two labels only; leave labels out")
    first_label, last_label = (names[find_label(end, names)] for end in ends)
    if first_label == last_label:
        raise UserError(f"interpolate: {first_label!r} twice; give two labels, or two seeds")
    rows: list[Row] = []
    for weight in weights:
        caption = f"{first_label} {round(100 * (1 - weight))} %"
        rows.append(({first_label: 1 - weight, last_label: weight}, caption, Noise(config.seed, 0)))
    return rows


def image_name(index: int, caption: str | None) -> str:
    """`0007_red-ball.png`; the words of a long caption are shortened."""
    word = re.sub(r"[^\w]+", "-", caption).strip("-").lower() if caption else ""
    return f"{index:04d}_{short_name(word)}.png" if word else f"{index:04d}.png"


# The inputs: the pipeline, the images to start from, the latents to compare with.


def load_pipeline(model: str, device: torch.device, precision: str = "fp32") -> LatentDiffusionPipeline:
    """The pipeline on its device and in its precision, without a progress bar of its own."""
    pipeline = LatentDiffusionPipeline.from_pretrained(pipeline_directory(model), use_safetensors=True)
    pipeline.to(device)
    if precision == "bf16":
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                torch.nn.Module.to(module, torch.bfloat16)  # diffusers' own `to` gives a needless warning
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_directory(model: str) -> Path:
    """The directory with `model_index.json`: `model` itself, or its `pipeline/`. Raises: UserError."""
    found = PIPELINE.find(model)
    assert found is not None
    return found


def has_pipeline(model: str) -> bool:
    """Whether it is a pipeline directory, or a run of `train-diffusion`."""
    directory = Path(model).expanduser()
    return any((candidate / INDEX).is_file() for candidate in (directory, directory / "pipeline"))


def resolve_parameters(config: GenerateConfig, pipeline: LatentDiffusionPipeline) -> dict[str, Any]:
    """The settings that determine the images, with all defaults, and checksums of the weights and files.

    Equal parameters give equal images.
    """
    if not pipeline.labels and config.guidance not in (None, 1.0):
        raise UserError(f"guidance: {config.guidance} has no effect on a model without classes; leave it out")
    settings = {name: value for name, value in asdict(config).items() if name not in HOW_ONLY}
    settings["labels"] = [pipeline.labels[find_label(label, pipeline.labels)] for label in config.labels]
    if config.guidance is None:
        settings["guidance"] = DEFAULT_GUIDANCE if pipeline.labels else 1.0
    make_guidance(
        settings["guidance"], config.autoguidance, config.guidance_interval, config.guidance_rescale,
        labeled=bool(pipeline.labels), weak=pipeline.autoguidance_unet is not None,
    )  # fmt: skip
    settings["height"], settings["width"] = pipeline.image_size(*config.sides())
    settings["precision"] = settings.pop("precision")  # the order of the keys is recorded
    settings["guidance_interval"] = list(config.guidance_interval)
    settings["interpolate"] = list(config.interpolate) if config.interpolate else None
    scheduler = flow_scheduler(1.0, config.sampler) if config.sampler else pipeline.scheduler
    settings["sampler"] = sampler_name(scheduler)
    first = 0
    if config.init is not None:
        if config.strength is None:
            settings["strength"] = default_strength(masked=config.mask is not None)
        first = first_step(config.steps, settings["strength"])
        for name in ("init", "mask"):
            settings[name] = None if settings[name] is None else checksum(existing_file(settings[name], name))
    settings["evaluations"] = evaluations(settings["sampler"], config.steps, first)
    directory = pipeline_directory(config.model)
    networks = ["unet", "autoencoder"] + ["autoguidance_unet"] * (config.autoguidance != 1)
    weights = {name: [checksum(path) for path in weight_paths(directory / name)] for name in networks}
    return settings | weights


def weight_paths(folder: Path) -> list[Path]:
    """The weight files of a network: safetensors, or else those of torch."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def existing_file(path: str, name: str) -> Path:
    """The checksum of a file. Raises: UserError if it is not a file."""
    found = PICTURE.find(path, name)
    assert found is not None
    return found


def read_input(config: GenerateConfig, height: int, width: int, factor: int, enlarged: Enlarged) -> InitImage | None:
    """The image to start from and its mask, scaled to cover the size and cropped at the center; None without `init`.

    An image that is smaller than the size is appended to `enlarged`.

    Raises:
        UserError: a file that is not an image or not a mask, or a mask of another size.
    """
    if config.init is None:
        return None
    size = (height, width)
    whole = file_pixels(read_image, config.init, "init")
    image = crop_image(whole, size, Path(config.init).name, enlarged).pixels
    if config.mask is None:
        return read_init_image(image, None, factor)
    mask = mask_values(file_pixels(read_mask, config.mask, "mask"), f"mask: {config.mask}")
    if mask.shape != whole.shape[:2]:
        sizes = [" x ".join(map(str, found.shape[:2])) for found in (mask, whole)]
        raise UserError(f"mask: {sizes[0]} pixels for an image of {sizes[1]}; give one of the same size")
    gray = crop_image(np.repeat((255 * mask).round().astype(np.uint8)[..., None], 3, axis=2), size, "mask", []).pixels
    return read_init_image(image, gray[..., 0] / np.float32(255), factor)


def file_pixels(read: Callable[[Path], np.ndarray], path: str, setting: str) -> np.ndarray:
    """The pixels of the file of a setting. Raises: UserError."""
    try:
        return read(existing_file(path, setting))
    except ImageRejected as error:
        raise UserError(f"{setting}: {path} cannot be read ({error}); give the file of an image") from error


def open_training_latents(
    latents: str | None, pipeline: LatentDiffusionPipeline, height: int, width: int
) -> LatentDataset | None:
    """The training latents. Raises: UserError for latents of another model or size, or fewer than two."""
    if latents is None:
        return None
    manifest = read_manifest(latents)
    pipeline.check_latents(manifest)
    training = LatentDataset(latents)
    shape, known = pipeline.latent_shape(height, width), manifest.latent_shape
    if shape != tuple(known):
        raise UserError(
            f"neighbours: latents of {shape[1]} x {shape[2]} cannot be compared with {known[1]} x {known[2]}; "
            "leave out the size"
        )
    if len(training) < 2:
        raise UserError(f"{latents}: {len(training)} latents have no second nearest; give the set of the training")
    return training


# The folder: its allowed content, and the files that are written.


def check_folder(folder: Path, parameters: Mapping[str, Any], images: Sequence[PlannedImage], overwrite: bool) -> bool:
    """Whether the folder already holds exactly these images, finished.

    Raises:
        UserError: it holds something else, and `overwrite` is not set.
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
        raise UserError(f"{folder}: is not empty and not a result of `generate`; give another output, or --overwrite")
    changes = changed_keys(record["parameters"], parameters)
    if changes:
        words = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changes.items())
        raise UserError(f"{folder}: holds other images ({words}); give another output, or --overwrite")
    return bool(record.get("finished")) and all(image.path.exists() for image in images)


def check_images_there(folder: Path, images: Sequence[PlannedImage], patience_seconds: float) -> None:
    """Raises: UserError if images are missing after `patience_seconds`, with their number."""
    absent = [image.path.name for image in images if not becomes_visible(image.path, patience_seconds)]
    if absent:
        is_missing = "is" if len(absent) == 1 else "are"
        raise UserError(
            folder,
            f"{len(absent)} of the {pluralize(len(images), 'image')} {is_missing} missing, {absent[0]} among them",
            "run the same command again; several processes need a common folder",
        )


def becomes_visible(path: Path, seconds: float) -> bool:
    """Whether the file exists, or appears in that time: network disks show files of others with a delay."""
    end = time.monotonic() + seconds
    while not (there := path.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    return there


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Remove temporary files of killed calls; with `overwrite`, the images of an earlier call."""
    remove_leftovers(folder)
    if overwrite:
        for path in [*folder.glob("[0-9][0-9][0-9][0-9]*.png"), folder / PAIRS]:
            path.unlink(missing_ok=True)


def make_images(
    pipeline: LatentDiffusionPipeline,
    images: Sequence[PlannedImage],
    config: GenerateConfig,
    parameters: Mapping[str, Any],
    init: InitImage | None,
    show: bool,
) -> None:
    """Generate and save, batch by batch, under a progress bar."""
    quiet = not show or not images
    with Progress("generate", len(images), shown=not quiet) as bar:

        def progress(_: Any, index: int, *__: Any) -> None:
            bar.advance(0, f"step {index + 1} of {config.steps}")

        for first in range(0, len(images), config.batch):
            batch = images[first : first + config.batch]
            made = draw_images(pipeline, batch, config, parameters, init, callback_on_step_end=progress)
            seconds = 0 if first or show else VISIBLE_SECONDS
            if not becomes_visible(batch[0].path.parent / provenance.RUN_RECORD, seconds):
                raise vanished()
            for planned, image in zip(batch, made):
                save_png(image, planned, parameters)
            bar.advance(len(batch), "")


def draw_images(
    pipeline: LatentDiffusionPipeline,
    batch: Sequence[PlannedImage],
    config: GenerateConfig,
    parameters: Mapping[str, Any],
    init: InitImage | None,
    **options: Any,
) -> list[Image.Image]:
    """One call of the pipeline. `options`: further or other arguments of the call."""
    shape = pipeline.latent_shape(parameters["height"], parameters["width"])
    settings: dict[str, Any] = {
        "labels": [image.classes for image in batch if image.classes] or None,
        "num_images": len(batch),
        "latents": torch.stack([image.noise.draw(shape) for image in batch]),
        "num_inference_steps": config.steps,
        "guidance_scale": parameters["guidance"],
        "guidance_interval": config.guidance_interval,
        "guidance_rescale": config.guidance_rescale,
        "autoguidance_scale": config.autoguidance,
        "sampler": config.sampler,
        "strength": parameters["strength"],
        "return_dict": False,
        "image": init,
    }
    (made,) = pipeline(**settings | options)
    return made


TIMED_STEPS = 2


def seconds_an_image(
    pipeline: LatentDiffusionPipeline,
    images: Sequence[PlannedImage],
    config: GenerateConfig,
    parameters: Mapping[str, Any],
    init: InitImage | None,
) -> float:
    """Seconds per image, from a batch of few steps whose decoding is counted once."""
    batch, spent = images[: config.batch], []
    for steps in (1, 1 + TIMED_STEPS):
        started = time.monotonic()
        whole = {"strength": 1.0} if config.init else {}
        draw_images(pipeline, batch, config, parameters, init, num_inference_steps=steps, **whole)
        spent.append(time.monotonic() - started)
    once, step = spent[0], max(0.0, spent[1] - spent[0]) / TIMED_STEPS
    strength = parameters["strength"] if config.init else 1.0
    return (once + step * max(0.0, config.steps * strength - 1)) / len(batch)


def save_png(image: Image.Image, planned: PlannedImage, parameters: Mapping[str, Any]) -> None:
    """Write atomically, with all parameters to make the image again as JSON in the text chunk `parameters`."""
    info = PngInfo()
    own = {key: value for key, value in parameters.items() if key not in ("labels", "count")}
    own |= {"index": planned.index, "label": planned.caption, "noise": asdict(planned.noise)}
    info.add_itxt(PNG_KEY, canonical_json(own | {"classes": planned.classes}))
    info.add_text("Software", f"ldm_vae {__version__}")
    write_atomically(planned.path, lambda path: image.save(path, format="PNG", pnginfo=info))


def write_sheets(
    folder: Path, shown: Sequence[PlannedImage], pipeline: LatentDiffusionPipeline, training: LatentDataset | None
) -> Copies | None:
    """Write the contact sheet and, with the latents of the training, the nearest of them to each image."""
    images, captions = [Image.open(one.path) for one in shown], [one.caption for one in shown if one.caption]
    write_png(folder / SHEET, labeled_sheet(images, captions))
    if training is None:
        return None
    pairs, copies = compare_with_training(pipeline, images, captions, training, COMPARED_LATENTS)
    write_png(folder / PAIRS, pairs)
    return copies
