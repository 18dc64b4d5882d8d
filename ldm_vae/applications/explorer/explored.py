"""One autoencoder opened for exploring: its images, what it makes of them, and both ways through it.

    ExploreConfig -> `open_models` -> Explored -> plane, stages, answers -> served (`server`) or exported (`export`)

The second part chooses which images there are, and holds the format of `explorer.safetensors`.
"""

from __future__ import annotations

import functools
import logging
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae.applications.directions.fitting import Directions, check_continuous, load_directions
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import load_autoencoder, model_directory
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.data import open_source, transforms
from ldm_vae.data.folder import LABEL_COLUMNS
from ldm_vae.data.hf_datasets import local_files
from ldm_vae.data.samples import Enlarged, Rejected, enlarged_sentences, evenly_spaced, iterate_crops
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
from ldm_vae.random import generator
from ldm_vae.redaction import redacted
from ldm_vae.runtime import compute_device
from ldm_vae.utils.progress import track
from ldm_vae.utils.text import pluralize

logger = logging.getLogger(__name__)

LEAST_IMAGES = 4
"""Fewer make no map."""
LARGEST_COUNT = 50_000
LARGEST_SIZE, DEFAULT_SIZE = 1024, 128
MAXIMUM_BYTES = 4_000_000_000
"""Largest size of all images and latents, which are kept in memory."""
BATCH_PIXELS = 2**16
"""Pixels of one pass: few, so that a hover never waits for a long pass."""

NETWORKS = threading.RLock()
"""Locked while any network computes: hooks and FLOP counters then see their own pass only."""


