"""Images or latents as directions see them: one pooled latent each, and their attributes.

Owns reading, encoding and averaging over positions; what the attributes mean is `known`'s and `measured`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae.applications.directions import known, measured
from ldm_vae.applications.directions.known import Attribute
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.interface import decode, encode_moments
from ldm_vae.autoencoder.quantized import AutoencoderQuantized
from ldm_vae.data.sources import DataConfig, ImageSource, open_source
from ldm_vae.data.split import Part, part_of, subset
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation.fidelity.measurement import read_crops, spread
from ldm_vae.evaluation.result_folder import check_resolution
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.tools.place import open_set_folder
from ldm_vae.latents.tools.samples import read_labels
from ldm_vae.latents.tools.samples import spread as spread_over_shards
from ldm_vae.latents.words import counted

PIXELS, LABELS, SCENE = "pixels", "labels", "scene"
"""Where attributes come from, besides tables."""
LEAST_SAMPLES = 20


@dataclass(frozen=True)
class Samples:
    """n images.

    Attributes:
        pooled: (n, c) float64, the mean of each latent over its positions.
        attributes: with n values each.
        record: what they were, JSON-able: fingerprint, count, preprocessing.
    """

    ids: list[str]
    pooled: np.ndarray
    attributes: list[Attribute]
    record: dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """Which images, and which of their attributes.

    Attributes:
        attributes_from: `pixels`, `labels`, `scene`, or the path of a table, any number of them.
        circles: columns of tables that are in turns.
        latents: a set of latents instead of `data`.
    """

    data: DataConfig
    part: Part
    resolution: int
    count: int | None
    attributes_from: Sequence[str]
    circles: Sequence[str] = field(default_factory=tuple)
    latents: str | None = None


def check_continuous(autoencoder: Any, where: str) -> None:
    """Raises: UserError for an autoencoder that rounds latents, which swallows small edits."""
    if isinstance(autoencoder, AutoencoderQuantized):
        raise UserError(
            f"{where}: rounds its latents to codes, so that a small edit is lost and a larger one jumps; use one of "
            "kind kl or ae"
        )


def gather(wanted: Wanted, autoencoder: Any) -> Samples:
    """Read, encode and average; one image at a time.

    Raises:
        UserError: too few images, latents that are not finite, one class only, or attributes that are not there.
    """
    if wanted.latents is not None:
        return _from_latents(wanted, autoencoder)
    source, indices = select(wanted.data, wanted.part, wanted.count)
    check_resolution(wanted.resolution, autoencoder)
    rejected: list[tuple[str, str]] = []
    found, pooled, colours = [], [], []
    for index in _shown(indices):
        read, image = read_crops(source, [index], wanted.resolution, rejected)
        if image is None:
            continue
        found += read
        image = image.to(autoencoder.device)
        mean, _ = encode_moments(autoencoder, image)
        pooled.append(pool(mean, source.id(index)))
        colours.append(measured.measure(image))
    ids = [source.id(index) for index in found]
    _check_count(ids, f"{len(rejected)} of {len(indices)} images could not be read" if rejected else "data")
    labels = np.array([source.label(index) for index in found], np.int64)
    attributes: list[Attribute] = []
    for origin in wanted.attributes_from:
        if origin == SCENE:
            attributes += known.of_scenes(known.scene_source(source), found)
        elif origin == LABELS:
            attributes += known.of_classes(labels, source.label_names, "labels")
        elif origin == PIXELS:
            attributes += _measured(colours)
        else:
            attributes += known.of_table(origin, ids, wanted.circles)
    record = {
        "fingerprint": subset(source, wanted.part, wanted.data.held_out).fingerprint(),
        "part": wanted.part,
        "count": len(ids),
        "preprocessing": preprocessing_record(wanted.resolution),
        "rejected": [{"id": name, "reason": reason} for name, reason in rejected],
    }
    return Samples(ids, np.concatenate(pooled), distinct(attributes), record)


def _from_latents(wanted: Wanted, autoencoder: Any) -> Samples:
    """Posterior means of a set; what pixels tell is measured on the decoded images."""
    open_set_folder(str(wanted.latents))
    dataset = LatentDataset(str(wanted.latents))
    manifest = dataset.manifest
    manifest.normalizer  # noqa: B018 - codes have none
    if manifest.content == "moments":
        dataset = LatentDataset(str(wanted.latents), posterior="mean", flip=False)
    else:
        dataset = LatentDataset(str(wanted.latents), flip=False)
    manifest.check_autoencoder(encoder_fingerprint(autoencoder), "autoencoder")
    numbers = spread_over_shards(manifest.shard_index.counts, wanted.count or manifest.count)
    ids = [dataset.id(number) for number in numbers]
    _check_count(ids, str(wanted.latents))
    pooled, colours = [], []
    for number, id in zip(_shown(numbers), ids):
        latent = dataset[number]["latent"][None]
        pooled.append(pool(latent, id))
        if PIXELS in wanted.attributes_from:
            colours.append(measured.measure(decode(autoencoder, latent.to(autoencoder.device))))
    attributes: list[Attribute] = []
    for origin in wanted.attributes_from:
        if origin == SCENE:
            raise UserError("attributes_from: scene needs the images; give data.source=synthetic and no latents")
        if origin == LABELS:
            attributes += known.of_classes(read_labels(manifest)[numbers], manifest.label_names, str(wanted.latents))
        elif origin == PIXELS:
            attributes += _measured(colours)
        else:
            attributes += known.of_table(origin, ids, wanted.circles)
    record = {
        "fingerprint": [segment["fingerprint"] for segment in manifest.datasets],
        "part": "latents",
        "count": len(ids),
        "preprocessing": manifest.preprocessing,
        "rejected": [],
    }
    return Samples(ids, np.concatenate(pooled), distinct(attributes), record)


def select(data: DataConfig, part: Part, count: int | None) -> tuple[ImageSource, list[int]]:
    """A source, and `count` indices of its part, evenly spread. Raises: UserError for an empty part."""
    source = open_source(data)
    subset(source, part, data.held_out)  # refuses an empty one
    indices = [i for i in range(len(source)) if part == "all" or part_of(source.id(i), data.held_out) == part]
    return source, [indices[i] for i in spread(len(indices), count)]


def pool(latent: Tensor, id: str) -> np.ndarray:
    """(1, c, h, w) -> the mean over positions (1, c), float64. Raises: UserError when it is not finite."""
    mean = latent.double().mean(dim=(2, 3)).cpu().numpy()
    if not np.isfinite(mean).all():
        raise UserError(
            f"{id}: its latent has values that are not finite; check the autoencoder with `ldm-vae diagnose`"
        )
    return mean


def distinct(attributes: list[Attribute]) -> list[Attribute]:
    """Raises: UserError when two have one name, or there is none."""
    names = [attribute.name for attribute in attributes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"attributes_from: {name!r} comes from two places; rename a column, or leave one out")
    return attributes


def _measured(found: list[dict[str, Tensor]]) -> list[Attribute]:
    return [
        Attribute(name, torch.cat([one[name] for one in found]).double().cpu().numpy(), False)
        for name in measured.MEASURED
    ]


def _check_count(ids: list[str], where: str) -> None:
    if len(ids) < LEAST_SAMPLES:
        raise UserError(
            f"{where}: {counted(len(ids), 'image')} left, {LEAST_SAMPLES} are the least for a direction; give more"
        )


def _shown(indices: Sequence[int]) -> Iterator[int]:
    from tqdm import tqdm

    yield from tqdm(indices, desc="encoding", unit="image", dynamic_ncols=True, leave=False)
