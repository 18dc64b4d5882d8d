"""The synthetic set's settings and image source: ids, balanced labels, pixels, attributes, defect masks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm_vae.config import check_positive, digest
from ldm_vae.data.synthetic import figures
from ldm_vae.data.synthetic.figures import PLACING_RESOLUTION, add_defect
from ldm_vae.data.synthetic.render import DEFECTS, LABELS, Canvas, Scene, draw_scene, label_of
from ldm_vae.errors import UserError
from ldm_vae.files import publish_directory, temporary_directory, write_text
from ldm_vae.random import numpy_rng
from ldm_vae.utils.progress import begin, beside, end, end_dry_run, track
from ldm_vae.utils.text import duration_text, pluralize

RENDERER_VERSION = 1
"""Incremented whenever the same settings give different pixels; part of the fingerprint."""

PAINTERS = {
    "ball": figures.ball, "cube": figures.cube, "donut": figures.donut, "heart": figures.heart, "gem": figures.gem,
    "star": figures.star, "moon": figures.moon, "flower": figures.flower, "tree": figures.tree,
    "mushroom": figures.mushroom,
}  # fmt: skip


@dataclass(frozen=True)
class SyntheticConfig:
    """What to render.

    Attributes:
        count: Number of images.
        seed: Seed of the scenes.
        resolution: Side of the square images in pixels, 32 to 4096; the same scenes at every resolution.
        textured: Fraction of the objects drawn with a texture, 0 to 1 (some shapes stay plain).
        defects: Fraction of the images that have a defect, 0 to 1.
    """

    count: int = 2000
    seed: int = 0
    resolution: int = 512
    textured: float = 0.6
    defects: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"synthetic.count: {self.count} images; give 1 or more")
        if self.seed < 0:
            raise ValueError(f"synthetic.seed: {self.seed} is negative; give 0 or more")
        if not 32 <= self.resolution <= 4096:
            raise ValueError(f"synthetic.resolution: {self.resolution} pixels; give 32 to 4096")
        for name in ("textured", "defects"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"synthetic.{name}: {getattr(self, name)} is not a fraction; give 0 to 1")


class SyntheticSource:
    """Rendered images as an image source. Image i depends on (seed, i), never on `count` or other images."""

    label_names: tuple[str, ...] = LABELS
    labels_from = "the synthetic scenes"

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config

    def __len__(self) -> int:
        return self.config.count

    def id(self, i: int) -> str:
        return f"synthetic-{self._checked(i):06d}"

    def label(self, i: int) -> int:
        """Index into `label_names`; every ten consecutive images hold each label once."""
        return label_of(self.config.seed, self._checked(i))

    def read(self, i: int) -> np.ndarray:
        """uint8 (resolution, resolution, 3)."""
        return self.render(i)[0]

    def defect_mask(self, i: int) -> np.ndarray:
        """bool (resolution, resolution): outside it the image is bit-identical to the one with `defects=0`."""
        return self.render(i)[1]

    def render(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and defect mask, rendered once."""
        scene = self.scene(i)
        side = self.config.resolution
        canvas = paint_scene(scene, side, keep_background=DEFECTS[scene.defect] == "missing")
        if not scene.defect:
            return canvas.pixels(), np.zeros((side, side), bool)
        small = paint_scene(scene, PLACING_RESOLUTION)
        mask = add_defect(canvas, small, numpy_rng(self.config.seed, "synthetic-defect-form", i))
        return canvas.pixels(), mask

    def scene(self, i: int) -> Scene:
        return draw_scene(self.config.seed, self._checked(i), self.config.defects, self.config.textured)

    def attributes(self, i: int) -> dict[str, float]:
        """The ground truth of image i: the fields of `Scene` except the label, as numbers."""
        values = dataclasses.asdict(self.scene(i))
        del values["label"]
        return {name: float(value) for name, value in values.items()}

    def fingerprint(self) -> str:
        """sha256 hex of the settings and the renderer's version, which decide every pixel."""
        return digest({"renderer": RENDERER_VERSION, **dataclasses.asdict(self.config)})

    def _checked(self, i: int) -> int:
        if not 0 <= i < self.config.count:
            raise IndexError(f"synthetic image {i}: is outside the set; give 0 to {self.config.count - 1}")
        return i


def paint_scene(scene: Scene, resolution: int, keep_background: bool = False) -> Canvas:
    """The canvas of a scene, without its defect."""
    canvas = Canvas(scene, resolution, keep_background)
    PAINTERS[LABELS[scene.label]](canvas)
    return canvas


# The synthetic set as files: a folder of images that any tool can read, with its ground truth.


HELD_OUT_RESOLUTION = 256
"""The default resolution at which `train-vae` measures; smaller images would be enlarged."""


def masks_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}-masks")