@dataclass(frozen=True)
class ExploreConfig:
    """`ldm-vae explore`: a local page, whose address is printed.

    Shows a map of the latents that decodes the point under the mouse, two autoencoders side by side, every stage of the
    network with its activations, sliders, and the training. Works offline; Ctrl-C ends it. `export` writes the map of a
    vector model as one file that can be mailed, instead.

      ldm-vae explore checkpoints/digits-vae-2d compare=checkpoints/digits-ae-2d
      ldm-vae explore checkpoints/digits-vae-2d compare=checkpoints/digits-ae-2d export=digits.html
      ldm-vae explore runs/mine data=~/images resolution=256 directions=runs/mine/directions

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        compare: another autoencoder to compare with, side by side on the same images.
        data: a folder of images, a parquet file, or `synthetic`; null: the images of the autoencoder's run.
        directions: a folder of `directions fit`, for its sliders.
        count: number of images on the map, evenly spaced over the data.
        size: side in pixels to which images are scaled and cropped, if the autoencoder supports several; null: that of
            the images stored with it, or 128.
        port: port of 127.0.0.1; 0: a free one.
        export: write one self-contained page to this file instead of serving.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str = "???"
    compare: str | None = None
    data: str | None = None
    directions: str | None = None
    count: int = 2000
    size: int | None = None
    port: int = 0
    export: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not LEAST_IMAGES <= self.count <= LARGEST_COUNT:
            raise UserError(f"count: {self.count} is not between {LEAST_IMAGES} and {LARGEST_COUNT}; try 2000")
        if self.size is not None and not 16 <= self.size <= LARGEST_SIZE:
            raise UserError(f"resolution: {self.size} is not between 16 and {LARGEST_SIZE} pixels; try {DEFAULT_SIZE}")


@dataclass(frozen=True, eq=False)
class Explored:
    """An autoencoder and n images that went through its encoder; safe to use from several threads.

    Attributes:
        name: of its folder, for people.
        path: as it was given.
        kind: kl, ae, vq, fsq or frozen.
        deterministic: whether latents are points; `logvar` then means nothing.
        images: uint8 (n, 3, h, w), what was encoded.
        labels: int64 (n,), indices into `label_names`; -1 for none.
        origin: where the images are from, in words.
        rejected: (id, reason) of images that could not be read and were left out.
        mean, logvar: of every image's posterior, (n, c, h/f, w/f), float32.
        parameters: of the autoencoder, their number.
        run_directory: of the training that made it; None where that is not there.
        directions: None where none were asked for, or they were fitted to another encoder.
        lock: of all networks, see `NETWORKS`.
    """

    name: str
    path: str
    autoencoder: Autoencoder
    kind: str
    deterministic: bool
    images: Tensor
    labels: Tensor
    label_names: tuple[str, ...]
    ids: tuple[str, ...]
    origin: str
    rejected: tuple[tuple[str, str], ...]
    mean: Tensor
    logvar: Tensor
    fingerprint: str
    parameters: int
    downsampling: int
    run_directory: Path | None
    directions: Directions | None
    lock: Any = NETWORKS

    @property
    def batch(self) -> int:
        """Images of one pass through the network."""
        return _batch(self.images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (m, c, h, w) -> images uint8 (m, 3, fh, fw)."""
        found = []
        for part in latents.split(self.batch):
            with self.lock:
                found.append(transforms.to_uint8(self.autoencoder.decode_images(part.to(self.autoencoder.device))))
        return torch.cat(found).cpu()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (m, 3, H, W) -> mean and log-variance, each (m, c, H/f, W/f), float32."""
        found = []
        for part in images.split(self.batch):
            with self.lock:
                found.append(_moments(self.autoencoder, part))
        mean, logvar = torch.cat(found, dim=1)
        return mean, logvar

    def latent(self, index: int, noise: float = 1.0, sample: bool = True, seed: int = 0) -> Tensor:
        """(1, c, h, w): the mean of image `index`, moved by `noise` times its standard deviation times a standard
        normal draw, which is the same for all images of one seed; the mean itself without `sample`."""
        mean = self.mean[index : index + 1]
        if not sample or self.deterministic or noise == 0:
            return mean
        draw = torch.randn(mean.shape, generator=generator(seed, "explorer noise"))
        return mean + noise * torch.exp(0.5 * self.logvar[index : index + 1]) * draw

    @functools.cached_property
    def channel_deviation(self) -> Tensor:
        """(c,): standard deviation of every channel of the means, over images and positions."""
        return self.mean.double().std(dim=(0, 2, 3), correction=0).float()


def open_models(config: ExploreConfig, check: Callable[[Any, str], None] | None = None) -> tuple[Explored, ...]:
    """One or two autoencoders on the same images in the same order; those of the first where they have their own.

    Args:
        check: takes each autoencoder and its path, and refuses it before any image is read.

    Raises:
        UserError: no autoencoder, two that know different image sizes, no images, too many of them for the memory, or
            directions of another encoder.
    """
    names = [one for one in (config.autoencoder, config.compare) if one is not None]
    device = compute_device(config.device)
    autoencoders = [load_autoencoder(name).to(device).eval() for name in names]
    if check is not None:
        for autoencoder, name in zip(autoencoders, names, strict=True):
            check(autoencoder, name)
    directions = None if config.directions is None else _read_directions(config.directions, autoencoders[0], names[0])
    fixed = _fixed_side(autoencoders, names)
    places = [ModelPlace(model_directory(Path(name)), run_directory(name)) for name in names]
    if fixed is not None and config.size not in (None, fixed):
        logger.warning("size: %d has no effect, an autoencoder here knows one size of images, %d", config.size, fixed)
    wanted = fixed or config.size
    chosen = choose_images(config.data, places, config.count, wanted or DEFAULT_SIZE)
    side = wanted or chosen.side or DEFAULT_SIZE
    _check_size(min(config.count, len(chosen.source)), side, autoencoders)
    images = read_image_set(chosen, config.count, side)
    if len(images.pixels) < LEAST_IMAGES:
        raise UserError(
            f"data: {pluralize(len(images.pixels), 'image')} of {images.origin} can be read, a map needs "
            f"{LEAST_IMAGES}; give other images as data=PATH"
        )
    return tuple(
        _encoded(autoencoder, name, images, directions) for autoencoder, name in zip(autoencoders, names, strict=True)
    )


def run_directory(path: str | Path) -> Path | None:
    """The folder of the training that wrote an autoencoder at `path`, itself or the one around it; None without."""
    for folder in (Path(path), Path(path).resolve().parent):
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            return folder
    return None


def _name_of(place: str) -> str:
    folder = Path(place).resolve()
    if not folder.exists():
        return place
    return folder.parent.name if folder.name == "autoencoder" else folder.name


def _read_directions(place: str, autoencoder: Autoencoder, where: str) -> Directions:
    check_continuous(autoencoder, where)
    found = load_directions(Path(place).parent if Path(place).is_file() else place)
    found.check_autoencoder(autoencoder, where)
    return found


def _fixed_side(autoencoders: Sequence[Autoencoder], names: Sequence[str]) -> int | None:
    """The one image size that an autoencoder knows; None for any. Raises: UserError when two know different ones."""
    sides = {side for one in autoencoders if (side := one.only_side) is not None}
    if len(sides) > 1:
        raise UserError(
            f"{names[1]}: knows images of another size than {names[0]} ({min(sides)} and {max(sides)} pixels), so that "
            "both cannot be shown the same; compare with another one"
        )
    return sides.pop() if sides else None


def _check_size(count: int, side: int, autoencoders: Sequence[Autoencoder]) -> None:
    """Raises: UserError before `count` images of a side are read that do not fit the autoencoders or the memory."""
    factor = math.lcm(*(one.downsampling for one in autoencoders))
    if side % factor:
        raise UserError(
            f"resolution: {side} is not a multiple of {factor}; use resolution={max(1, round(side / factor)) * factor}"
        )
    needed = count * 3 * side**2
    for one in autoencoders:
        needed += count * 8 * one.latent_channels * (side // one.downsampling) ** 2
    if needed > MAXIMUM_BYTES:
        raise UserError(
            f"count, size: {count} images of {side} x {side} pixels and their latents take {needed / 1e9:.1f} GB, more "
            f"than {MAXIMUM_BYTES / 1e9:g}; give a smaller count or resolution"
        )


def _batch(images: Tensor) -> int:
    return max(1, BATCH_PIXELS // (images.shape[-2] * images.shape[-1]))


def _moments(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Images uint8 (m, 3, H, W) -> mean and log-variance (2, m, c, H/f, W/f)."""
    scaled = transforms.from_uint8(images.to(autoencoder.device))
    return torch.stack(autoencoder.encode_moments(scaled)).cpu()


