"""Adding images to a finished set: images whose ids are not in it yet become a new segment with its own shards.

This module finds the new images and their place in the set; `encode` encodes them. Existing shards never change. The
records of the whole set change only when the new shards are complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae.config import to_dict
from ldm_vae.errors import UserError
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.encode import (
    EncodeConfig,
    EncodeResult,
    Job,
    begin_encoding,
    encode_batch,
    encode_segment,
    next_words,
    prepare,
    preview_encoding,
    run_job,
)
from ldm_vae.latents.format import (
    Manifest,
    Origin,
    Recipe,
    check_same,
    merge_label_names,
    plan_name,
    read_manifest,
    read_origin,
    read_plan,
    read_sidecar,
)
from ldm_vae.latents.image_loader import Addressable, Group, Item, Units, batches_of, decode_group
from ldm_vae.latents.normalizer import combine
from ldm_vae.latents.writer import READERS, Output
from ldm_vae.storage import open_folder
from ldm_vae.storage.base import Folder
from ldm_vae.training.distributed import run_on_main
from ldm_vae.utils.progress import end, end_dry_run, say
from ldm_vae.utils.text import pluralize

IDS_AT_ONCE = 1 << 16
SHOWN_CLASSES = 10


@dataclass(frozen=True)
class AppendConfig(EncodeConfig):
    """`ldm-vae latents append`: add the new images of a source that has grown, or the images of another source.

    Give the settings of the `ldm-vae encode` command that made the set, with the same autoencoder. An image is new if
    its id (path below the folder, row of the dataset) is not in the set. The new latents get their own shards.
    Existing shards do not change, and readers get the old set until the new one is complete. The same command
    continues an interrupted job, and reports when nothing is new. Rows of a dataset are identified by number: if new
    files do not sort after the old ones, append them alone, with id_prefix.

      ldm-vae latents append runs/mine data=~/images output=latents/mine
      ldm-vae latents append runs/mine data=~/more-images output=latents/mine id_prefix=more/
      torchrun --nproc_per_node 4 -m ldm_vae.cli latents append runs/mine output=latents/mine ...

    Args:
        id_prefix: text before the ids of these images, if another source uses ids that the set has already.
    """

    id_prefix: str = ""


@dataclass(frozen=True)
class NewSegment:
    """A segment to be made.

    Attributes:
        number: number of the segment; 1 or more.
        origin: its plan.
        keys: its images in the source, int64, increasing; see `RandomAccessImages.keys`.
        known_names: class names of the earlier segments.
    """

    number: int
    origin: Origin
    keys: np.ndarray
    known_names: tuple[str, ...]


def append_images(config: AppendConfig, *, dry_run: bool = False) -> EncodeResult:
    """Add the images that are not in the set yet, for each size. An interrupted run is continued.

    Args:
        dry_run: report which images are new and how long encoding them takes; write nothing.

    Returns: the sets after the job.

    Raises:
        UserError: there is no finished set, the settings differ from the set's, or the images are not usable.
    """
    return run_job(config, partial(append_all_sizes, dry_run=dry_run))


def append_all_sizes(config: AppendConfig, accelerator: Any, dry_run: bool = False) -> EncodeResult:
    """`append_images` with an open accelerator. For all processes."""
    job, made = None, list[Manifest | None]()
    for size, one in config.of_each_size():
        manifest = run_on_main(accelerator, partial(read_manifest, one.output))  # before anything that takes time
        job = prepare(one, accelerator, size, job)
        begin_encoding("latents append", job, one.output)
        folder = open_folder(one.output)
        segment = run_on_main(accelerator, partial(next_segment, job, folder, config.id_prefix))
        if segment is not None and dry_run:
            _preview(*open_segment(job, folder, segment))
        if segment is None or dry_run:
            made.append(manifest)
        else:
            made.append(encode_segment(*open_segment(job, folder, segment)))
    return EncodeResult(tuple(made))


def _preview(job: Job, output: Output) -> None:
    state = run_on_main(job.accelerator, output.check)
    end_dry_run(output.where, f"{state}; {preview_encoding(job).expected(job.config.workers)}")


def segment_job(config: EncodeConfig, accelerator: Any, folder: Folder, segment: int) -> tuple[Job, Output]:
    """The job that made a segment (1 or later) of a finished set, for making its shards again. For all processes.

    The source may have grown since, by images of other segments. All sidecars of the other segments are read.

    Raises:
        UserError: the settings or images differ from the segment's, or a sidecar of another segment is damaged.
    """
    assert segment > 0, "the first segment is what `prepare` gives"
    job = prepare(config, accelerator)
    return open_segment(job, folder, run_on_main(accelerator, partial(_made_segment, job, folder, segment)))


def open_segment(job: Job, folder: Folder, segment: NewSegment) -> tuple[Job, Output]:
    """The job for a segment, from the job for its whole source."""
    images = NewImages(_addressable(job), segment)
    return replace(job, images=images, origin=segment.origin), Output(folder, segment.origin, segment.number)


def next_segment(job: Job, folder: Folder, id_prefix: str) -> NewSegment | None:
    """The segment to make now: an interrupted one if there is one; None if nothing is new.

    `job`: for the whole source. Reports how many images are new. Raises: UserError, see `append_images`.
    """
    where = folder.location
    manifest = read_manifest(folder)
    images = _addressable(job)
    _check_recipe(job, manifest, where)
    known = KnownIds(folder, range(manifest.shards))
    keys, shards = _looked_up(images, known, id_prefix)
    new = shards < 0
    refuse_other_images(job, images, manifest, keys[~new], shards[~new], id_prefix)
    total, count, number = len(keys), int(new.sum()), len(manifest.datasets)
    under_way = folder.exists(plan_name(number))
    if left_out := known.left_out(id_prefix + images.id(key) for key in keys[~new].tolist()):
        say(
            f"{where}: {left_out} of the images with known ids {'was' if left_out == 1 else 'were'} left out at the "
            "first encoding; to add a repaired one, give it another name, or append it alone with id_prefix=NAME/"
        )
    if not count and not under_way:
        what = "the image is" if total == 1 else f"all {total} images are"
        end(where, f"nothing new: {what} in the set already, by their ids", next_words(job, where))
        return None
    verb = "is" if count == 1 else "are"
    say(f"{where}: {total - count} of {total} images are in the set already, by their ids; {count} {verb} new")
    last = manifest.datasets[-1]
    place = (manifest.shards, last["first_index"] + last["count"])
    segment = _planned(job, images, manifest, number, keys[new], place, id_prefix)
    if under_way:
        advice = (
            f"give the images of the interrupted append, or delete {plan_name(number)} to start it again with these"
        )
        check_same(to_dict(segment.origin), read_plan(folder, number), f"{where}/{plan_name(number)}", advice)
    _say_classes(manifest, segment.origin.dataset["label_names"], where)
    return segment


def _say_classes(manifest: Manifest, names: Sequence[str], where: str) -> None:
    """Warn if only the set or only the new images have classes. `names`: classes of the new images."""
    if manifest.label_names and not names:
        say(f"{where}: the images of the set have classes, the new ones have none; their label will be -1")
    if names and not manifest.label_names:
        say(f"{where}: the {pluralize(manifest.count, 'image')} of the set have no label, the new ones have classes")
    if new := [name for name in names if name not in manifest.label_names]:
        more = f" and {len(new) - SHOWN_CLASSES} more" if len(new) > SHOWN_CLASSES else ""
        say(f"{where}: new classes: {', '.join(new[:SHOWN_CLASSES])}{more} ({len(new)})")


def _made_segment(job: Job, folder: Folder, number: int) -> NewSegment:
    manifest, origin = read_manifest(folder), read_origin(folder, number)
    images, where = _addressable(job), f"{folder.location}/{plan_name(number)}"
    ends = [record["first_shard"] for record in manifest.datasets[number + 1 :]] + [manifest.shards]
    others = [*range(origin.first_shard), *range(ends[0], manifest.shards)]
    prefix = origin.dataset["id_prefix"]
    keys, shards = _looked_up(images, KnownIds(folder, others), prefix)
    place = (origin.first_shard, origin.first_index)
    segment = _planned(job, images, manifest, number, keys[shards < 0], place, prefix)
    advice = "give the settings and images that this segment was made with"
    check_same(to_dict(segment.origin), read_plan(folder, number), where, advice)
    return segment


def first_segment(job: Job, folder: Folder) -> NewSegment:
    """The first segment of a set whose source has grown since: the images that are in no other segment.

    Raises:
        UserError: the settings or these images differ from the segment's.
    """
    manifest, origin = read_manifest(folder), read_origin(folder)
    images, where = _addressable(job), folder.location
    _check_recipe(job, manifest, where)
    end = manifest.datasets[1]["first_shard"] if len(manifest.datasets) > 1 else manifest.shards
    keys, shards = _looked_up(images, KnownIds(folder, range(end, manifest.shards)), "")
    keys, count = keys[shards < 0], manifest.datasets[0]["count"]
    advice = "give exactly the images of the first run, or these and the appended images"
    if len(keys) != count:
        raise UserError(
            f"{where}: its first segment has {count} images, but {len(keys)} of the given images are in no other "
            f"segment; {advice}"
        )
    for number in range(end):
        try:
            sidecar = read_sidecar(folder, number)
        except UserError:
            continue  # damaged; its ids lie between those of its neighbors
        ids = {line.index: line.id for line in sidecar.samples} | {line.index: line.id for line in sidecar.rejected}
        for index, expected in ids.items():
            if (id := images.id(int(keys[index]))) != expected:
                raise UserError(
                    f"{where}: image {index} is {expected} in the set and {id} in the given images; {advice}"
                )
    return NewSegment(0, origin, keys, ())


def _planned(
    job: Job, images: Addressable, manifest: Manifest, number: int, keys: np.ndarray, place: tuple[int, int],
    id_prefix: str,
) -> NewSegment:  # fmt: skip
    """The segment of the images at `keys`; `place`: its first shard and index. All else is as in the set."""
    known_names: tuple[str, ...] = ()
    for record in manifest.datasets[:number]:
        known_names = merge_label_names(known_names, record["label_names"])
    dataset = job.origin.dataset | images.record_of(keys) | {"count": len(keys), "id_prefix": id_prefix}
    origin = replace(
        job.origin, autoencoder=manifest.autoencoder, dataset=dataset, first_shard=place[0], first_index=place[1]
    )
    return NewSegment(number, origin, keys, known_names)


def _addressable(job: Job) -> Addressable:
    """Raises: UserError for a stream of unknown length."""
    if not isinstance(job.images, Addressable):
        raise UserError(
            "data.datasets.streaming: the images of this stream cannot be counted, so new images cannot be found; "
            "give parquet or plain tar files, or set it to false"
        )
    return job.images


def _check_recipe(job: Job, manifest: Manifest, where: str) -> None:
    """Raises: UserError unless the new latents are made like those of the set, from the same part of their source."""

    def recipe(values: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
        part = {key: dataset.get(key, ours[key]) for key in ("part", "held_out")}
        return {field.name: values[field.name] for field in fields(Recipe)} | {"dataset": part}

    ours = job.origin.dataset
    here, there = recipe(to_dict(job.origin), ours), recipe(manifest.to_dict(), manifest.datasets[0])
    check_same(here, there, where, "give the settings that the set was encoded with")


def _looked_up(images: Addressable, known: KnownIds, id_prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """(key of every image of the source, the shard that has its id or -1 for a new image), both int64."""
    keys, shards, every = [], [], iter(images.keys())
    while chunk := list(islice(every, IDS_AT_ONCE)):
        keys.append(np.array(chunk, np.int64))
        shards.append(known.find(id_prefix + images.id(key) for key in chunk))
    return np.concatenate(keys), np.concatenate(shards)


class NewImages:
    """The images of a segment: those at its keys of the source, with the ids and the class numbers of the set."""

    def __init__(self, images: Addressable, segment: NewSegment) -> None:
        self.images, self.keys, self.dataset = images, segment.keys, segment.origin.dataset
        self.count, self.whole_units = len(self.keys), images.whole_units
        self.label_names = tuple(self.dataset["label_names"])
        names = merge_label_names(segment.known_names, self.label_names)
        numbers = {name: number for number, name in enumerate(names)}
        self.labels = [numbers.get(name, -1) for name in images.label_names]

    def fingerprint(self) -> str:
        return self.dataset["fingerprint"]

    def groups(self, units: Units, unit: int, batch: int) -> Iterator[Group]:
        total = -(-self.count // unit)
        numbers = units.run(total) if self.whole_units else list(units.numbers(total))
        ranges = (self.keys[number * unit : (number + 1) * unit].tolist() for number in numbers)
        items = self.images.items(chain.from_iterable(ranges))
        for number in numbers:
            for indices, last in batches_of(number, unit, batch, self.count):
                yield Group(number, [(index, self._renamed(item)) for index, item in zip(indices, items)], last)

    def _renamed(self, item: Item) -> _Renamed:
        label = self.labels[item.label] if item.label >= 0 else -1
        return _Renamed(item, self.dataset.get("id_prefix", "") + item.id, label)


@dataclass(frozen=True)
class _Renamed:
    """See `images.Item`."""

    item: Item
    id: str
    label: int

    def read(self) -> np.ndarray:
        return self.item.read()


# The ids in a set, and whether they belong to the same images: two folders may both have a `000.png`.

COMPARED_IMAGES = 8
"""Number of images with known ids to compare. Each costs an image and, behind a URL, the download of a shard."""

COMPARED_ROWS, LAST_ROWS = 16, 4
"""For ids that are row numbers: evenly spread rows, and the last rows, which move if an earlier row is added."""

OTHER_IMAGE = 0.2
"""Latents at this distance or more belong to different images. The unit is their spread over the set; for codes it is
the share that differs. Two random images have a distance of about 1.4, the same image on another device 0.01. The noise
of stored samples counts as spread, so with very noisy samples a changed image may pass."""


class KnownIds:
    """The ids of shards, both of samples and of rejected images.

    Stored as sorted 64-bit hashes with the shard of each: 12 bytes per id. The probability that a new image has the
    hash of a known one is (new ids) (known ids) / 2^64: 5e-6 for a million new ids and a set of 100 million.
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
        """The shard number of each id, int32; -1 for an id that is in no shard."""
        hashes = _hashes(ids)
        places = self.hashes.searchsorted(hashes).clip(max=len(self.hashes) - 1)
        return np.where(self.hashes[places] == hashes, self.shards[places], np.int32(-1))

    def left_out(self, ids: Iterable[str]) -> int:
        """How many of these ids belong to rejected images."""
        return int(np.isin(_hashes(ids), self._left_out).sum()) if len(self._left_out) else 0


