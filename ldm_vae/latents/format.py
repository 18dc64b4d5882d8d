"""The format of a set of latent shards: the files of its folder as dataclasses, and how each is read and written.

    plan.json  ->  shard-N.safetensors, shard-N.jsonl  ->  index-N-HASH.safetensors  ->  manifest.json
    Origin         Layout, Sidecar                         ShardIndex                    Manifest

The plan holds everything that determines the bytes of the shards. A shard holds the latents of a range of images, and
its sidecar names the images. The index has one row for each shard. The manifest, published last, describes the set.
`docs/reference/latent-shards.md` is the specification. The bytes of a shard are read and written in `shard`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_vae import config as configuration
from ldm_vae.errors import DamagedFile, UserError
from ldm_vae.files import canonical_json, check_tensor_header, checksum_bytes, readable_json
from ldm_vae.latents.normalizer import LatentNormalizer, combine
from ldm_vae.paths import LATENTS
from ldm_vae.storage import open_folder
from ldm_vae.storage.base import Folder, is_url, local_path

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MAKE_AGAIN = "`ldm-vae latents repair` makes it again"
RESTORE = "`ldm-vae latents repair` rebuilds it from the shards"

CONTENTS = ("moments", "mean", "sample", "indices")
"""The stored form of an image, always unscaled:

    moments   posterior mean, then log-variance (2c, h, w): a trainer draws new samples from it in each epoch
    mean      the mean only (c, h, w): for deterministic autoencoders, or to halve the size of moments
    sample    one posterior sample (c, h, w), drawn once
    indices   codes of a VQ or FSQ autoencoder (h, w)
