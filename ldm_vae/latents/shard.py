"""The bytes of one shard: the latents of a fixed range of source indices, published atomically.

    shard-000000.safetensors   the tensors that `format.Layout` names, one row for each sample, and
                               label (n) int64, -1 for none; index (n) int64, the place in the source

n is below the length of the range if images could not be read. The sidecar beside it names the samples and the rejected
images.
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

from ldm_vae.errors import DISK_FULL, DamagedFile, UserError
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
        tensors: those in `Layout.names`.
        rejected: unreadable images of the range.
    """

    first_index: int
    last_index: int
    tensors: Mapping[str, Tensor]
    labels: Sequence[int]
    indices: Sequence[int]
    ids: Sequence[str]
    rejected: Sequence[Rejection]


OpenShard = Mapping[str, np.ndarray]
"""Tensor name -> memory-mapped array. bfloat16 appears as uint16."""


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
    instead = "finished shards are intact: free some space and run the same command again"
    return UserError(folder.location, "no space left on the device", instead)


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
    """As numpy arrays; bfloat16 as uint16."""
    return {
        name: (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in tensors.items()
    }


def open_shard(folder: Folder, number: int, record: ShardRecord, layout: Layout, *, verify: bool) -> OpenShard:
    """Map a shard into memory, after comparing its header and, with `verify`, its checksum.

    Raises:
        UserError: missing, damaged, or another shard than in the manifest.
    """
    where = f"{folder.location}/{shard_name(number)}"
    try:
        path = folder.local(shard_name(number), record.checksum)
        if verify and (found := checksum(path)) != record.checksum:
            what = f"damaged, its checksum is {found} and not {record.checksum}"
            raise DamagedFile(where, what, MAKE_AGAIN)
        header, start = _read_header(path)
        expected, tensors = layout.tensors(record.count), kinds(header)
        if tensors != expected:
            raise UserError(where, f"holds {tensors}, the manifest says {expected}", MAKE_AGAIN)
        # Python's own mmap would keep a file descriptor for each shard, and 1,024 per process is a usual limit
        mapped = torch.from_file(str(path), shared=False, size=os.stat(path).st_size, dtype=torch.uint8).numpy()
        mapped.flags.writeable = False
        return arrays_in(mapped, header, start)
    except (OSError, RuntimeError) as error:  # torch's mapping raises RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        scarce = getattr(error, "errno", None) in SCARCE or isinstance(error, RuntimeError)
        advice = "allow the process more files or memory (ulimit -n, -v)" if scarce else MAKE_AGAIN
        raise UserError(where, f"cannot be read ({reason})", advice) from error


def arrays_in(data: np.ndarray | bytes, header: Mapping[str, Any], start: int) -> dict[str, np.ndarray]:
    """Views of a shard's tensors in its bytes. `header`, `start`: see `parse_header`. Raises: ValueError if cut off."""
    arrays = {}
    for name, tensor in header.items():
        kind, items = _NUMPY_DTYPES[tensor["dtype"]], int(np.prod(tensor["shape"], dtype=object))
        values = np.frombuffer(data, kind, items, start + tensor["data_offsets"][0]) if items else np.empty(0, kind)
        arrays[name] = values.reshape(tensor["shape"])
    return arrays


def kinds(header: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype, shape), as in `Layout.tensors`."""
    return {name: (tensor["dtype"], tensor["shape"]) for name, tensor in header.items()}


def parse_header(data: bytes) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The safetensors header at the beginning of a shard's bytes.

    Returns: (tensor name -> dtype, shape, data_offsets; the recorded `origin` and `shard`; offset of the data)

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is not the header of a shard.
    """
    length = int.from_bytes(data[:8], "little")
    if length > MAXIMUM_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header.pop("__metadata__", {}).get("ldm_vae", "{}"))
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        items = int(np.prod(tensor["shape"], dtype=object))
        if end - begin != items * np.dtype(_NUMPY_DTYPES[tensor["dtype"]]).itemsize or begin < 0:
            raise ValueError(f"tensor {name!r} does not fit its extent")
    return header, metadata, 8 + length


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """`parse_header` of a file. Raises: UserError if it is not a complete shard."""
    try:
        with open(path, "rb") as file:
            first = file.read(8)
            length = min(int.from_bytes(first, "little"), MAXIMUM_HEADER_BYTES + 1)
            header, _, start = parse_header(first + file.read(length))
            size_bytes = file.seek(0, 2)
        if any(start + tensor["data_offsets"][1] > size_bytes for tensor in header.values()):
            raise ValueError("it is cut off")
        return header, start
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(path, f"is not a whole shard ({error})", MAKE_AGAIN) from error
