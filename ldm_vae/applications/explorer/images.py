"""Which images an autoencoder is explored with, and `explorer.safetensors`, the images that travel with one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.data import open_source
from ldm_vae.data.folder import LABEL_COLUMNS
from ldm_vae.data.hf_datasets import local_files
from ldm_vae.data.samples import Rejected, evenly_spaced, iterate_crops
from ldm_vae.data.sources import DataConfig, DatasetsConfig, ImageSource
from ldm_vae.data.split import subset
from ldm_vae.data.synthetic.source import SyntheticConfig
from ldm_vae.errors import UserError
from ldm_vae.files import (
    MANIFEST,
    canonical_json,
    check_checksums,
    checksum_bytes,
    parsing,
    published_directory,
    read_described_file,
    write_checksums,
)
from ldm_vae.redaction import redacted
from ldm_vae.utils.text import pluralize, progress

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic"
PARQUET = ".parquet"


@dataclass(frozen=True)
class ModelPlace:
    """Where an autoencoder's own images may be: beside its config.json (`model`), or named by its training (`run`)."""

    model: Path | None
    run: Path | None


@dataclass(frozen=True)
class Chosen:
    """An image collection. `side`: in pixels, where it has one of its own; `origin`: what it is, in words."""

    source: ImageSource
    origin: str
    side: int | None = None


@dataclass(frozen=True, eq=False)
class ImageSet:
    """n images in memory, see `Explored`."""

    pixels: Tensor
    labels: Tensor
    label_names: tuple[str, ...]
    ids: tuple[str, ...]
    origin: str
    rejected: tuple[tuple[str, str], ...]


class BundledSource:
    """The images of a `Bundled` as a source."""

    def __init__(self, bundled: Bundled) -> None:
        self.bundled, self.label_names = bundled, tuple(bundled.label_names)

    def __len__(self) -> int:
        return len(self.bundled.images)

    def id(self, i: int) -> str:
        return f"bundled/{i:06d}"

    def label(self, i: int) -> int:
        return int(self.bundled.labels[i])

    def read(self, i: int) -> np.ndarray:
        image = self.bundled.images[i]
        return (image[None].expand(3, -1, -1) if image.ndim == 2 else image).permute(1, 2, 0).numpy()

    def fingerprint(self) -> str:
        return checksum_bytes(self.bundled.images.numpy().tobytes())


def choose_images(data: str | None, places: Sequence[ModelPlace], count: int, size: int) -> Chosen:
    """The given images; else what travels with the first autoencoder that brings some; else what the first was trained
    on, the held-out part where that has enough; else the synthetic set.

    Args:
        data: a folder, a parquet file, `synthetic`, or None.
        count, size: images that will be read and their side in pixels, for what is made to measure.

    Raises:
        UserError: the given images are not there, or there are none.
    """
    if data is not None:
        return _open_given(data, count, size)
    for place in places:
        bundled = None if place.model is None else read_bundled(place.model)
        if bundled is not None:
            side = int(bundled.images.shape[-1])
            return Chosen(BundledSource(bundled), bundled.origin, side)
    run = places[0].run
    found = None if run is None else _trained_on(run, count, size)
    return found or _synthetic(count, size)


def read_image_set(chosen: Chosen, count: int, side: int) -> ImageSet:
    """`count` images, evenly spread, scaled and cropped to squares of `side` pixels, without unreadable ones."""
    source, rejected = chosen.source, Rejected()
    indices = evenly_spaced(len(source), count)
    images = torch.empty((len(indices), 3, side, side), dtype=torch.uint8)
    kept: list[int] = []
    shown = progress(indices, "reading")
    for crop in iterate_crops(source, shown, side, rejected):
        images[len(kept)] = torch.from_numpy(crop.pixels).permute(2, 0, 1)
        kept.append(crop.index)
    if rejected:
        name, reason = rejected[0]
        left_out = pluralize(len(rejected), "image")
        logger.warning("data: left out: %s that cannot be read, as %s (%s)", left_out, name, reason)
    return ImageSet(
        images[: len(kept)],
        torch.tensor([source.label(index) for index in kept], dtype=torch.int64),
        tuple(source.label_names),
        tuple(source.id(index) for index in kept),
        chosen.origin,
        tuple(rejected),
    )


def _open_given(data: str, count: int, size: int) -> Chosen:
    if data == SYNTHETIC:
        return _synthetic(count, size)
    path = Path(data)
    if path.suffix.lower() == PARQUET:
        return Chosen(open_source(DataConfig(source="datasets", datasets=_parquet(path))), data)
    if not path.is_dir():
        raise UserError(f"data: {data} is neither a folder nor a .parquet file; give one of them, or synthetic")
    return Chosen(open_source(DataConfig(source="folder", path=data)), data)


