"""Which images an autoencoder is explored with, and reading them: the same for both of two.

Owns the order of preference and leaving out what cannot be read; the files that travel with a checkpoint are
`bundled`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae.applications.explorer.bundled import Bundled, read_bundled
from ldm_vae.autoencoder.recipe import TrainVaeConfig
from ldm_vae.data.datasets_source import local_files
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.folder import LABEL_COLUMNS
from ldm_vae.data.sources import DataConfig, DatasetsConfig, ImageSource, open_source
from ldm_vae.data.split import subset
from ldm_vae.data.synthetic import SyntheticConfig
from ldm_vae.data.transforms import cover_crop
from ldm_vae.errors import UserError
from ldm_vae.evaluation.fidelity.measurement import spread
from ldm_vae.files import checksum_bytes
from ldm_vae.latents.words import counted

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic"
PARQUET = ".parquet"


@dataclass(frozen=True)
class Place:
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


def choose_images(data: str | None, places: Sequence[Place], count: int, size: int) -> Chosen:
    """What is asked for; else what travels with the first autoencoder that brings some; else what the first was trained
    on, the held-out part where that has enough; else the synthetic set.

    Args:
        data: a folder, a parquet file, `synthetic`, or None.
        count, size: images that will be read and their side in pixels, for what is made to measure.

    Raises:
        UserError: what is asked for is not there, or holds no images.
    """
    if data is not None:
        return _asked_for(data, count, size)
    for place in places:
        bundled = None if place.model is None else read_bundled(place.model)
        if bundled is not None:
            side = int(bundled.images.shape[-1])
            return Chosen(BundledSource(bundled), bundled.origin, side)
    run = places[0].run
    found = None if run is None else _trained_on(run, count, size)
    return found or _synthetic(count, size)


def read_images(chosen: Chosen, count: int, side: int) -> ImageSet:
    """`count` images, evenly spread, scaled and cropped to squares of `side` pixels, without unreadable ones."""
    from tqdm import tqdm

    source = chosen.source
    indices = spread(len(source), count)
    images = torch.empty((len(indices), 3, side, side), dtype=torch.uint8)
    kept: list[int] = []
    rejected: list[tuple[str, str]] = []
    for index in tqdm(indices, desc="reading", unit="image", dynamic_ncols=True, leave=False):
        try:
            picture = cover_crop(source.read(index), side)
        except ImageRejected as error:
            rejected.append((source.id(index), error.reason))
            continue
        images[len(kept)] = torch.from_numpy(picture).permute(2, 0, 1)
        kept.append(index)
    if rejected:
        name, reason = rejected[0]
        left_out = counted(len(rejected), "image")
        logger.warning("data: left out: %s that cannot be read, as %s (%s)", left_out, name, reason)
    return ImageSet(
        images[: len(kept)],
        torch.tensor([source.label(index) for index in kept], dtype=torch.int64),
        tuple(source.label_names),
        tuple(source.id(index) for index in kept),
        chosen.origin,
        tuple(rejected),
    )


def _asked_for(data: str, count: int, size: int) -> Chosen:
    if data == SYNTHETIC:
        return _synthetic(count, size)
    path = Path(data)
    if path.suffix.lower() == PARQUET:
        return Chosen(open_source(DataConfig(source="datasets", datasets=_parquet(path))), data)
    if not path.is_dir():
        raise UserError(f"data: {data} is neither a folder nor a .parquet file; give one of them, or synthetic")
    return Chosen(open_source(DataConfig(source="folder", path=data)), data)


def _parquet(path: Path) -> DatasetsConfig:
    """The columns `image` and, where there is one, `label` or `class`. Raises: UserError when it is no parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"data: {path} is no parquet file ({type(error).__name__}); give another") from error
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
        logger.warning("%s/config.yaml: its images are not to be had, so the synthetic set is shown (%s)", run, error)
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