def output_folders(config: SyntheticConfig, out: Path) -> list[Path]:
    """The folder of the images, and the folder of the masks if there are masks."""
    return [out, masks_folder(out)] if config.defects > 0 else [out]


def check_empty(folder: Path) -> None:
    """Raises: UserError if the folder is not empty, or is a file."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; give a new folder, or remove it first")


def write_images(config: SyntheticConfig, out: Path, workers: int = 1, progress: bool = True) -> None:
    """Render every image into a new folder. The image and mask folders appear complete or not at all.

    Raises:
        UserError: An output folder exists and is not empty.
    """
    out = Path(out).absolute()
    finals = output_folders(config, out)
    for folder in finals:
        check_empty(folder)
    with contextlib.ExitStack() as stack:
        temporaries = [temporary_directory(folder) for folder in finals]
        for folder in temporaries:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            for name in SyntheticSource.label_names:
                (folder / name).mkdir()
        write = partial(_write_one, config, temporaries[0], temporaries[1] if len(finals) > 1 else None)
        rows = track(
            _mapped(write, range(config.count), workers), "synth", total=config.count, shown=progress, leave=True
        )
        lines = [json.dumps(row) for row in rows]
        write_text(temporaries[0] / "attributes.jsonl", "\n".join(lines) + "\n")
        for temporary, final in reversed(list(zip(temporaries, finals))):
            publish_directory(temporary, final)


def _mapped(write: Any, indices: Iterable[int], workers: int) -> Iterator[dict[str, Any]]:
    """The rows in order, computed in this process or in `workers` others."""
    if workers <= 1:
        yield from map(write, indices)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(write, indices, chunksize=4)


def _write_one(config: SyntheticConfig, images: Path, masks: Path | None, index: int) -> dict[str, Any]:
    from PIL import Image

    source = SyntheticSource(config)
    pixels, mask = source.render(index)
    identity, label = source.id(index), source.label_names[source.label(index)]
    Image.fromarray(pixels).save(images / label / f"{identity}.png", compress_level=4)
    attributes = source.attributes(index)
    if masks is not None and attributes["defect"]:
        Image.fromarray(mask).save(masks / label / f"{identity}.png")
    return {"file": f"{label}/{identity}.png", "id": identity, "label": label, **attributes}


@dataclass(frozen=True)
class SynthConfig:
    """`ldm-vae synth`.

    Ten kinds of toy objects as labeled PNG files, with every attribute known. OUTPUT gets one folder per label and
    attributes.jsonl. With `defects`, OUTPUT-masks gets a black-and-white mask for each image with a defect. The same
    seed gives the same scenes at every resolution.

      ldm-vae synth toys count=1000 resolution=256
      ldm-vae synth parts count=400 defects=0.5

    Args:
        output: the folder to make; it must not exist.
        count: number of images.
        resolution: side of the images in pixels.
        seed: seed of the scenes.
        defects: fraction of the images with a defect, 0 to 1.
        workers: number of processes; null: one per core, up to 8.
    """

    output: str = "???"
    count: int = 2000
    resolution: int = 512
    seed: int = 0
    defects: float = 0.0
    workers: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "workers")


def synthesize(config: SynthConfig, *, dry_run: bool = False) -> int:
    """Write the set and print where it is. `dry_run`: render one image only. Returns: 0. Raises: UserError."""
    try:
        scenes = SyntheticConfig(
            count=config.count, seed=config.seed, resolution=config.resolution, defects=config.defects
        )
    except ValueError as error:
        raise UserError(str(error).replace("synthetic.", "")) from error
    output, workers = Path(config.output), config.workers or min(8, os.cpu_count() or 1)
    images = f"{pluralize(scenes.count, 'image')} of {pluralize(len(LABELS), 'class')}"
    defects = f"a share of {scenes.defects:g} with a defect" if scenes.defects > 0 else ""
    processes = pluralize(workers, "process")
    begin("synth", images, f"{scenes.resolution} pixels", defects, f"seed {scenes.seed}", processes, f"to {output}")
    if dry_run:
        for folder in output_folders(scenes, output):
            check_empty(folder)
        started = time.monotonic()
        SyntheticSource(scenes).render(0)
        seconds = (time.monotonic() - started) * scenes.count / workers
        end_dry_run(output, f"about {duration_text(seconds)}")
        return 0
    write_images(scenes, output, workers)
    masks = f", defect masks in {masks_folder(output)}" if scenes.defects > 0 else ""
    words = ["ldm-vae", "train-vae", f"data={output}", f"output={beside(output, 'vae')}"]
    if scenes.resolution < HELD_OUT_RESOLUTION:
        words.insert(3, f"held_out_resolution={scenes.resolution // 8 * 8}")
    end(output, f"{pluralize(scenes.count, 'image')} and attributes.jsonl{masks}", words)
    return 0
