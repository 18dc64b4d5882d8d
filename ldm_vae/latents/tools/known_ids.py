"""The ids that a set has already, and whether they stand for the same images: two folders may both hold `000.png`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae.errors import UserError
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.encode import Job, encode_batch
from ldm_vae.latents.images import Addressable, Group, decode_group
from ldm_vae.latents.manifest import Manifest
from ldm_vae.latents.output import READERS
from ldm_vae.latents.sidecar import read_sidecar
from ldm_vae.latents.statistics import combine
from ldm_vae.storage import Folder

COMPARED_IMAGES = 8
"""Of those whose ids are known; each costs an image and, behind a URL, the download of a shard."""

COMPARED_ROWS, LAST_ROWS = 16, 4
"""Where ids are row numbers: evenly spread ones, and the last ones, which move with any row before them."""

OTHER_IMAGE = 0.2
"""Distance between latents, in units of their spread over the set, from which on they are of two images (two pictures
taken at random have about 1.4; the same one 0.01, on another device); for codes the share that differs. The noise of
stored samples counts as spread, so that of very noisy ones other images pass."""


class KnownIds:
    """The ids of shards, of samples and of images left out alike.

    Held as sorted 64-bit hashes with the shard of each: 12 bytes an id. A new image is taken for a known one by chance
    with a probability of (new ids) (known ids) / 2^64: 5e-6 for a million new ones in a set of 100 million.
    """

    def __init__(self, folder: Folder, numbers: Sequence[int]) -> None:
        """Raises: UserError when a sidecar is missing or damaged."""
        with ThreadPoolExecutor(READERS) as pool:
            parts = list(pool.map(partial(_hashes_of, folder), numbers))
        found, left_out = [part[0] for part in parts], [part[1] for part in parts]
        hashes = np.concatenate([np.empty(0, np.uint64), *found])
        self._left_out = np.concatenate([np.empty(0, np.uint64), *left_out])
        shards = np.repeat(np.array(numbers, np.int32), [len(part) for part in found])
        order = hashes.argsort()
        self.hashes, self.shards = hashes[order], shards[order]

    def find(self, ids: Iterable[str]) -> np.ndarray:
        """Of each id the number of its shard; -1 where it is in none. int32."""
        hashes = _hashes(ids)
        places = self.hashes.searchsorted(hashes).clip(max=len(self.hashes) - 1)
        return np.where(self.hashes[places] == hashes, self.shards[places], np.int32(-1))

    def left_out(self, ids: Iterable[str]) -> int:
        """How many of these are of images that were left out."""
        return int(np.isin(_hashes(ids), self._left_out).sum()) if len(self._left_out) else 0


def _hashes_of(folder: Folder, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Of all ids of a shard, and of those of images that were left out."""
    sidecar = read_sidecar(folder, number)
    left_out = _hashes(rejection.id for rejection in sidecar.rejected)
    return np.concatenate([_hashes(sample.id for sample in sidecar.samples), left_out]), left_out


def _hashes(ids: Iterable[str]) -> np.ndarray:
    """xxh3_64 of each, uint64."""
    import xxhash

    return np.fromiter((xxhash.xxh3_64_intdigest(id.encode()) for id in ids), np.uint64)


def refuse_other_images(
    job: Job, images: Addressable, manifest: Manifest, keys: np.ndarray, shards: np.ndarray, id_prefix: str
) -> None:
    """Encode a few of the images with known ids, and compare: another source may use the same ids (`000.png`).

    Raises: UserError when most of them are other images than those in the set; where ids are row numbers, when any is.
    """
    where, rows = str(manifest.where.location), job.origin.dataset["source"] == "datasets"
    compared, others, relabelled = _compare(job, images, manifest, keys, shards, id_prefix)
    if others and rows:
        raise UserError(
            f"{where}: {others[0]} is another image now ({len(others)} of {compared} compared differ), and ids are row "
            "numbers here: rows have moved, as when new files sort before old ones, or it is another dataset; append "
            "the new files alone (not the whole source) with id_prefix=NAME/"
        )
    if 2 * len(others) > compared:
        raise UserError(
            f"{where}: holds another image as {others[0]} ({len(others)} of {compared} compared differ); tell the ids "
            "of another source apart, as id_prefix=NAME/, or encode images that were changed to another output"
        )
    for id in others:
        print(f"{where}: {id} has changed since it was encoded; its latent stays as it is")
    if relabelled:
        print(
            f"{where}: {len(relabelled)} of {compared} compared images have another label now, as {relabelled[0]}; the "
            "labels in the set stay as they are"
        )