def _encoded(autoencoder: Autoencoder, path: str, images: ImageSet, directions: Directions | None) -> Explored:
    if directions is not None and autoencoder.encoder_fingerprint() != directions.encoder_fingerprint:
        directions = None
    name = _name_of(path)
    parts = images.pixels.split(_batch(images.pixels))
    shown = track(parts, f"encoding with {name}", "batch")
    mean, logvar = torch.cat([_moments(autoencoder, part) for part in shown], dim=1)
    if not bool(torch.isfinite(mean).all() & torch.isfinite(logvar).all()):
        raise UserError(f"{path}: makes latents that are not finite; see `ldm-vae diagnose {path}`")
    return Explored(
        name=name,
        path=path,
        autoencoder=autoencoder,
        kind=autoencoder.kind,
        deterministic=autoencoder.deterministic,
        images=images.pixels,
        labels=images.labels,
        label_names=images.label_names,
        ids=images.ids,
        origin=images.origin,
        rejected=images.rejected,
        mean=mean,
        logvar=logvar,
        fingerprint=autoencoder.fingerprint(),
        parameters=sum(parameter.numel() for parameter in autoencoder.parameters()),
        downsampling=autoencoder.downsampling,
        run_directory=run_directory(path),
        directions=directions,
    )


# Which images an autoencoder is explored with.

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
    source, rejected, enlarged = chosen.source, Rejected(), Enlarged()
    indices = evenly_spaced(len(source), count)
    images = torch.empty((len(indices), 3, side, side), dtype=torch.uint8)
    kept: list[int] = []
    shown = track(indices, "reading")
    for crop in iterate_crops(source, shown, side, rejected, enlarged):
        images[len(kept)] = torch.from_numpy(crop.pixels).permute(2, 0, 1)
        kept.append(crop.index)
    if rejected:
        name, reason = rejected[0]
        left_out = pluralize(len(rejected), "image")
        logger.warning("data: left out: %s that cannot be read, as %s (%s)", left_out, name, reason)
    for line in enlarged_sentences([short for _, short in enlarged], len(kept)):
        logger.warning("data: %s", line)
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

BUNDLED_FILE = "explorer.safetensors"
BUNDLED_METADATA = "explorer"
BUNDLED_FORMAT_VERSION = 1
LARGEST_BUNDLED_BYTES = 64 << 20
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
    if bundled.images.nbytes > LARGEST_BUNDLED_BYTES // 2:
        raise UserError(
            f"{folder}/{BUNDLED_FILE}: {bundled.images.nbytes} bytes of images are too many; bring fewer or smaller"
        )
    check_checksums(folder)
    record = {
        "format_version": BUNDLED_FORMAT_VERSION,
        "label_names": bundled.label_names,
        "origin": redacted(bundled.origin),
    }
    tensors = {"images": bundled.images.contiguous(), "labels": bundled.labels.contiguous()}
    with published_directory(folder) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        save_file(tensors, temporary / BUNDLED_FILE, {BUNDLED_METADATA: canonical_json(record)})
        if (folder / MANIFEST).exists():
            write_checksums(temporary)


def read_bundled(folder: Path) -> Bundled | None:
    """The images in the directory of an autoencoder; None where there are none.

    Raises:
        UserError: the file is damaged, larger than any that this package writes, or of a newer format.
    """
    path = folder / BUNDLED_FILE
    if not path.is_file():
        return None
    with parsing(path, "restore it from a copy, or remove it and name images with data"):
        record, tensors = read_described_file(path, BUNDLED_METADATA, BUNDLED_FORMAT_VERSION, LARGEST_BUNDLED_BYTES)
        return Bundled(tensors["images"], tensors["labels"], tuple(record["label_names"]), record["origin"])
