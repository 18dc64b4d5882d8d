"""One shard: the latents of a fixed range of source indices, complete or absent, every damaged byte detectable.

    shard-000000.safetensors   the tensors that `contents.Layout` names, one row a sample, and
                               label (n) int64, -1 for none; index (n) int64, the place in the source

n is below the length of the range when images could not be read; the sidecar beside it (`sidecar.py`) names the
samples and the images left out. Owns writing and opening; which shards there are is the manifest's business.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ldm_vae.errors import DISK_FULL, UserError
from ldm_vae.files import canonical_json, checksum, checksum_bytes
from ldm_vae.latents.format import (
    FORMAT_VERSION,
    MAKE_AGAIN,
    Header,
    Layout,
    Rejection,
    Sample,
    ShardRecord,
    shard_name,
    sidecar_bytes,
    sidecar_name,
)
from ldm_vae.latents.normalizer import channel_sums
from ldm_vae.storage.base import Folder

MAXIMUM_HEADER_BYTES = 1 << 20
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_NUMPY_DTYPES = {
    "F16": np.float16, "BF16": np.uint16, "F32": np.float32, "U16": np.uint16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """The content of a shard, on the CPU, in the stored precision. Row j of every tensor and list is one sample.

    Attributes:
        tensors: those that `Layout.names` lists.
        rejected: images of the range that could not be read.
    """

    first_index: int
    last_index: int
    tensors: Mapping[str, Tensor]
    labels: Sequence[int]
    indices: Sequence[int]
    ids: Sequence[str]
    rejected: Sequence[Rejection]


OpenShard = Mapping[str, np.ndarray]
"""The arrays of a shard by the names of its tensors, mapped into memory, not read. bfloat16 is seen as uint16."""


def write_shard(folder: Folder, number: int, shard: Shard, layout: Layout, origin: str) -> Header:
    """Publish a shard and then its sidecar; `origin` is the digest of the plan. Equal content gives equal bytes.

    Raises:
        UserError: the disk is full. Published shards stay intact.
    """
    tensors = {name: tensor.contiguous() for name, tensor in shard.tensors.items()}
    tensors["label"] = torch.tensor(shard.labels, dtype=torch.int64)
    tensors["index"] = torch.tensor(shard.indices, dtype=torch.int64)
    # more than one metadata key would come out in a random order
    metadata = {"ldm_vae": canonical_json({"format_version": FORMAT_VERSION, "origin": origin, "shard": number})}
    data = save(tensors, metadata)
    samples = [Sample(*values) for values in zip(shard.indices, shard.ids, row_checksums(_arrays(tensors)))]
    record = {
        "count": len(samples), "rejected": len(shard.rejected), "first_index": shard.first_index,
        "last_index": shard.last_index, "size_bytes": len(data), "checksum": checksum_bytes(data),
    }  # fmt: skip
    sums = channel_sums([tensors[name] for name in layout.names], layout.summed_channels)
    sidecar, header = sidecar_bytes(origin, number, record, sums, samples, shard.rejected)
    try:
        folder.write(shard_name(number), data)
        folder.write(sidecar_name(number), sidecar)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise no_space(folder) from error
        raise
    return header


def no_space(folder: Folder) -> UserError:
    return UserError(
        f"{folder.location}: no space left on the device; finished shards are intact: "
        "free some space and run the same command again"
    )


def row_checksums(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """xxh3_64 as 16 hex digits of each row's bytes in all tensors, these in the order of their names."""
    import xxhash

    digests = []
    arrays = [np.ascontiguousarray(tensors[name]) for name in sorted(tensors)]
    for row in range(len(arrays[0])):
        digest = xxhash.xxh3_64()
        for array in arrays:
            digest.update(array[row : row + 1].view(np.uint8).data)
        digests.append(digest.hexdigest())
    return digests


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """As numpy arrays, bfloat16 as its bits."""
    return {
        name: (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in tensors.items()
    }


def open_shard(folder: Folder, number: int, record: ShardRecord, layout: Layout, *, verify: bool) -> OpenShard:
    """Map a shard into memory, after comparing its checksum where `verify`, and its header always.

    Raises:
        UserError: missing, damaged, or not the shard that the manifest describes.
    """
    where = f"{folder.location}/{shard_name(number)}"
    try:
        path = folder.local(shard_name(number), record.checksum)
        if verify and (found := checksum(path)) != record.checksum:
            raise UserError(f"{where}: damaged, its checksum is {found} and not {record.checksum}; {MAKE_AGAIN}")
        header, start = read_header(path)
        expected = layout.tensors(record.count)
        tensors = {name: (tensor["dtype"], tensor["shape"]) for name, tensor in header.items()}
        if tensors != expected:
            raise UserError(f"{where}: holds {tensors}, the manifest says {expected}; {MAKE_AGAIN}")
        return map_tensors(path, header, start)
    except (OSError, RuntimeError) as error:  # torch's mapping raises the latter
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        scarce = getattr(error, "errno", None) in SCARCE or isinstance(error, RuntimeError)
        advice = "allow the process more files or memory (ulimit -n, -v)" if scarce else MAKE_AGAIN
        raise UserError(f"{where}: cannot be read ({reason}); {advice}") from error


def map_tensors(path: Path, header: Mapping[str, Any], start: int) -> OpenShard:
    """The tensors of a file whose header was judged by `read_header`, as views of one read-only mapping."""
    # Python's own mmap would keep a file descriptor for each shard, and a process often may have 1,024 of them only
    mapped = torch.from_file(str(path), shared=False, size=os.stat(path).st_size, dtype=torch.uint8).numpy()
    mapped.flags.writeable = False
    arrays = {}
    for name, tensor in header.items():
        kind, items = _NUMPY_DTYPES[tensor["dtype"]], int(np.prod(tensor["shape"], dtype=object))
        values = np.frombuffer(mapped, kind, items, start + tensor["data_offsets"][0]) if items else np.empty(0, kind)
        arrays[name] = values.reshape(tensor["shape"])
    return arrays


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(tensor name -> dtype, shape, data_offsets; where the data begins). Extents are checked against the file.

    Raises:
        UserError: the file is no whole shard.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAXIMUM_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            size_bytes = file.seek(0, 2)
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            items = int(np.prod(tensor["shape"], dtype=object))
            if end - begin != items * np.dtype(_NUMPY_DTYPES[tensor["dtype"]]).itemsize or begin < 0:
                raise ValueError(f"tensor {name!r} does not fit its extent")
            if 8 + length + end > size_bytes:
                raise ValueError("it is cut off")
        return header, 8 + length
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is no whole shard ({error}); {MAKE_AGAIN}") from error