def _compare(
    job: Job, images: Addressable, manifest: Manifest, keys: np.ndarray, shards: np.ndarray, id_prefix: str
) -> tuple[int, list[str], list[str]]:
    """(how many images were compared, ids of those that are others now, those with another label now and which)."""
    known = _spread_out(job, images, manifest, keys, shards, id_prefix)
    mean = "mean" if manifest.content == "moments" else None
    location = str(manifest.where.location)
    dataset = LatentDataset(location, posterior=mean, flip=False, verify=False)  # type: ignore[arg-type]
    spread, compared, others, relabelled = _spread(manifest), 0, [], []
    for start in range(0, len(known), job.config.batch):
        part = known[start : start + job.config.batch]
        items = images.items(image.key for image in part)
        group = Group(0, [(image.index, item) for image, item in zip(part, items)], last=True)
        decoded = decode_group(group, job.config.batch, job.size)
        made = encode_batch(job, decoded)[manifest.content].cpu()
        samples = {image.index: image.sample for image in part}
        compared += len(decoded.rows)
        for row, index, label, id in zip(decoded.rows, decoded.indices, decoded.labels, decoded.ids):
            stored = dataset[samples[index]]
            if _distance(made[row], stored, spread) > OTHER_IMAGE:
                others.append(id_prefix + id)
            before, now = _name(manifest.label_names, stored["label"]), _name(images.label_names, label)
            if manifest.label_names and images.label_names and before != now:
                relabelled.append(f"{id_prefix}{id} ({now or 'none'} and not {before or 'none'})")
    return compared, others, relabelled


def _name(names: Sequence[str], label: int) -> str:
    """Of a class; empty for none."""
    return names[label] if 0 <= label < len(names) else ""


@dataclass(frozen=True)
class _Known:
    """An image whose id is in the set: its key in the source, and of the sample its source index and number."""

    key: int
    index: int
    sample: int


def _spread_out(
    job: Job, images: Addressable, manifest: Manifest, keys: np.ndarray, shards: np.ndarray, id_prefix: str
) -> list[_Known]:
    """A few of the images at `keys`, whose ids are in `shards`; those that were left out then are passed over."""
    found: list[_Known] = []
    starts = manifest.shard_index.counts.cumsum() - manifest.shard_index.counts
    rows = job.origin.dataset["source"] == "datasets"
    places = np.linspace(0, len(keys) - 1, min(COMPARED_ROWS if rows else COMPARED_IMAGES, len(keys))).astype(int)
    if rows:
        places = np.union1d(places, np.arange(max(0, len(keys) - LAST_ROWS), len(keys)))
    for key, number in zip(keys[places].tolist(), shards[places].tolist()):
        id = id_prefix + images.id(key)
        for row, sample in enumerate(read_sidecar(manifest.where, number).samples):
            if sample.id == id:
                found.append(_Known(key, sample.index, int(starts[number]) + row))
    return found


def _spread(manifest: Manifest) -> float:
    """The root of the summed variances of the channels of a set's latents, posterior noise left out; 1 for codes."""
    if manifest.content == "indices":
        return 1.0
    sums = manifest.shard_index.sums.copy()
    sums[:, 2] = 0
    latents = manifest.count * len(manifest.layout.names)
    height, width = manifest.latent_shape[1:]
    return float(np.linalg.norm(combine(sums, latents, latents * height * width)["std"]))


def _distance(made: Tensor, stored: dict[str, Any], spread: float) -> float:
    """Of what is made of an image now from what is stored; see `OTHER_IMAGE`."""
    if "indices" in stored:
        return float((made != stored["indices"]).float().mean())
    latent = stored["latent"]
    difference = made[: len(latent)].float() - latent
    return float(difference.square().sum(0).mean().sqrt()) / max(spread, torch.finfo(torch.float32).tiny)