"""

LATENT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
INDEX_DTYPES = {"uint16": torch.uint16, "int32": torch.int32}
STORED_DTYPES = LATENT_DTYPES | INDEX_DTYPES
SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "uint16": "U16", "int32": "I32"}
FLIPPED = "_flipped"


@dataclass(frozen=True)
class Layout:
    """The tensors of every shard of a set.

    Attributes:
        content: what is stored of each image, one of `CONTENTS`.
        dtype: its precision, a key of `STORED_DTYPES`.
        latent_shape: (c, h, w) of a latent.
        flipped: whether each image's mirror image is stored as well.
    """

    content: str
    dtype: str
    latent_shape: tuple[int, int, int]
    flipped: bool

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of the stored values of one image."""
        channels, height, width = self.latent_shape
        if self.content == "indices":
            return (height, width)
        return (2 * channels if self.content == "moments" else channels, height, width)

    @property
    def summed_channels(self) -> int:
        """Number of channels with statistics: c, or 0 for codes."""
        return 0 if self.content == "indices" else self.latent_shape[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors with the content: for example `moments`, `moments_flipped`."""
        return (self.content, self.content + FLIPPED) if self.flipped else (self.content,)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one image, without its label and index."""
        return len(self.names) * prod(self.sample_shape) * STORED_DTYPES[self.dtype].itemsize

    def tensors(self, count: int) -> dict[str, tuple[str, list[int]]]:
        """Name -> (safetensors dtype, shape) of every tensor of a shard of `count` samples."""
        content = (SAFETENSORS_DTYPES[self.dtype], [count, *self.sample_shape])
        return {"index": ("I64", [count]), "label": ("I64", [count])} | dict.fromkeys(self.names, content)


def index_dtype(codebook_size: int) -> str:
    """The smallest type that holds every code."""
    return "uint16" if codebook_size <= 1 << 16 else "int32"


# The sidecar of a shard: the images of its samples, and the rejected images, one JSON line each.

HEADER_BYTES = 1 << 13
"""Bytes of the first read; a longer header needs a second read."""

NUMBERS = ("index", "count", "rejected", "first_index", "last_index", "size_bytes")
"""Names of the number fields; the others are text."""


class OtherFormat(UserError):
    """A file of a set has a format version that this release does not read."""


class MisplacedSidecar(UserError):
    """A sidecar has the file name of another shard. `number`: its own shard."""

    def __init__(self, *parts: object, number: int) -> None:
        super().__init__(*parts)
        self.number = number


@dataclass(frozen=True)
class Rejection:
    """A rejected image: its place in the source, its id, a short reason code and a sentence."""

    index: int
    id: str
    reason: str
    message: str


@dataclass(frozen=True)
class Sample:
    """An image that became a sample: its place in the source, its id, and xxh3_64 (16 hex digits) of its row."""

    index: int
    id: str
    checksum: str


@dataclass(frozen=True)
class Header:
    """The first line. `sums`: float64 (3, c), see `normalizer.channel_sums`; `origin`: digest of the plan."""

    origin: str
    shard: int
    record: ShardRecord
    sums: np.ndarray


@dataclass(frozen=True)
class Sidecar:
    """A whole sidecar, in the order of the source indices."""

    header: Header
    samples: list[Sample]
    rejected: list[Rejection]


def sidecar_bytes(
    origin: str, number: int, record: dict[str, Any], sums: np.ndarray, samples: Sequence[Sample],
    rejected: Sequence[Rejection],
) -> tuple[bytes, Header]:  # fmt: skip
    """The sidecar of a shard and its header. `record`: the fields of `ShardRecord` except `sidecar_checksum`."""
    every: list[Sample | Rejection] = [*samples, *rejected]
    lines = sorted(every, key=lambda line: line.index)
    body = "".join(canonical_json(asdict(line)) + "\n" for line in lines).encode()
    head = {
        "format_version": FORMAT_VERSION, "origin": origin, "shard": number, **record,
        "sums": sums.tolist(), "body": checksum_bytes(body),
    }  # fmt: skip
    first = canonical_json(head).encode()
    return first + b"\n" + body, Header(
        origin, number, ShardRecord(**record, sidecar_checksum=checksum_bytes(first)), sums
    )


def read_sidecar_header(folder: Folder, number: int) -> Header:
    """The header of a shard's sidecar. Raises: UserError if missing or damaged; MisplacedSidecar; OtherFormat."""
    return _parse(folder, number, sidecar_name(number), whole=False)[0]


def read_sidecar(folder: Folder, number: int, name: str | None = None) -> Sidecar:
    """The whole sidecar of a shard. `name`: of the file, if it has the name of another shard.

    Raises:
        UserError: it is missing, damaged, belongs to another shard or has another format version.
    """
    name = name or sidecar_name(number)
    header, body = _parse(folder, number, name, whole=True)
    try:
        lines = [json.loads(line) for line in body.splitlines()]
        rejected = [Rejection(**line) for line in lines if "reason" in line]
        samples = [Sample(**line) for line in lines if "reason" not in line]
        every: list[Sample | Rejection] = [*samples, *rejected]
        for entry in every:
            _check_types(entry)
    except (ValueError, TypeError, RecursionError) as error:
        what = f"a line cannot be read ({type(error).__name__}: {error})"
        raise UserError(f"{folder.location}/{name}", what, MAKE_AGAIN) from error
    return Sidecar(header, samples, rejected)


def read_ids(folder: Folder, number: int, record: ShardRecord) -> list[str]:
    """The ids of a shard's samples. Raises: UserError as `read_sidecar`, or if it does not belong to `record`."""
    sidecar = read_sidecar(folder, number)
    if sidecar.header.record != record:
        what = f"the sidecar of shard {number} does not belong to the shard that the manifest describes"
        raise UserError(folder.location, what, MAKE_AGAIN)
    return [sample.id for sample in sidecar.samples]


def _check_types(record: ShardRecord | Sample | Rejection) -> None:
    """Raises: ValueError for a field of another type."""
    for name, value in vars(record).items():
        kind = type(value)
        if kind is not (int if name in NUMBERS else str) or (kind is int and not 0 <= value < 1 << 63):
            raise ValueError(f"{name} is {value!r}"[:80])


def _parse(folder: Folder, number: int, name: str, *, whole: bool) -> tuple[Header, bytes]:
    """(header, the bytes after it; empty unless `whole`)."""
    where = f"{folder.location}/{name}"
    try:
        data = folder.read(name, None if whole else HEADER_BYTES)
        if b"\n" not in data and not whole:
            data = folder.read(name)
        first, _, body = data.partition(b"\n")
        values = json.loads(first)
        if (version := values.pop("format_version")) != FORMAT_VERSION:
            what = f"has format version {short(version)}, this program reads {FORMAT_VERSION}"
            raise OtherFormat(where, what, "encode again, or use the release that wrote it")
        checksum, sums = values.pop("body"), np.array(values.pop("sums"), np.float64)
        origin, shard = values.pop("origin"), values.pop("shard")
        record = ShardRecord(**values, sidecar_checksum=checksum_bytes(first))
        _check_types(record)
        ShardIndex.of([record], [sums])  # fails for an invalid checksum
        if not (isinstance(origin, str) and type(shard) is int and shard >= 0 and sums.ndim == 2):
            raise ValueError("origin, shard or sums cannot be right")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(where, f"cannot be read ({type(error).__name__}: {error})", MAKE_AGAIN) from error
    if shard != number:
        raise MisplacedSidecar(where, f"is the sidecar of {shard_name(shard)}", MAKE_AGAIN, number=shard)
    if whole and checksum_bytes(body) != checksum:
        raise DamagedFile(where, "damaged, its lines do not fit their checksum", MAKE_AGAIN)
    return Header(origin, shard, record, sums), body if whole else b""


# The index: one row for each shard, as columns that are read in milliseconds.

SHARDS_PER_PART = 1 << 16
INDEX_NAME = re.compile(r"index-\d{6}-[0-9a-f]{16}\.safetensors")
ALGORITHM = "xxh3_128:"
COLUMNS = {
    "count": (np.int64, ()),
    "rejected": (np.int64, ()),
    "first_index": (np.int64, ()),
    "last_index": (np.int64, ()),
    "size_bytes": (np.int64, ()),
    "checksum": (np.uint8, (16,)),
    "sidecar_checksum": (np.uint8, (16,)),
    "sums": (np.float64, (3, None)),
}
"""Name -> (dtype, shape of an entry; None: channels of a latent, 0 for codes)."""


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def sidecar_name(number: int) -> str:
    return f"shard-{number:06d}.jsonl"


@dataclass(frozen=True)
class ShardRecord:
    """A shard: the source indices `first_index` to `last_index` (inclusive), of which `count` became samples and
    `rejected` images could not be read.

    `checksum` is that of the shard's bytes. `sidecar_checksum` is that of the sidecar's first line, which holds the
    checksum of the other lines.
    """

    count: int
    rejected: int
    first_index: int
    last_index: int
    size_bytes: int
    checksum: str
    sidecar_checksum: str


@dataclass(frozen=True)
class IndexPart:
    """A file of the index in the manifest."""

    file: str
    shards: int
    checksum: str


class ShardIndex:
    """The records of all shards of a set; `index[number]` is a `ShardRecord`."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self.columns = columns
        self.counts: np.ndarray = columns["count"]
        self.sums: np.ndarray = columns["sums"]

    @classmethod
    def of(cls, records: Sequence[ShardRecord], sums: Sequence[np.ndarray]) -> ShardIndex:
        """`sums`: float64 (3, c) of each shard."""
        columns = {}
        for name in COLUMNS:
            values = sums if name == "sums" else [_stored(getattr(record, name)) for record in records]
            columns[name] = np.array(list(values), COLUMNS[name][0])
        return cls(columns)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, number: int) -> ShardRecord:
        if not 0 <= number < len(self):
            raise IndexError(f"shard {number} of {len(self)}")
        values: dict[str, Any] = {name: _plain(self.columns[name][number]) for name in COLUMNS if name != "sums"}
        return ShardRecord(**values)

    def __add__(self, other: ShardIndex) -> ShardIndex:
        return ShardIndex({name: np.concatenate([self.columns[name], other.columns[name]]) for name in COLUMNS})

    @property
    def count(self) -> int:
        """Number of samples in all shards."""
        return int(self.counts.sum())

    @property
    def rejected(self) -> int:
        return int(self.columns["rejected"].sum())

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards, without sidecars."""
        return int(self.columns["size_bytes"].sum())


def _stored(value: int | str) -> int | list[int]:
    return value if isinstance(value, int) else list(bytes.fromhex(value.removeprefix(ALGORITHM)))


def _plain(value: np.ndarray) -> int | str:
    return int(value) if value.ndim == 0 else ALGORITHM + value.tobytes().hex()


def index_files(index: ShardIndex, shards_per_part: int = SHARDS_PER_PART) -> list[tuple[IndexPart, bytes]]:
    """The files of an index. Equal records give equal bytes and names."""
    from safetensors.numpy import save

    parts = []
    for number, start in enumerate(range(0, len(index), shards_per_part)):
        columns = {name: np.ascontiguousarray(values[start : start + shards_per_part])
                   for name, values in index.columns.items()}  # fmt: skip
        data = save(columns)
        checksum = checksum_bytes(data)
        name = f"index-{number:06d}-{checksum.removeprefix(ALGORITHM)[:16]}.safetensors"
        parts.append((IndexPart(name, len(columns["count"]), checksum), data))
    return parts


def write_index(folder: Folder, index: ShardIndex) -> tuple[IndexPart, ...]:
    """Publish the files of an index."""
    for part, data in (files := index_files(index)):
        folder.write(part.file, data)
    return tuple(part for part, _ in files)


def read_index(folder: Folder, parts: Sequence[IndexPart], channels: int, advice: str) -> ShardIndex:
    """The index in a manifest. Raises: UserError, with `advice`, if a file is missing or damaged."""
    if not parts:
        raise UserError(folder.location, "the manifest lists no index", advice)
    found = [_read_part(folder, part, channels, advice) for part in parts]
    return ShardIndex({name: np.concatenate([columns[name] for columns in found]) for name in COLUMNS})


def _read_part(folder: Folder, part: IndexPart, channels: int, advice: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    where = f"{folder.location}/{part.file}"
    if not INDEX_NAME.fullmatch(part.file):
        raise UserError(folder.location, f"{part.file!r} is not the name of an index file", advice)
    try:
        data = folder.read(part.file)
    except FileNotFoundError as error:
        raise UserError(where, "is not there", advice) from error
    if (checksum := checksum_bytes(data)) != part.checksum:
        raise DamagedFile(where, f"damaged, its checksum is {checksum} and not {part.checksum}", advice)
    check_tensor_header(data[8:], int.from_bytes(data[:8], "little"), where)
    try:
        columns = load(data)
    except SafetensorError as error:
        raise UserError(where, f"is not an index ({error})", advice) from error
    shapes = {name: (dtype, (part.shards, *(channels if side is None else side for side in shape)))
              for name, (dtype, shape) in COLUMNS.items()}  # fmt: skip
    if {name: (values.dtype, values.shape) for name, values in columns.items()} != shapes:
        raise UserError(where, f"does not hold the columns of an index of {part.shards} shards", advice)
    return columns


# The plan and the manifest: how the latents of a set are made, the source of its images, and its content.


def plan_name(segment: int) -> str:
    return f"plan-{segment:06d}.json" if segment else "plan.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the latents of a set are made, the same for all of its shards.

    Attributes:
        autoencoder: `fingerprint` and `encoder_fingerprint` ("sha256:..."), `class` and `config`; for codes also
            `token_fingerprint`, which covers the quantizer.
        preprocessing: the processing of an image, see `data.transforms.preprocessing_record`.
        content, dtype, latent_shape (c, h, w), flipped: see `Layout`.
        encoding: `batch`, `shard_size` and `precision` of the computation, on which the last bits depend; `seed` of
            the noise if samples are stored.
    """

    autoencoder: dict[str, Any]
    preprocessing: dict[str, Any]
    content: str
    dtype: str
    latent_shape: tuple[int, int, int]
    flipped: bool
    encoding: dict[str, Any]
    format_version: int = FORMAT_VERSION

    @property
    def layout(self) -> Layout:
        return Layout(self.content, self.dtype, self.latent_shape, self.flipped)


@dataclass(frozen=True, kw_only=True)
class Origin(Recipe):
    """The plan of a segment: everything that determines the bytes of its shards.

    Attributes:
        dataset: `source`, `part`, `held_out` (None for part "all"), `fingerprint`, `label_names` and `count` (images;
            None in the plan of a stream).
        first_shard, first_index: numbers of its first shard and first image; earlier segments have the lower ones.
    """

    dataset: dict[str, Any]
    first_shard: int = 0
    first_index: int = 0

    @property
    def digest(self) -> str:
        """sha256 hex; each shard carries it."""
        return configuration.digest(self)


@dataclass(frozen=True, kw_only=True)
class Manifest(Recipe):
    """A finished set.

    Attributes:
        datasets: for each segment its `Origin.dataset`, with `first_shard`, `first_index` and `plan`, the digest.
        label_names: names of the classes of all segments.
        count, rejected, shards: number of samples, of rejected images (listed in quarantine.jsonl), and of shards.
        index: the files that list the shards.
        statistics: `mean` [c] and `std` [c] of the latents as a trainer gets them, `count` of measured latents. For
            codes: `codebook_size`.
        where: the folder that it was read from; not part of the file.
    """

    datasets: tuple[dict[str, Any], ...]
    label_names: tuple[str, ...]
    count: int
    rejected: int
    shards: int
    index: tuple[IndexPart, ...]
    statistics: dict[str, Any]
    where: Folder = field(compare=False, repr=False)

    @cached_property
    def normalizer(self) -> LatentNormalizer:
        """The normalizer of the set. Raises: UserError for a set of codes, and for invalid constants."""
        if self.content == "indices":
            raise UserError(
                f"{self.where.location}: holds codes (content is indices), a diffusion model needs latents; "
                "encode with store=moments or store=mean"
            )
        return LatentNormalizer.from_dict(self.statistics)

    @cached_property
    def shard_index(self) -> ShardIndex:
        """The records of all shards. Raises: UserError if the index is damaged or does not fit the manifest."""
        index = read_index(self.where, self.index, self.layout.summed_channels, RESTORE)
        found = {"shards": len(index), "count": index.count, "rejected": index.rejected}
        for name, value in found.items():
            if value != getattr(self, name):
                what = f"{name} is {getattr(self, name)} in {MANIFEST} and {value} in the index"
                raise UserError(self.where.location, what, RESTORE)
        return index

    def check_autoencoder(self, encoder_fingerprint: str, where: str) -> None:
        """Raises: UserError unless these latents were made by the encoder with this fingerprint.

        The decoder may differ: latents stay valid if it is trained further with a frozen encoder.
        """
        made_by = self.autoencoder["encoder_fingerprint"]
        if encoder_fingerprint != made_by:
            raise UserError(
                f"{where}: its encoder has the fingerprint {short(encoder_fingerprint)}, but the latents were made by "
                f"{short(made_by)}; give the autoencoder that made them, or encode again with this one"
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of manifest.json, without its digest."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "where"}
        values["index"] = [dataclasses.asdict(part) for part in self.index]
        return json.loads(json.dumps(values))


def manifest_statistics(index: ShardIndex, layout: Layout, codebook_size: int | None) -> dict[str, Any]:
    """The statistics of a manifest, from the sums in its index."""
    if codebook_size is not None:
        return {"codebook_size": codebook_size}
    latents = index.count * len(layout.names)
    return combine(index.sums, latents, latents * layout.latent_shape[1] * layout.latent_shape[2])


def build_manifest(
    origins: Sequence[Origin], recipe: Recipe, index: ShardIndex, parts: Sequence[IndexPart], folder: Folder
) -> Manifest:
    """The manifest of a set, from the plans of its segments and the records of its shards.

    Args:
        origins: the plans. The shards of the last segment are the last ones of the index.
        recipe: the common fields of the plans.
        parts: the files of the index.
    """
    ends = [origin.first_shard for origin in origins[1:]] + [len(index)]
    datasets: list[dict[str, Any]] = []
    label_names: tuple[str, ...] = ()
    for origin, end in zip(origins, ends):
        count = int(index.columns["last_index"][end - 1]) + 1 - origin.first_index
        place = {"first_shard": origin.first_shard, "first_index": origin.first_index, "plan": origin.digest}
        datasets.append(origin.dataset | {"count": count} | place)
        label_names = merge_label_names(label_names, origin.dataset["label_names"])
    return Manifest(
        **{part.name: getattr(recipe, part.name) for part in dataclasses.fields(Recipe)},
        datasets=tuple(datasets),
        label_names=label_names,
        count=index.count,
        rejected=index.rejected,
        shards=len(index),
        index=tuple(parts),
        statistics=manifest_statistics(index, recipe.layout, recipe.encoding.get("codebook_size")),
        where=folder,
    )


def write_plan(folder: Folder, origin: Origin, segment: int = 0) -> None:
    folder.write(plan_name(segment), readable_json(configuration.to_dict(origin)).encode())


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Publish `manifest.json` with the digest of its content."""
    values = manifest.to_dict()
    folder.write(MANIFEST, readable_json({**values, "digest": configuration.digest(values)}).encode())


def read_plan(folder: Folder, segment: int = 0) -> dict[str, Any]:
    """The fields of a plan, unchecked. Raises: UserError if it is damaged, OtherFormat."""
    return _read(folder, plan_name(segment), "restore it from a copy, or encode the images to another output")


def read_origin(folder: Folder, segment: int = 0) -> Origin:
    """A plan as an `Origin`. Raises: UserError as `read_plan`, or if fields are missing or unknown."""
    values = read_plan(folder, segment)
    where = f"{folder.location}/{plan_name(segment)}"
    try:
        origin = Origin(**{**values, "latent_shape": tuple(values["latent_shape"])})
        _check_values(origin, where)
        origin.digest  # noqa: B018 - NaN and infinity have none
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(where, f"damaged ({error})", "restore it from a copy") from error
    return origin


def planned_shards(origin: Origin) -> int | None:
    """The number of shards of a segment; None for a stream whose plan has no length."""
    count = origin.dataset["count"]
    return None if count is None else -(-count // origin.encoding["shard_size"])


def read_manifest(location: str | Path | Folder) -> Manifest:
    """The manifest of a finished set.

    Raises:
        UserError: no such folder, not finished, or damaged.
        OtherFormat: it has another format version.
    """
    folder = open_folder(location) if isinstance(location, (str, Path)) else location
    if not folder.exists(MANIFEST):
        if folder.sizes("index-"):  # it is published just before the manifest
            raise UserError(folder.location, f"{MANIFEST} is missing", RESTORE)
        if folder.exists(plan_name(0)):
            instead = "run the same `ldm-vae encode` command again"
            raise UserError(folder.location, "the encoding is not finished", instead)
        instead = "give a folder that `ldm-vae encode` wrote (of several sizes one of the folders inside)"
        raise UserError(folder.location, f"holds no {MANIFEST}", instead)
    where = f"{folder.location}/{MANIFEST}"
    values = _read(folder, MANIFEST, RESTORE)
    digest = values.pop("digest", None)
    try:
        fits = configuration.digest(values) == digest
    except ValueError:  # canonical JSON has no NaN and infinity
        fits = False
    if not fits:
        raise DamagedFile(where, "damaged or edited, its digest does not fit its content", RESTORE)
    try:
        for name in ("latent_shape", "datasets", "label_names"):
            values[name] = tuple(values[name])
        values["index"] = tuple(IndexPart(**part) for part in values["index"])
        manifest = Manifest(**values, where=folder)
        _check_values(manifest, where)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(where, f"damaged ({error})", RESTORE) from error
    return manifest


DATASET_KEYS = {"source": str, "label_names": list}
"""Required keys of a plan's `dataset`, and their types."""


def _check_values(recipe: Recipe, where: str) -> None:
    """Raises: ValueError for a field of another type or an impossible size, UserError for an unknown content."""
    for name, kind in typing.get_type_hints(type(recipe)).items():
        value, kind = getattr(recipe, name), typing.get_origin(kind) or kind
        if name != "where" and (not isinstance(value, kind) or (kind is int and (type(value) is not int or value < 0))):
            raise ValueError(f"{name} is {short(value)}")
    sizes = {"latent_shape": recipe.latent_shape, "shard_size": (recipe.encoding["shard_size"],)}
    if isinstance(recipe, Origin):
        count = recipe.dataset["count"]
        sizes["count"] = (1 if count in (None, 0) else count,)
        if not all(isinstance(recipe.dataset[key], kind) for key, kind in DATASET_KEYS.items()):
            raise ValueError(f"dataset lacks one of {', '.join(DATASET_KEYS)}")
    if isinstance(recipe, Manifest):
        sizes["index"] = tuple(part.shards for part in recipe.index)
        if not all(isinstance(text, str) for part in recipe.index for text in (part.file, part.checksum)):
            raise ValueError("index names no files")
        if not all(isinstance(text, str) for text in recipe.label_names):
            raise ValueError("label_names are not names")
    for name, numbers in sizes.items():
        if not all(type(number) is int and 0 < number < 1 << 48 for number in numbers):
            raise ValueError(f"{name} is {short(list(numbers))}")
    if len(recipe.latent_shape) != 3:
        raise ValueError(f"latent_shape is {short(list(recipe.latent_shape))}")
    known = INDEX_DTYPES if recipe.content == "indices" else LATENT_DTYPES
    if recipe.content not in CONTENTS or recipe.dtype not in known:
        raise UserError(f"{where}: content {short(recipe.content)} in {short(recipe.dtype)} is unknown; update ldm_vae")


def _read(folder: Folder, name: str, advice: str) -> dict[str, Any]:
    where = f"{folder.location}/{name}"
    try:
        values = json.loads(folder.read(name))
        version = values["format_version"]
        newer = version > FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(where, f"cannot be read ({type(error).__name__}: {error})", advice) from error
    if newer or version < FORMAT_VERSION:
        cure = "update ldm_vae" if newer else "use the release that wrote it"
        what = f"has format version {version}, this program reads {FORMAT_VERSION}"
        raise OtherFormat(where, what, f"{cure}, or encode the images to another output")
    return values


def check_same(expected: Mapping[str, Any], found: Mapping[str, Any], where: str, advice: str) -> None:
    """Raises: UserError that names the fields of `expected` (of a plan) with another value in `found`, and both values.

    The decoder does not count: autoencoders with the same encoder are the same here.
    """
    old, new = (
        {
            name: _without_decoder(value) if name == "autoencoder" else value
            for name, value in values.items()
            if name in expected
        }
        for values in (found, expected)
    )
    shown = _describe_changes(configuration.changed_keys(old, new))
    if shown:
        more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
        raise UserError(f"{where}: was made with {', '.join(shown[:4])}{more}; {advice}")


_WORDS = {
    "autoencoder.encoder_fingerprint": "the encoder {}",
    "autoencoder.token_fingerprint": "the quantizer {}",
    "content": "store={}",
    "dataset.count": "{} images",
    "dataset.fingerprint": "images with the fingerprint {}",
    "dataset.held_out": "data.held_out={}",
    "dataset.label_names": "the classes {}",
    "dataset.part": "part={}",
    "dataset.source": "data.source={}",
    "dtype": "dtype={}",
    "encoding.batch": "batch={}",
    "encoding.precision": "precision={}",
    "encoding.seed": "seed={}",
    "encoding.shard_size": "shard_size={}",
    "flipped": "flip={}",
    "latent_shape.0": "{} latent channels",
}
"""Field of a plan -> its value in a message, as the setting or in words."""

_SIDES = {
    "preprocessing.": ("height", "width", "images of", "pixels"),
    "latent_shape.": ("1", "2", "latents of", "positions"),
}
"""Fields that are the two sides of one size."""


def _describe_changes(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """`changed_keys` of two plans in the words of a person: `flip=true instead of false`. Sizes come first."""
    shown: list[str] = []
    left = dict(changes)
    for prefix, (height, width, what, unit) in _SIDES.items():
        sides = [left.pop(f"{prefix}{side}", None) for side in (height, width)]
        if any(sides) and not shown:  # latents of another size follow from images of another size
            there, here = (" x ".join(str(side[i]) for side in sides if side) for i in (0, 1))
            direction = "" if all(sides) else f" in {'height' if sides[0] else 'width'}"
            shown.append(f"{what} {there} {unit}{direction} instead of {here}")
    for key, (there, here) in left.items():
        words = _WORDS.get(key, f"{key.replace('.', ' ').replace('_', ' ')} {{}}")
        shown.append(f"{words.format(short(there))} instead of {short(here)}")
    return shown


def _without_decoder(autoencoder: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that decide the latents."""
    return {key: value for key, value in autoencoder.items() if key.endswith("_fingerprint")}


def short(value: Any) -> str:
    """A value for a message; a fingerprint is cut to its first 12 digits."""
    text = value if isinstance(value, str) else json.dumps(value)
    match = re.fullmatch(r"(sha256:)?([0-9a-f]{12})[0-9a-f]{52}", text)
    return f"{match[1] or ''}{match[2]}..." if match else text if len(text) <= 80 else text[:77] + "..."


def merge_label_names(known: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """`known`, then the new names of `more`. The numbers of known classes do not change."""
    return (*known, *(name for name in more if name not in known))


# The folder in the settings of a tool.

SHOWN_SETS = 8


def open_set_folder(location: str | Path) -> Folder:
    """The folder of a set. Raises: UserError if a local one does not exist, or holds only folders of sets."""
    if not is_url(location):
        LATENTS.find(location)
        path = local_path(location)
        names = () if is_set(path) else sorted(child.name for child in path.iterdir() if is_set(child))
        if names:
            more = f" and {len(names) - SHOWN_SETS} more" if len(names) > SHOWN_SETS else ""
            raise UserError(
                f"{location}: is not a set, but holds {', '.join(names[:SHOWN_SETS])}{more}; give one of them, as "
                f"{path / names[0]}"
            )
    return open_folder(location)


def is_set(path: Path) -> bool:
    """A local folder with a set, finished or not."""
    return (path / plan_name(0)).exists() or (path / MANIFEST).exists()


def refuse_inside(output: str | Path, option: str) -> None:
    """Raises: UserError if a file would be written into a set's local folder."""
    folder = Path(output).parent
    if is_set(folder):
        raise UserError(f"{option}: {folder} holds latents; give a path outside of it")
