"""The index: what is known of every shard without touching it, as columns that are read in milliseconds.

A set of a billion samples has hundreds of thousands of shards, too many for one JSON file. Their records are tensors
in files `index-NNNNNN-HHHHHHHHHHHHHHHH.safetensors`, at most 65,536 shards each, named by their number and content:
a new version of a set adds files beside the old ones, and becomes the set when the manifest that lists them does.
Owns these files; whether the shards fit them is `verify`'s question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_vae.errors import UserError
from ldm_vae.files import checksum_bytes
from ldm_vae.storage import Folder
from ldm_vae.tensor_files import check_tensor_header

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

    `checksum` is of the shard's bytes, `sidecar_checksum` of the sidecar's first line, which holds that of the rest.
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
    """A file of the index, as the manifest lists it."""

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
        """Samples of all shards."""
        return int(self.counts.sum())

    @property
    def rejected(self) -> int:
        return int(self.columns["rejected"].sum())

    @property
    def size_bytes(self) -> int:
        """Of all shards, sidecars not counted."""
        return int(self.columns["size_bytes"].sum())


def _stored(value: int | str) -> int | list[int]:
    return value if isinstance(value, int) else list(bytes.fromhex(value.removeprefix(ALGORITHM)))


def _plain(value: np.ndarray) -> int | str:
    return int(value) if value.ndim == 0 else ALGORITHM + value.tobytes().hex()


def index_files(index: ShardIndex, shards_per_part: int = SHARDS_PER_PART) -> list[tuple[IndexPart, bytes]]:
    """The files of an index; equal records give equal bytes and names."""
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
    """The index that a manifest lists. Raises: UserError when a file is missing or damaged; `advice` is the cure."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    found = []
    for part in parts:
        where = f"{folder.location}/{part.file}"
        if not INDEX_NAME.fullmatch(part.file):
            raise UserError(f"{folder.location}: {part.file!r} is no name of an index file; {advice}")
        try:
            data = folder.read(part.file)
        except FileNotFoundError as error:
            raise UserError(f"{where}: is not there; {advice}") from error
        if (checksum := checksum_bytes(data)) != part.checksum:
            raise UserError(f"{where}: damaged, its checksum is {checksum} and not {part.checksum}; {advice}")
        check_tensor_header(data[8:], int.from_bytes(data[:8], "little"), where)
        try:
            columns = load(data)
        except SafetensorError as error:
            raise UserError(f"{where}: is no index ({error}); {advice}") from error
        shapes = {name: (dtype, (part.shards, *(channels if side is None else side for side in shape)))
                  for name, (dtype, shape) in COLUMNS.items()}  # fmt: skip
        if {name: (values.dtype, values.shape) for name, values in columns.items()} != shapes:
            raise UserError(f"{where}: does not hold the columns of an index of {part.shards} shards; {advice}")
        found.append(columns)
    if not found:
        raise UserError(f"{folder.location}: the manifest lists no index; {advice}")
    return ShardIndex({name: np.concatenate([columns[name] for columns in found]) for name in COLUMNS})