def _parquet(path: Path) -> DatasetsConfig:
    """The columns `image` and, where there is one, `label` or `class`. Raises: UserError for another file."""
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"data: {path} is not a parquet file ({type(error).__name__}); give another") from error
    label = next((name for name in LABEL_COLUMNS if name in columns), None)
    return DatasetsConfig(name=str(path), label_column=label)


def _synthetic(count: int, size: int) -> Chosen:
    source = open_source(DataConfig(synthetic=SyntheticConfig(count=count, resolution=max(32, size))))
    return Chosen(source, "the synthetic set")


def _trained_on(run: Path, count: int, size: int) -> Chosen | None:
    """The images of a run's config.yaml; None, and a warning, where they are no longer on this machine."""
    try:
        data = configuration.load(TrainVaeConfig, run / "config.yaml").data
        if data.source == "datasets" and (data.streaming or not local_files(data.datasets.name)):
            raise UserError(f"data: {data.datasets.name} is not on this machine")
        if data.source == SYNTHETIC:
            data = replace(data, synthetic=replace(data.synthetic, resolution=max(32, size)))
        source = open_source(replace(data, cache_megabytes=0))
    except UserError as error:
        logger.warning("%s/config.yaml: its images cannot be opened, so the synthetic set is shown (%s)", run, error)
        return None
    name = {"folder": data.path, "datasets": data.datasets.name, SYNTHETIC: "the synthetic set"}[data.source]
    if data.held_out:
        try:
            held_out = subset(source, "held_out", data.held_out)
        except UserError:
            return Chosen(source, f"training images of {run}: {name}")
        if len(held_out) >= count:
            return Chosen(held_out, f"held-out images of {run}: {name}")
    return Chosen(source, f"images of {run}, most of them trained on: {name}")


# `explorer.safetensors`: a few images that travel with an autoencoder, so that it can be looked at on any machine.

FILE = "explorer.safetensors"
METADATA = "explorer"
FORMAT_VERSION = 1
MOST_BYTES = 64 << 20
MOST_IMAGES, MOST_LABELS = 20_000, 1000
SMALLEST_SIDE, LARGEST_SIDE = 4, 1024


@dataclass(frozen=True, eq=False)
class Bundled:
    """Images as in the file; `origin` says in words where they come from. Raises: ValueError for what cannot be."""

    images: Tensor
    labels: Tensor
    label_names: tuple[str, ...]
    origin: str

    def __post_init__(self) -> None:
        shape, names = tuple(self.images.shape), self.label_names
        if self.images.dtype != torch.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[1] != 3):
            raise ValueError(f"images of {self.images.dtype} and shape {shape}")
        if not 1 <= shape[0] <= MOST_IMAGES or not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in shape[-2:]):
            raise ValueError(f"images of shape {shape}")
        if self.labels.dtype != torch.int64 or tuple(self.labels.shape) != shape[:1]:
            raise ValueError(
                f"labels of {self.labels.dtype} and shape {tuple(self.labels.shape)} for {shape[0]} images"
            )
        if len(names) > MOST_LABELS or not all(isinstance(name, str) for name in (*names, self.origin)):
            raise ValueError(f"{len(names)} label names that are not all words")
        if not -1 <= int(self.labels.min()) <= int(self.labels.max()) < len(names):
            raise ValueError(f"labels from {int(self.labels.min())} to {int(self.labels.max())} for {len(names)} names")


def write_bundled(folder: Path, bundled: Bundled) -> None:
    """Put the images into the directory of an autoencoder, and its checksums: complete or not at all.

    Raises:
        UserError: no autoencoder is there, or a damaged one; or the images need more than 32 MiB.
    """
    from safetensors.torch import save_file

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json, so it is not an autoencoder; give the directory of one")
    if bundled.images.nbytes > MOST_BYTES // 2:
        raise UserError(
            f"{folder}/{FILE}: {bundled.images.nbytes} bytes of images are too many; bring fewer or smaller"
        )
    check_checksums(folder)
    record = {"format_version": FORMAT_VERSION, "label_names": bundled.label_names, "origin": redacted(bundled.origin)}
    tensors = {"images": bundled.images.contiguous(), "labels": bundled.labels.contiguous()}
    with published_directory(folder) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        save_file(tensors, temporary / FILE, {METADATA: canonical_json(record)})
        if (folder / MANIFEST).exists():
            write_checksums(temporary)


def read_bundled(folder: Path) -> Bundled | None:
    """The images in the directory of an autoencoder; None where there are none.

    Raises:
        UserError: the file is damaged, larger than any that this package writes, or of a newer format.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    with parsing(path, "restore it from a copy, or remove it and name images with data"):
        record, tensors = read_described_file(path, METADATA, FORMAT_VERSION, MOST_BYTES)
        return Bundled(tensors["images"], tensors["labels"], tuple(record["label_names"]), record["origin"])