def _hashes_of(folder: Folder, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all ids of a shard, and of the ids of its rejected images."""
    sidecar = read_sidecar(folder, number)
    left_out = _hashes(rejection.id for rejection in sidecar.rejected)
    return np.concatenate([_hashes(sample.id for sample in sidecar.samples), left_out]), left_out


def _hashes(ids: Iterable[str]) -> np.ndarray:
    """xxh3_64 of each id, uint64."""
    import xxhash

    return np.fromiter((xxhash.xxh3_64_intdigest(id.encode()) for id in ids), np.uint64)


def refuse_other_images(
    job: Job, images: Addressable, manifest: Manifest, keys: np.ndarray, shards: np.ndarray, id_prefix: str
) -> None:
    """Encode a few of the images with known ids and compare, since another source may use the same ids (`000.png`).

    Raises: UserError if most of them differ from those in the set, or, if ids are row numbers, if any differs.
    """
    where, rows = str(manifest.where.location), job.origin.dataset["source"] == "datasets"
    compared, others, relabeled = _compare(job, images, manifest, keys, shards, id_prefix)
    if others and rows:
        raise UserError(
            f"{where}: {others[0]} is another image now ({len(others)} of {compared} compared differ), and ids are row "
            "numbers here: rows have moved (do new files sort before old ones?), or it is another dataset; append "
            "the new files alone (not the whole source) with id_prefix=NAME/"
        )
    if 2 * len(others) > compared:
        raise UserError(
            f"{where}: holds another image as {others[0]} ({len(others)} of {compared} compared differ); for "
            "another source, give id_prefix=NAME/; if the images were changed, encode them to another output"
        )
    for id in others:
        say(f"{where}: {id} has changed since it was encoded; its latent is kept")
    if relabeled:
        say(
            f"{where}: {len(relabeled)} of {compared} compared images have another label now, for example "
            f"{relabeled[0]}; the labels in the set are kept"
        )


def _compare(
    job: Job, images: Addressable, manifest: Manifest, keys: np.ndarray, shards: np.ndarray, id_prefix: str
) -> tuple[int, list[str], list[str]]:
    """(number of compared images, ids of the images that differ, descriptions of the labels that differ)."""
    known = _spread_out(job, images, manifest, keys, shards, id_prefix)
    mean = "mean" if manifest.content == "moments" else None
    location = str(manifest.where.location)
    dataset = LatentDataset(location, posterior=mean, flip=False, verify=False)  # type: ignore[arg-type]
    spread, compared, others, relabeled = _spread(manifest), 0, [], []
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
                relabeled.append(f"{id_prefix}{id} ({now or 'none'} and not {before or 'none'})")
    return compared, others, relabeled


def _name(names: Sequence[str], label: int) -> str:
    """The name of a class; empty for none."""
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
    """A few of the images at `keys`, whose ids are in `shards`, without images that were rejected then."""
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
    """The root of the sum of the channel variances of a set's latents, without posterior noise; 1 for codes."""
    if manifest.content == "indices":
        return 1.0
    sums = manifest.shard_index.sums.copy()
    sums[:, 2] = 0
    latents = manifest.count * len(manifest.layout.names)
    height, width = manifest.latent_shape[1:]
    return float(np.linalg.norm(combine(sums, latents, latents * height * width)["std"]))


def _distance(made: Tensor, stored: dict[str, Any], spread: float) -> float:
    """The distance of an image's new latent from the stored one; see `OTHER_IMAGE`."""
    if "indices" in stored:
        return float((made != stored["indices"]).float().mean())
    latent = stored["latent"]
    difference = made[: len(latent)].float() - latent
    return float(difference.square().sum(0).mean().sqrt()) / max(spread, torch.finfo(torch.float32).tiny)
