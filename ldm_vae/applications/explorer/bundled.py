"""`explorer.safetensors`: a few images that travel with an autoencoder, so that it can be looked at on any machine.

    images    uint8 (n, h, w) grey, or (n, 3, h, w)
    labels    int64 (n,), indices into `label_names`, -1 for none
    metadata  explorer = {"format_version": 1, "label_names": [...], "origin": "where the images come from"}

It lies beside the autoencoder's config.json. Owns the file only: which images are shown is the business of `images`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json, publish_directory, temporary_directory
from ldm_vae.privacy import redacted
from ldm_vae.seal import MANIFEST, check_seal, seal
from ldm_vae.tensor_files import check_tensor_file

FILE = "explorer.safetensors"
METADATA = "explorer"
FORMAT_VERSION = 1
MOST_BYTES = 64 << 20
MOST_IMAGES, MOST_LABELS = 20_000, 1000
SMALLEST_SIDE, LARGEST_SIDE = 4, 1024
ADVICE = "restore it from a copy, or remove it and name images with --data"


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
    """Put the images into the directory of an autoencoder, and under its seal where it has one: complete or not at all.

    Raises:
        UserError: no autoencoder is there, or a damaged one; or the images need more than 32 MiB.
    """
    from safetensors.torch import save_file

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json, so it is no autoencoder; give the directory of one")
    if bundled.images.nbytes > MOST_BYTES // 2:
        raise UserError(
            f"{folder}/{FILE}: {bundled.images.nbytes} bytes of images are too many; bring fewer or smaller"
        )
    check_seal(folder)
    record = {"format_version": FORMAT_VERSION, "label_names": bundled.label_names, "origin": redacted(bundled.origin)}
    tensors = {"images": bundled.images.contiguous(), "labels": bundled.labels.contiguous()}
    temporary = temporary_directory(folder)
    try:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        save_file(tensors, temporary / FILE, {METADATA: canonical_json(record)})
        if (folder / MANIFEST).exists():
            seal(temporary)
        publish_directory(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_bundled(folder: Path) -> Bundled | None:
    """The images in the directory of an autoencoder; None where there are none.

    Raises:
        UserError: the file is damaged, larger than any that this package writes, or of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        return None
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: is larger than {MOST_BYTES} bytes; {ADVICE}")
    check_tensor_file(path)
    try:
        with safe_open(path, "pt") as file:
            record: dict[str, Any] = dict(json.loads(file.metadata()[METADATA]))
            version = record["format_version"]
            if type(version) is int and version > FORMAT_VERSION:
                raise UserError(
                    f"{path}: has format version {version}, this program reads {FORMAT_VERSION}; update ldm_vae"
                )
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version!r}")
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
        return Bundled(images, labels, tuple(record["label_names"]), record["origin"])
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); {ADVICE}") from error
