"""The sidecar of a shard: which images its samples come from, and which images were left out, one JSON line each.

    {"format_version": 2, "origin": ..., "shard": 0, "count": 255, ..., "body": "xxh3_128:..."}   the header
    {"index": 0, "id": "cats/001.jpg", "checksum": "9a..."}                                       a sample
    {"index": 1, "id": "cats/002.jpg", "reason": "truncated", "message": "..."}                   an image left out

Published after its shard, so a shard without a sidecar does not exist yet. The header is everything that a manifest
needs of a shard, and can be read alone: at a few hundred thousand shards nobody wants to read every id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json, checksum_bytes
from ldm_vae.latents.index import ShardRecord, shard_name, sidecar_name
from ldm_vae.latents.manifest import FORMAT_VERSION
from ldm_vae.storage import Folder

HEADER_BYTES = 1 << 13
"""Read at first; a longer header costs a second read."""

NUMBERS = ("index", "count", "rejected", "first_index", "last_index", "size_bytes")
"""Names of the fields that are numbers; the others are text."""

MAKE_AGAIN = "`ldm-vae latents repair` makes it again"


@dataclass(frozen=True)
class Rejection:
    """An image that was left out: its place in the source, its id, a short reason code and a sentence."""

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
    """What the first line says. `sums`: float64 (3, c), see `statistics`; `origin`: digest of the plan."""

    origin: str
    shard: int
    record: ShardRecord
    sums: np.ndarray


@dataclass(frozen=True)
class Sidecar:
    """All of it, in the order of the source indices."""

    header: Header
    samples: list[Sample]
    rejected: list[Rejection]


def sidecar_bytes(
    origin: str, number: int, record: dict[str, Any], sums: np.ndarray, samples: Sequence[Sample],
    rejected: Sequence[Rejection],
) -> tuple[bytes, Header]:  # fmt: skip
    """The file of a shard, and its header. `record`: the fields of the `ShardRecord` but `sidecar_checksum`."""
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


def read_header(folder: Folder, number: int) -> Header:
    """The header of a shard's sidecar. Raises: UserError when it is missing or not one of this format version."""
    return _parse(folder, number, whole=False)[0]


def read_sidecar(folder: Folder, number: int) -> Sidecar:
    """The whole sidecar of a shard.

    Raises:
        UserError: it is missing, damaged, or of another format version.
    """
    header, body = _parse(folder, number, whole=True)
    try:
        lines = [json.loads(line) for line in body.splitlines()]
        rejected = [Rejection(**line) for line in lines if "reason" in line]
        samples = [Sample(**line) for line in lines if "reason" not in line]
        every: list[Sample | Rejection] = [*samples, *rejected]
        for entry in every:
            _check_types(entry)
    except (ValueError, TypeError, RecursionError) as error:
        where = f"{folder.location}/{sidecar_name(number)}"
        raise UserError(f"{where}: a line cannot be read ({type(error).__name__}: {error}); {MAKE_AGAIN}") from error
    return Sidecar(header, samples, rejected)


def read_ids(folder: Folder, number: int, record: ShardRecord) -> list[str]:
    """The ids of a shard's samples. Raises: UserError as `read_sidecar`, or when it is not of the shard `record`."""
    sidecar = read_sidecar(folder, number)
    if sidecar.header.record != record:
        raise UserError(
            f"{folder.location}: the sidecar of shard {number} is not of the shard that the manifest describes; "
            f"{MAKE_AGAIN}"
        )
    return [sample.id for sample in sidecar.samples]


def _check_types(record: ShardRecord | Sample | Rejection) -> None:
    """Raises: ValueError for a field that is not the number or the text that it should be."""
    for name, value in vars(record).items():
        kind = type(value)
        if kind is not (int if name in NUMBERS else str) or (kind is int and not 0 <= value < 1 << 63):
            raise ValueError(f"{name} is {value!r}"[:80])


def _parse(folder: Folder, number: int, whole: bool) -> tuple[Header, bytes]:
    """(header, the bytes after it; empty unless `whole`)."""
    name = sidecar_name(number)
    where = f"{folder.location}/{name}"
    try:
        data = folder.read(name, None if whole else HEADER_BYTES)
        if b"\n" not in data and not whole:
            data = folder.read(name)
        first, _, body = data.partition(b"\n")
        values = json.loads(first)
        if values.pop("format_version") != FORMAT_VERSION:
            raise UserError(f"{where}: has another format version; encode again, or use the release that wrote it")
        checksum, sums = values.pop("body"), np.array(values.pop("sums"), np.float64)
        origin, shard = values.pop("origin"), values.pop("shard")
        record = ShardRecord(**values, sidecar_checksum=checksum_bytes(first))
        _check_types(record)
        if not (isinstance(origin, str) and type(shard) is int and shard >= 0):
            raise ValueError("no origin or shard")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({type(error).__name__}: {error}); {MAKE_AGAIN}") from error
    if shard != number or sums.ndim != 2:
        raise UserError(f"{where}: is the sidecar of {shard_name(shard)}; {MAKE_AGAIN}")
    if whole and checksum_bytes(body) != checksum:
        raise UserError(f"{where}: damaged, its lines do not fit their checksum; {MAKE_AGAIN}")
    return Header(origin, shard, record, sums), body if whole else b""
