"""The interface of an image collection, and the settings that open one.

The collections are in the modules `folder`, `hf_datasets`, `streaming` (no random access) and `synthetic`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from ldm_vae import config as configuration
from ldm_vae.data.decoding import HIGHEST_MEGAPIXELS, DecodeLimits
from ldm_vae.data.synthetic.source import SyntheticConfig
from ldm_vae.errors import UserError

WHOLE_NUMBER = re.compile(r"-?\d{1,18}")
"""The longest label that is read as a number; longer ones are names."""


class ImageSource(Protocol):
    """A finite, ordered image collection with random access. Picklable, safe to use after a fork."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes; empty when the collection is unlabeled."""
        ...

    def __len__(self) -> int: ...

    def id(self, i: int) -> str:
        """A unique name of image `i`, the same in every run."""
        ...

    def label(self, i: int) -> int:
        """Class of image `i`, an index into `label_names`; -1 for none."""
        ...

    def read(self, i: int) -> np.ndarray:
        """Pixels of image `i`: uint8 (h, w, 3), sRGB. Raises: ImageRejected."""
        ...

    def fingerprint(self) -> str:
        """sha256 hex of ids, labels and sizes in bytes, but not of every pixel."""
        ...


@dataclass(frozen=True)
class DatasetsConfig:
    """A dataset that the `datasets` library loads.

    Args:
        name: a hub id, a folder written by `save_to_disk`, or parquet, arrow or webdataset (.tar) files;
            `*` is allowed.
        subset: configuration of the hub dataset, if it has several.
        split: the split, for example train, or train[:1000].
        image_column: the column that holds the images.
        label_column: the column that holds the classes; null: unlabeled.
        label_names: names of integer labels if the dataset does not have them (needed for streams only).
        streaming: read from start to end instead of downloading first.
        revision: commit, tag or branch of a hub dataset.
    """

    name: str = ""
    subset: str | None = None
    split: str = "train"
    image_column: str = "image"
    label_column: str | None = None
    label_names: list[str] = field(default_factory=list)
    streaming: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from.

    Args:
        source: `synthetic` (made on the fly), `folder` (a folder of image files) or `datasets`.
        path: the folder, for `folder`: a path or an fsspec URL such as s3://bucket/images.
        include: patterns of relative paths to use from the folder, for example `photos/*`; empty: all. Ids, and
            therefore the held-out part, do not change.
        held_out: fraction of the images kept out of training, chosen by a hash of their ids.
        maximum_megapixels: larger images are rejected before decoding.
        cache_megabytes: memory for decoded images *per worker process*; useful if decoding is the bottleneck.
    """

    source: Literal["synthetic", "folder", "datasets"] = "synthetic"
    path: str | None = None
    include: list[str] = field(default_factory=list)
    held_out: float = 0.1
    maximum_megapixels: int = 64
    cache_megabytes: int = 0
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    datasets: DatasetsConfig = field(default_factory=DatasetsConfig)

    def __post_init__(self) -> None:
        if self.source == "folder" and not self.path:
            raise UserError("data.path: missing; give the folder that holds the images, data.path=DIR")
        if self.source != "folder" and self.include:
            raise UserError(f"data.include: has no effect with data.source={self.source}; leave it out")
        if self.source != "folder" and self.path:
            cure = (
                f"give data={self.path}, or set data.source=folder"
                if self.source == "synthetic"
                else "use data.datasets.name instead"
            )
            raise UserError(f"data.path: {self.path} has no effect with data.source={self.source}; {cure}")
        if self.source == "datasets" and not self.datasets.name:
            raise UserError("data.datasets.name: missing; give a hub id, a saved folder or parquet files")
        if self.source != "datasets" and self.datasets.name:
            raise UserError(
                f"data.datasets.name: {self.datasets.name} has no effect with data.source={self.source}; "
                "set data.source=datasets to load it"
            )
        if not 0.0 <= self.held_out < 1.0:
            raise UserError(f"data.held_out: {self.held_out} is not in [0, 1); give a fraction below 1")
        if not 1 <= self.maximum_megapixels <= HIGHEST_MEGAPIXELS:
            raise UserError(
                f"data.maximum_megapixels: {self.maximum_megapixels} is out of range; give 1 to {HIGHEST_MEGAPIXELS}"
            )
        if self.cache_megabytes < 0:
            raise UserError(f"data.cache_megabytes: {self.cache_megabytes} is negative; give 0 for no cache")

    @staticmethod
    def short_form(text: str) -> dict[str, object]:
        """Expand data=TEXT: `synthetic`, `hf:NAME`, files that the `datasets` library reads, or a folder."""
        if text == "synthetic":
            return {"source": "synthetic", "path": None}
        if text.startswith("hf:") or text.endswith((".parquet", ".arrow", ".tar")):
            return {"source": "datasets", "path": None, "datasets": {"name": text.removeprefix("hf:")}}
        return {"source": "folder", "path": text, "datasets": {"name": ""}}

    def words(self) -> list[str]:
        """The settings that name these images on a command line: `data=PATH` and what differs from the defaults."""
        plain = dataclasses.replace(self, cache_megabytes=0)
        if self.source != "folder":
            return configuration.settings_words(plain, "data")
        short = DataConfig(source="folder", path=self.path)
        return [f"data={self.path}", *configuration.settings_words(plain, "data", short)]

    @property
    def streaming(self) -> bool:
        """True if `streaming.open_stream` has to be used instead of `open_source`."""
        return self.source == "datasets" and self.datasets.streaming

    @property
    def limits(self) -> DecodeLimits:
        return DecodeLimits(megapixels=self.maximum_megapixels)


def labels_from(source: Any) -> str:
    """Where the classes of a source were found, for example `the subfolders`; empty if the source does not say."""
    return getattr(source, "labels_from", "")


def number_labels(labels: Iterable[str]) -> dict[str, int]:
    """Label -> class number, in numeric order if all labels are whole numbers, otherwise alphabetical."""
    names = set(labels)
    numeric = all(WHOLE_NUMBER.fullmatch(name) for name in names)
    return {name: i for i, name in enumerate(sorted(names, key=(lambda n: (int(n), n)) if numeric else None))}


def hash_items(items: Iterable[tuple[object, ...]]) -> str:
    """sha256 hex over a sequence of tuples of plain values."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


# Decoded images kept in memory, so that many crops need only one decoding.


class CachedSource:
    """A source that keeps decoded images in memory, up to `limit_bytes`.

    Nothing is evicted. Training visits images in uniformly random order, so it does not matter which images are kept.
    Each worker process has its own cache.
    """

    def __init__(self, source: ImageSource, limit_bytes: int) -> None:
        self.source, self.free_bytes = source, limit_bytes
        self.label_names, self.labels_from = source.label_names, labels_from(source)
        self.images: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.source)

    def id(self, i: int) -> str:
        return self.source.id(i)

    def label(self, i: int) -> int:
        return self.source.label(i)

    def read(self, i: int) -> np.ndarray:
        if i in self.images:
            return self.images[i]
        image = self.source.read(i)
        if image.nbytes <= self.free_bytes:
            image.flags.writeable = False
            self.images[i] = image
            self.free_bytes -= image.nbytes
        return image

    def fingerprint(self) -> str:
        return self.source.fingerprint()
