"""One shard: the latents of a fixed range of source indices, complete or absent, every damaged byte detectable.

    shard-000000.safetensors   moments (n, 2c, h, w): posterior mean, then log-variance, unscaled
                               moments_flipped (n, 2c, h, w): those of the mirror images; only in sets that have them
                               label (n) int64, -1 for none; index (n) int64, the place in the source
    shard-000000.json          sidecar: ids of the n samples, images left out, sums for the statistics, checksum

The sidecar is published after its shard, so a shard without one does not exist. n is below the length of the range
when images could not be read. Owns the two files; which shards there are is the manifest's business.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json, checksum, write_bytes, write_json
from ldm_vae.latents.manifest import FORMAT_VERSION, ShardRecord
from ldm_vae.latents.statistics import ChannelSums, channel_sums

STORED_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MAXIMUM_HEADER_BYTES = 1 << 20
_MAKE_AGAIN = "delete this shard and run the same `ldm-vae encode` command again, which makes what is missing"
_NUMPY_DTYPES = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "I64": np.int64}
_HEADER_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Rejection:
    """An image that was left out: its place in the source, its id, a short reason code and a sentence."""

    index: int
    id: str
    reason: str
    message: str


@dataclass(frozen=True)
class Shard:
    """The content of a shard, on the CPU, in the stored precision. Row j of every field is one sample."""

    first_index: int
    last_index: int
    moments: Tensor
    moments_flipped: Tensor | None
    labels: Sequence[int]
    indices: Sequence[int]
    ids: Sequence[str]
    rejected: Sequence[Rejection]


@dataclass(frozen=True)
class Sidecar:
    """What is known of a shard without opening it."""

    format_version: int
    origin: str
    record: ShardRecord
    size_bytes: int
    ids: list[str]
    rejected: list[Rejection]
    sums: ChannelSums


@dataclass(frozen=True)
class OpenShard:
    """The arrays of a shard, mapped into memory, not read. bfloat16 is seen as uint16."""

    moments: np.ndarray
    moments_flipped: np.ndarray | None
    label: np.ndarray
    index: np.ndarray


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def write_shard(directory: Path, number: int, shard: Shard, origin: str) -> Sidecar:
    """Publish a shard and then its sidecar; `origin` is the digest of the plan. Equal content gives equal bytes.

    Raises:
        UserError: the disk is full. Published shards stay intact.
    """
    path = directory / shard_name(number)
    tensors = {
        "moments": shard.moments.contiguous(),
        "label": torch.tensor(shard.labels, dtype=torch.int64),
        "index": torch.tensor(shard.indices, dtype=torch.int64),
    }
    if shard.moments_flipped is not None:
        tensors["moments_flipped"] = shard.moments_flipped.contiguous()
    # more than one metadata key would come out in a random order
    metadata = {"ldm_vae": canonical_json({"format_version": FORMAT_VERSION, "origin": origin, "shard": number})}
    moments = [shard.moments] if shard.moments_flipped is None else [shard.moments, shard.moments_flipped]
    try:
        write_bytes(path, save(tensors, metadata))  # save_file would make it readable by its owner only
        record = ShardRecord(path.name, len(shard.ids), shard.first_index, shard.last_index, checksum(path))
        sidecar = Sidecar(
            FORMAT_VERSION, origin, record, path.stat().st_size,
            list(shard.ids), list(shard.rejected), channel_sums(moments),
        )  # fmt: skip
        write_json(path.with_suffix(".json"), dataclasses.asdict(sidecar))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{directory}: no space left on the device; finished shards are intact: "
                "free some space and run the same command again"
            ) from error
        raise
    return sidecar


def read_sidecar(path: Path) -> Sidecar:
    """Raises: UserError when the file is missing or not a sidecar of this format version."""
    try:
        values = json.loads(path.read_text())
        if values["format_version"] > FORMAT_VERSION:
            raise UserError(f"{path}: has format version {values['format_version']}; update ldm_vae")
        values["record"] = ShardRecord(**values["record"])
        values["rejected"] = [Rejection(**rejected) for rejected in values["rejected"]]
        values["sums"] = ChannelSums(**values["sums"])
        return Sidecar(**values)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); {_MAKE_AGAIN}") from error


def finished_sidecar(directory: Path, number: int, origin: str) -> Sidecar | None:
    """The sidecar of a shard that is published whole and belongs to this plan; None where it has to be made."""
    path = directory / shard_name(number)
    try:
        sidecar = read_sidecar(path.with_suffix(".json"))
        whole = os.stat(path).st_size == sidecar.size_bytes
    except (UserError, OSError):
        return None
    return sidecar if whole and sidecar.origin == origin and sidecar.record.file == path.name else None


def open_shard(
    path: Path, record: ShardRecord, latent_shape: Sequence[int], dtype: str, *, flipped: bool, verify: bool
) -> OpenShard:
    """Map a shard into memory, after comparing its checksum where `verify`, and its header always.

    Raises:
        UserError: missing, damaged, or not the shard that the manifest describes.
    """
    try:
        if verify and (found := checksum(path)) != record.checksum:
            raise UserError(f"{path}: damaged, its checksum is {found} and not {record.checksum}; {_MAKE_AGAIN}")
        header, start = _read_header(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_MAKE_AGAIN}") from error
    channels, height, width = latent_shape
    moments = (_HEADER_DTYPES[dtype], [record.count, 2 * channels, height, width])
    expected: dict[str, Any] = {"moments": moments, "label": ("I64", [record.count]), "index": ("I64", [record.count])}
    if flipped:
        expected["moments_flipped"] = moments
    found_tensors = {name: (tensor["dtype"], tensor["shape"]) for name, tensor in header.items()}
    if found_tensors != expected:
        raise UserError(f"{path}: holds {found_tensors}, the manifest says {expected}; {_MAKE_AGAIN}")

    def array(name: str) -> np.ndarray:
        tensor = header[name]
        kind = _NUMPY_DTYPES[tensor["dtype"]]
        if record.count == 0:  # an empty file range cannot be mapped
            return np.empty(tensor["shape"], kind)
        begin = start + tensor["data_offsets"][0]
        return np.memmap(path, kind, mode="r", offset=begin, shape=tuple(tensor["shape"]))

    return OpenShard(array("moments"), array("moments_flipped") if flipped else None, array("label"), array("index"))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(tensor name -> dtype, shape, data_offsets; where the data begins). Extents are checked against the file."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAXIMUM_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        size_bytes, start = os.stat(path).st_size, 8 + length
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            items = int(np.prod(tensor["shape"], dtype=object))
            if end - begin != items * np.dtype(_NUMPY_DTYPES[tensor["dtype"]]).itemsize or begin < 0:
                raise ValueError(f"tensor {name!r} does not fit its extent")
            if start + end > size_bytes:
                raise ValueError("it is cut off")
        return header, start
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is no whole shard ({error}); {_MAKE_AGAIN}") from error
