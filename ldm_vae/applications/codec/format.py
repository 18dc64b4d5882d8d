"""The file of a compressed picture: what its bytes mean, and that they are whole. Specified in docs/how-to/codec.md.

    magic, version, checksum | autoencoder, size, step, channels, kind of entropy model, number of parts
    the entropy model: its fingerprint, or mean, unit and scale of each channel
    of each part: last channel, length, and from the second on a checksum
    the parts

All little-endian. The first checksum is over everything after it up to the end of the first part, so a preview reads
and trusts a prefix. Sizes are checked before memory is allocated. `entropy_models` says what the parts hold.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from ldm_vae.applications.codec.entropy_models import (
    ROLES,
    SCALES,
    ContextModel,
    EntropyModel,
    IntegerNetwork,
    input_count,
    standard_steps,
    static_model,
    weight_count,
)
from ldm_vae.data.decoding import DecodeLimits
from ldm_vae.errors import DamagedFile, UserError
from ldm_vae.files import canonical_json, parsing, read_described_file, write_bytes
from ldm_vae.paths import ENTROPY

MAGIC = b"LDMZ"
FORMAT_VERSION = 1
SUFFIX = ".ldmz"

PREAMBLE = struct.Struct("<4sB8s")
FIXED = struct.Struct("<8sHHHHBB")
CHANNEL = struct.Struct("<eeB")
PART = struct.Struct("<HI")
CHECKSUM_BYTES = FINGERPRINT_BYTES = 8
LARGEST_SIDE = 65535
MOST_PIXELS = DecodeLimits().megapixels * 10**6
MOST_CHANNELS = 1024
MOST_PARTS = 64
SELF_FITTED, FITTED = 0, 1

ADVICE = "fetch it again, or compress the picture again"


@dataclass(frozen=True)
class SelfFitted:
    """What a file says of its own latents: mean, unit and scale row of each channel."""

    mean: np.ndarray
    unit: np.ndarray
    scales: tuple[int, ...]

    @classmethod
    def rounded(cls, mean: np.ndarray, unit: np.ndarray, scales: tuple[int, ...]) -> SelfFitted:
        """With mean and unit as the file will hold them, in half precision."""
        mean = mean.clip(-60000, 60000).astype(np.float16).astype(np.float64)
        unit = unit.clip(1e-4, 60000).astype(np.float16).astype(np.float64)
        return cls(mean, unit, scales)


@dataclass(frozen=True)
class FileHeader:
    """Everything but the data.

    Args:
        autoencoder: first bytes of the fingerprint of what makes the latents.
        width, height: of the picture in pixels.
        step: in 1/1024 units.
        channels: of the latent.
        entropy: the model that stands in the file, or the first bytes of a fitted one's fingerprint.
        parts: the channel that each part ends before.
        lengths: bytes of each part.
        checksums: of the parts from the second on.
    """

    autoencoder: bytes
    width: int
    height: int
    step: int
    channels: int
    entropy: SelfFitted | bytes
    parts: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    checksums: tuple[bytes, ...] = field(default=())


def pack_file(header: FileHeader, data: list[bytes]) -> bytes:
    """The whole file."""
    self_fitted = isinstance(header.entropy, SelfFitted)
    body = FIXED.pack(
        header.autoencoder, header.width, header.height, header.step, header.channels,
        SELF_FITTED if self_fitted else FITTED, len(header.parts),
    )  # fmt: skip
    if isinstance(header.entropy, SelfFitted):
        own = header.entropy
        body += b"".join(CHANNEL.pack(*row) for row in zip(own.mean, own.unit, own.scales, strict=True))
    else:
        body += header.entropy
    for number, (end, piece) in enumerate(zip(header.parts, data, strict=True)):
        body += PART.pack(end, len(piece)) + (part_checksum(piece) if number else b"")
    return PREAMBLE.pack(MAGIC, FORMAT_VERSION, part_checksum(body + data[0])) + body + b"".join(data)


def part_checksum(data: bytes) -> bytes:
    """Eight bytes of xxh3_64."""
    import xxhash

    return xxhash.xxh3_64_digest(data)


class FileReader:
    """Reads a file from its start, remembers what it read, and says so when the file ends early."""

    def __init__(self, file: BinaryIO, size_bytes: int, where: str) -> None:
        self.file, self.left_bytes, self.where = file, size_bytes, where
        self.consumed = b""

    def take(self, count: int) -> bytes:
        if count > self.left_bytes:
            raise UserError(f"{self.where}: is cut off ({count - self.left_bytes} bytes are missing); {ADVICE}")
        data = self.file.read(count)
        if len(data) != count:
            raise UserError(f"{self.where}: is cut off while it is read; {ADVICE}")
        self.left_bytes -= count
        self.consumed += data
        return data

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.where}: is damaged ({what}); {ADVICE}")


def read(file: BinaryIO, size_bytes: int, where: str, channels: int | None = None) -> tuple[FileHeader, list[bytes]]:
    """Header and data of all parts, or of those with the first `channels` channels, of which alone the file is read.

    Raises:
        UserError: it is another kind of file, newer, damaged or cut off; or no part ends at `channels`.
    """
    reader = FileReader(file, size_bytes, where)
    if size_bytes < len(MAGIC) or reader.take(len(MAGIC)) != MAGIC:
        raise UserError(f"{where}: is not a file of `ldm-vae compress`; give one that ends in {SUFFIX}")
    version = reader.take(1)[0]
    if version > FORMAT_VERSION:
        raise UserError(f"{where}: has format version {version}, this program reads {FORMAT_VERSION}; update ldm_vae")
    if version != FORMAT_VERSION:
        raise reader.wrong(f"format version {version}")
    checksum, reader.consumed = reader.take(CHECKSUM_BYTES), b""
    header = _header(reader)
    first = reader.take(header.lengths[0])
    if part_checksum(reader.consumed) != checksum:
        raise reader.wrong("its checksum differs")
    count = _part_count(header, channels, where)
    data = [first]
    for length, expected in zip(header.lengths[1:count], header.checksums):
        reader.consumed = b""
        data.append(reader.take(length))
        if part_checksum(data[-1]) != expected:
            raise reader.wrong("the checksum of a part differs")
    if count == len(header.parts) and reader.left_bytes:
        raise reader.wrong(f"{reader.left_bytes} bytes too many")
    return header, data


def _header(reader: FileReader) -> FileHeader:
    """What stands before the parts. Its sizes are plausible; that they are true, the checksum says."""
    autoencoder, width, height, step, channels, kind, count = FIXED.unpack(reader.take(FIXED.size))
    if not width or not height or not step:
        raise reader.wrong("a size or the step is 0")
    if width * height > MOST_PIXELS:
        raise reader.wrong(f"{width} x {height} pixels are more than {MOST_PIXELS // 10**6} megapixels")
    if not 1 <= channels <= MOST_CHANNELS or not 1 <= count <= min(channels, MOST_PARTS):
        raise reader.wrong(f"{channels} channels in {count} parts")
    entropy: SelfFitted | bytes
    if kind == SELF_FITTED:
        entropy = _self_fitted(reader, channels)
    elif kind == FITTED:
        entropy = reader.take(FINGERPRINT_BYTES)
    else:
        raise reader.wrong(f"an entropy model of kind {kind}")
    parts: list[int] = []
    lengths: list[int] = []
    checksums: list[bytes] = []
    for number in range(count):
        end, length = PART.unpack(reader.take(PART.size))
        if end <= (parts[-1] if parts else 0) or end > channels or length % 4:
            raise reader.wrong("its parts do not follow each other")
        parts.append(end)
        lengths.append(length)
        if number:
            checksums.append(reader.take(CHECKSUM_BYTES))
    if parts[-1] != channels:
        raise reader.wrong("its parts are not all channels")
    return FileHeader(
        autoencoder, width, height, step, channels, entropy, tuple(parts), tuple(lengths), tuple(checksums)
    )  # fmt: skip


def _self_fitted(reader: FileReader, channels: int) -> SelfFitted:
    means, units, scales = zip(*(CHANNEL.unpack(reader.take(CHANNEL.size)) for _ in range(channels)))
    mean, unit = np.array(means), np.array(units)
    if not (np.isfinite(mean).all() and np.isfinite(unit).all() and (unit > 0).all() and max(scales) < SCALES):
        raise reader.wrong("a mean, unit or scale is out of range")
    return SelfFitted(mean, unit, scales)


def _part_count(header: FileHeader, channels: int | None, where: str) -> int:
    """How many parts hold the first `channels` channels."""
    if channels is None:
        return len(header.parts)
    if channels not in header.parts:
        there = ", ".join(map(str, header.parts))
        raise UserError(
            f"{where}: cannot be decoded from {channels} channels alone, only from {there}; compress with "
            "--progressive for more, which pays with an autoencoder of nested channels"
        )
    return header.parts.index(channels) + 1


# An entropy model that was fitted to a set of latents: what it holds, and its safetensors file.

EntropyKind = Literal["static", "context"]

MODEL_FORMAT_VERSION = 1
METADATA = "codec"
MOST_BYTES = 64 << 20
LARGEST_INTEGER = 1 << 31
"""Bound of a ratio or scale: times step and level it stays below 2**63."""
MODEL_ADVICE = "restore it from a copy, or fit it again with `ldm-vae codec fit`"


@dataclass(frozen=True)
class FittedModel:
    """Statistics of a set, and for kind "context" the networks.

    Args:
        autoencoder: `identity` of the autoencoder, `sha256:HEX`.
        mean, unit: of each channel, (c,) float64; see `quantization.Grid`.
        ratios: units per standard deviation of the set, 16 fractional bits, (c,).
        scales: of a logistic distribution of the levels, in standard deviations, 16 fractional bits, (c,).
        weights: by (channel, role), int16; see `integer_network`.
    """

    kind: EntropyKind
    autoencoder: str
    mean: np.ndarray
    unit: np.ndarray
    ratios: tuple[int, ...]
    scales: tuple[int, ...]
    weights: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        return len(self.ratios)

    @cached_property
    def networks(self) -> dict[tuple[int, int], IntegerNetwork]:
        return {key: IntegerNetwork.from_flat(flat, input_count(*key)) for key, flat in self.weights.items()}

    def at(self, step: int) -> EntropyModel:
        """The model for a step in 1/1024 units."""
        if self.kind == "static":
            return static_model(step, self.ratios, self.scales)
        return ContextModel(standard_steps(step, self.ratios), self.networks)

    @cached_property
    def fingerprint(self) -> str:
        """`sha256:HEX` over everything."""
        digest = hashlib.sha256(canonical_json(self._record()).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name}{array.shape}{array.dtype.str}".encode())
            digest.update(array.tobytes())
        return f"sha256:{digest.hexdigest()}"

    @property
    def short_fingerprint(self) -> bytes:
        """As compressed pictures name it."""
        return short_fingerprint(self.fingerprint)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        from safetensors.numpy import save

        metadata = {METADATA: canonical_json(self._record() | {"fingerprint": self.fingerprint})}
        write_bytes(path, save(self._arrays(), metadata))

    def _record(self) -> dict[str, Any]:
        return {
            "format_version": MODEL_FORMAT_VERSION,
            "kind": self.kind,
            "autoencoder": self.autoencoder,
            "channels": self.channels,
        }

    def _arrays(self) -> dict[str, np.ndarray]:
        numbers = {"ratios": self.ratios, "scales": self.scales}
        return {
            "mean": self.mean.astype("<f8"),
            "unit": self.unit.astype("<f8"),
            **{name: np.array(values, "<i8") for name, values in numbers.items()},
            **{f"network.{channel}.{role}": flat.astype("<i2") for (channel, role), flat in self.weights.items()},
        }


def short_fingerprint(fingerprint: str) -> bytes:
    """The first bytes of a `sha256:HEX`."""
    return bytes.fromhex(fingerprint.removeprefix("sha256:"))[:FINGERPRINT_BYTES]


def load_model(path: str | Path) -> FittedModel:
    """The model in a file of `ldm-vae codec fit`. Raises: UserError when it is not such a file, damaged or newer."""
    ENTROPY.find(path, "entropy")
    with parsing(path, MODEL_ADVICE):
        record, arrays = read_described_file(Path(path), METADATA, MODEL_FORMAT_VERSION, MOST_BYTES, "np")
        model = _model(record, arrays)
        if record != model._record() | {"fingerprint": model.fingerprint}:
            raise DamagedFile(path, "is damaged (its record or checksum differs)", MODEL_ADVICE)
    return model


def _model(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> FittedModel:
    """Raises: ValueError or KeyError for what cannot be."""
    kind, channels = record["kind"], record["channels"]
    if kind not in ("static", "context") or not isinstance(channels, int) or not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(f"kind {kind!r} of {channels} channels")
    weights = {}
    if kind == "context":
        for channel in range(channels):
            for role in range(ROLES):
                flat = arrays[f"network.{channel}.{role}"]
                if flat.dtype != np.int16 or flat.shape != (weight_count(input_count(channel, role)),):
                    raise ValueError(f"network {channel}.{role} of shape {flat.shape}")
                weights[channel, role] = flat
    for name, dtype in (("mean", np.float64), ("unit", np.float64), ("ratios", np.int64), ("scales", np.int64)):
        found = arrays[name]
        if found.shape != (channels,) or found.dtype != dtype or not np.isfinite(found).all():
            raise ValueError(f"{name} of shape {found.shape}")
        if name != "mean" and not ((found > 0) & (found < LARGEST_INTEGER)).all():
            raise ValueError(f"{name} out of range")
    if len(arrays) != 4 + len(weights):
        raise ValueError("tensors that do not belong to it")
    ratios, scales = (tuple(map(int, arrays[name])) for name in ("ratios", "scales"))
    return FittedModel(kind, str(record["autoencoder"]), arrays["mean"], arrays["unit"], ratios, scales, weights)
