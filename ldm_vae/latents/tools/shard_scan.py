"""What a shard's file turns out to hold: read once, in blocks, whatever its size, and whatever has become of it.

Measures and judges nothing: what it should have been is the question of `shard_check`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ldm_vae.latents.contents import STORED_DTYPES, Layout
from ldm_vae.latents.index import ALGORITHM
from ldm_vae.latents.shard import MAXIMUM_HEADER_BYTES
from ldm_vae.latents.statistics import ROWS, channel_sums
from ldm_vae.storage import Folder
from ldm_vae.storage.local import LocalFolder
from ldm_vae.storage.remote import RemoteFolder

BLOCK_BYTES = 1 << 20
QUICK_BYTES = 1 << 13


@dataclass
class Scan:
    """What a file turned out to hold. `tensors`, `origin`, `shard` from its header; None where it cannot be read."""

    size_bytes: int = 0
    checksum: str = ""
    tensors: dict[str, Any] | None = None
    origin: str | None = None
    shard: int | None = None
    labels: np.ndarray | None = None
    indices: np.ndarray | None = None
    sums: np.ndarray | None = None
    improper: list[int] = field(default_factory=list)


def scan_shard(folder: Folder, name: str, layout: Layout | None, codes: int | None) -> Scan:
    """Read a shard once. `layout`: None where it is not known; `codes`: size of the codebook. Raises: OSError."""
    import xxhash

    scan, stream = Scan(), Stream(blocks(folder, name), xxhash.xxh3_128())
    _read_header(stream.take, scan)
    if scan.tensors is not None and layout is not None:
        count, extents = row_count(scan.tensors, layout), extents_of(scan.tensors)
        if count is not None:
            _scan_tensors(stream, extents, count, layout, codes, scan)
    stream.drain()
    scan.size_bytes, scan.checksum = stream.size_bytes, ALGORITHM + stream.digest.hexdigest()
    return scan


def _scan_tensors(
    stream: Stream, extents: Sequence[tuple[str, int, int]], count: int, layout: Layout, codes: int | None, scan: Scan
) -> None:
    channels = layout.summed_channels
    sums, improper = np.zeros((len(ROWS), channels)), set()
    for name, begin, end in extents:
        if name in ("index", "label"):
            data = stream.take(end - begin)
            if len(data) == 8 * count:
                values = np.array(bytearray(data), np.uint8).view(np.int64)
                scan.labels, scan.indices = (values, scan.indices) if name == "label" else (scan.labels, values)
            continue
        row_bytes = (end - begin) // count if count else 0
        rows = max(1, BLOCK_BYTES // max(1, row_bytes))
        for first in range(0, count, rows):
            wanted = min(rows, count - first)
            data = stream.take(wanted * row_bytes)
            if len(data) < wanted * row_bytes:
                return
            found, bad = _measure(data, wanted, layout, codes)
            sums += found
            improper.update((first + bad).tolist())
    scan.sums, scan.improper = sums, sorted(improper)


def _measure(data: bytes, rows: int, layout: Layout, codes: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(sums (3, c), numbers of the rows that hold what cannot be) of the bytes of these rows."""
    if layout.content == "indices":
        found = np.frombuffer(data, layout.dtype).reshape(rows, -1)
        highest = np.iinfo(found.dtype).max if codes is None else codes - 1
        return np.zeros((len(ROWS), 0)), np.flatnonzero(((found < 0) | (found > highest)).any(1))
    values = torch.frombuffer(bytearray(data), dtype=STORED_DTYPES[layout.dtype]).view(rows, *layout.sample_shape)
    with np.errstate(all="ignore"):
        sums = channel_sums([values], layout.latent_shape[0])
    if np.isfinite(sums).all():
        return sums, np.empty(0, np.int64)
    bad = ~values.float().isfinite().flatten(1).all(1)
    return sums, bad.nonzero()[:, 0].numpy()


def scan_header(folder: Folder, name: str, size_bytes: int) -> Scan:
    """What the first bytes of a shard say. Raises: OSError."""
    scan, data = Scan(size_bytes), folder.read(name, QUICK_BYTES)
    length = int.from_bytes(data[:8], "little")
    if len(data) - 8 < length <= min(MAXIMUM_HEADER_BYTES, size_bytes):
        data = folder.read(name, 8 + length)
    _read_header(Stream(iter([data]), None).take, scan)
    return scan


def _read_header(take: Callable[[int], bytes], scan: Scan) -> None:
    """Fill in what a safetensors header says, as far as it can be read."""
    length = int.from_bytes(take(8), "little")
    if length > MAXIMUM_HEADER_BYTES:
        return
    try:
        header = json.loads(take(length))
        metadata = json.loads(header.pop("__metadata__")["ldm_vae"])
        scan.origin, scan.shard = str(metadata["origin"]), int(metadata["shard"])
        extents_of(header), kinds(header)
        scan.tensors = header
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


def row_count(tensors: dict[str, Any], layout: Layout) -> int | None:
    """How many samples a header describes; None where it is not the header of a shard of this layout."""
    shape = tensors.get("index", {}).get("shape")
    if not isinstance(shape, list) or len(shape) != 1 or kinds(tensors) != layout.tensors(shape[0]):
        return None
    extents, usual = extents_of(tensors), usual_extents(layout, shape[0])
    sizes = {name: end - begin for name, begin, end in extents}
    begins, ends = [begin for _, begin, _ in extents], [end for _, _, end in extents]
    right = sizes == {name: end - begin for name, begin, end in usual} and begins == [0, *ends[:-1]]
    return shape[0] if right else None


def kinds(tensors: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    return {name: (tensor["dtype"], tensor["shape"]) for name, tensor in tensors.items()}


def extents_of(tensors: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(name, begin, end) in the order of the bytes."""
    extents = [(name, *map(int, tensor["data_offsets"])) for name, tensor in tensors.items()]
    return sorted(extents, key=lambda extent: extent[1:])  # type: ignore[return-value, arg-type]


def usual_extents(layout: Layout, count: int) -> list[tuple[str, int, int]]:
    """Of a shard whose header cannot be read: safetensors puts wide types first, and then goes by name."""
    extents, begin = [], 0
    for name in ("index", "label", *layout.names):
        end = begin + count * (8 if name in ("index", "label") else layout.sample_bytes // len(layout.names))
        extents.append((name, begin, end))
        begin = end
    return extents


class Stream:
    """Bytes in order, in pieces of any size; all of them go through `digest`."""

    def __init__(self, source: Iterator[bytes], digest: Any) -> None:
        self.source, self.digest, self.size_bytes = source, digest, 0
        self._rest = memoryview(b"")

    def take(self, length: int) -> bytes:
        """The next `length` bytes, or what is left."""
        pieces = []
        while length:
            if not self._rest:
                self._rest = memoryview(self._next())
                if not self._rest:
                    break
            pieces.append(self._rest[:length])
            self._rest = self._rest[length:]
            length -= len(pieces[-1])
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def drain(self) -> None:
        while self._next():
            pass

    def _next(self) -> bytes:
        block = next(self.source, b"")
        self.size_bytes += len(block)
        if self.digest is not None:
            self.digest.update(block)
        return block


def blocks(folder: Folder, name: str) -> Iterator[bytes]:
    """A file's bytes in order, each read once. Raises: OSError; UserError where the store cannot be reached."""
    if isinstance(folder, RemoteFolder):
        yield from folder.connection.blocks(name)
        return
    assert isinstance(folder, LocalFolder)
    with open(folder.path / name, "rb") as file:  # not mapped: a sector that cannot be read would kill the process
        while block := file.read(BLOCK_BYTES):
            yield block
