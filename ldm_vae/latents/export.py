"""`ldm-vae latents export`: a set as parquet for `datasets`, or as tar files for `webdataset`.

`export.json` goes first and says what the export is; the data files follow, each complete or absent, and
`manifest.json`, a copy of the set's own, goes last. So the same command continues an interrupted export.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ldm_vae.config import changed_keys, check_positive, digest
from ldm_vae.errors import DISK_FULL, UserError
from ldm_vae.files import canonical_json, readable_json
from ldm_vae.latents.format import FLIPPED, MANIFEST, Layout, Manifest, open_set_folder, read_ids, read_manifest, short
from ldm_vae.latents.normalizer import combine
from ldm_vae.latents.shard import OpenShard, open_shard
from ldm_vae.random import generator
from ldm_vae.storage import open_folder
from ldm_vae.storage.base import Folder, is_url
from ldm_vae.utils.progress import Progress, begin, end, end_dry_run, say
from ldm_vae.utils.text import duration_text, pluralize

EXPORT = "export.json"
CARD = "README.md"
LOCK = "export.lock"
FILE_BYTES = 200_000_000
"""Approximate size of a data file if `rows` is not given. The file is made in memory."""
BLOCK_BYTES = 1 << 25
"""Bytes that are read at a time; a row group in parquet."""


@dataclass(frozen=True)
class ExportConfig:
    """`ldm-vae latents export`.

    The same command continues an interrupted export. Shards are compared with their checksums.
    docs/reference/latent-exchange.md shows how to read the result.

      ldm-vae latents export latents/mine exported/mine to=parquet
      ldm-vae latents export latents/mine s3://bucket/mine to=webdataset posterior=mean

    Args:
        latents: the folder of a finished set, or its URL.
        output: the folder to make, or its URL.
        to: `parquet` for `datasets`, `webdataset` for tar files.
        posterior: form of stored moments in the export: `moments` (as stored), `mean` or `sample`; null: as stored.
        rows: samples per file; null: about 200 MB per file.
    """

    latents: str = "???"
    output: str = "???"
    to: Literal["parquet", "webdataset"] = "???"  # type: ignore[assignment]
    posterior: Literal["moments", "mean", "sample"] | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "rows")


def export_latents(config: ExportConfig, *, dry_run: bool = False) -> Export:
    """Write a set's samples to a new folder, or continue an interrupted export. Each shard's checksum is compared.

    Memory: one data file and one block.

    Args:
        dry_run: compare with the folder's content and make one block in memory; write nothing.

    Raises:
        UserError: no finished set, a damaged shard, an output that holds other files, or no space left.
    """
    export = plan_export(read_manifest(open_set_folder(config.latents)), config)
    folder = open_folder(config.output)
    _refuse_others(folder, export)
    layout, manifest = export.layout, export.manifest
    dtype = layout.dtype + (" (bfloat16 in the set)" if layout.dtype != manifest.dtype else "")
    samples, files = pluralize(manifest.count, "sample"), pluralize(len(export.files), "file")
    stored = f"{', '.join(layout.names)} in {dtype}"
    begin("latents export", f"{samples} of {config.latents}", stored, f"{files} of {config.to}", f"to {config.output}")
    if dry_run:
        end_dry_run(config.output, _expected(export))
        return export
    if {MANIFEST, *export.files} <= folder.sizes().keys():
        say(f"{config.output}: exported already")
    else:
        try:
            _write_files(folder, export)
        except OSError as error:
            if error.errno in DISK_FULL:
                instead = "free some space and run the same command again; finished files are kept"
                raise UserError(config.output, "no space left on the device", instead) from error
            raise
    end(config.output, f"{samples} in {files}; {stored}", _reading_words(export, config.output))
    return export


def _expected(export: Export) -> str:
    """The time of the export, from making the first block in memory."""
    started, samples = time.monotonic(), ExportedSamples(export)
    block = next(samples.blocks(0, min(export.rows, export.manifest.count)))
    export.write([block])
    seconds = (time.monotonic() - started) * export.manifest.count / len(block)
    return f"about {duration_text(seconds)}, without the time of the disk"


def _reading_words(export: Export, output: str) -> list[str]:
    """The words of a command that shows the first sample; none for a URL."""
    if is_url(output):
        return []
    kind, file = json.dumps(export.to), json.dumps(str(Path(output) / export.files[0]))
    code = f'from datasets import load_dataset; print(load_dataset({kind}, data_files={file}, split="train"))'
    return ["python", "-c", code]


@dataclass(frozen=True)
class Export:
    """The plan of an export.

    Attributes:
        to: `parquet` or `webdataset`.
        layout: tensors of the exported samples.
        rows: samples per file; the last file may have fewer.
    """

    manifest: Manifest
    to: str
    layout: Layout
    rows: int

    @property
    def files(self) -> list[str]:
        """Names of the data files."""
        return FORMATS[self.to].names(-(-self.manifest.count // self.rows))

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Statistics of the exported values: means have a smaller spread than the samples in the manifest."""
        manifest = self.manifest
        if self.layout.content == manifest.content or self.layout.content != "mean":
            return manifest.statistics
        sums = manifest.shard_index.sums.copy()
        sums[:, 2] = 0
        latents = manifest.count * len(self.layout.names)
        return combine(sums, latents, latents * self.layout.latent_shape[1] * self.layout.latent_shape[2])

    def to_dict(self) -> dict[str, Any]:
        """The content of export.json."""
        manifest, layout = self.manifest, self.layout
        shape = list(layout.sample_shape)
        values = {
            "format": self.to,
            "count": manifest.count,
            "rows": self.rows,
            "files": len(self.files),
            "content": layout.content,
            "tensors": {name: {"dtype": layout.dtype, "shape": shape} for name in layout.names},
            "latent_shape": list(layout.latent_shape),
            "label_names": list(manifest.label_names),
            "statistics": self.statistics,
            "autoencoder": manifest.autoencoder,
            "preprocessing": manifest.preprocessing,
            "set": digest(manifest.to_dict()),
        }
        return json.loads(json.dumps(values))

    def write(self, blocks: Iterable[Block]) -> bytes:
        """A data file."""
        return FORMATS[self.to].write(blocks, self.layout, self.manifest.label_names)


def plan_export(manifest: Manifest, config: ExportConfig) -> Export:
    """The plan for an export of a set.

    bfloat16 becomes float32, which holds each of its values, since Arrow and numpy do not support bfloat16.

    Raises:
        UserError: the set does not hold the moments that `posterior` needs.
    """
    content = config.posterior or manifest.content
    if content != manifest.content and manifest.content != "moments":
        what = f"posterior={config.posterior} needs stored moments, this set holds {manifest.content}"
        raise UserError(manifest.where.location, what, "leave posterior out, or encode with store=moments")
    dtype = "float32" if manifest.dtype == "bfloat16" else manifest.dtype
    layout = Layout(content, dtype, manifest.latent_shape, manifest.flipped)
    return Export(manifest, config.to, layout, config.rows or max(1, FILE_BYTES // layout.sample_bytes))


def _write_files(folder: Folder, export: Export) -> None:
    manifest = export.manifest
    with folder.lock(LOCK):
        folder.clean()
        if not folder.exists(EXPORT):
            folder.write(EXPORT, readable_json(export.to_dict()).encode())
        there, samples = folder.sizes(), ExportedSamples(export)
        with Progress("export", manifest.count, "sample") as bar:
            for number, name in enumerate(export.files):
                start, stop = number * export.rows, min((number + 1) * export.rows, manifest.count)
                if name not in there:
                    folder.write(name, export.write(samples.blocks(start, stop)))
                bar.advance(stop - start)
        folder.write(CARD, _card(export).encode())
        folder.write(MANIFEST, manifest.where.read(MANIFEST))


def _refuse_others(folder: Folder, export: Export) -> None:
    """Raises: UserError unless the folder is empty or holds the same export."""
    there = sorted(name for name in folder.sizes() if name != LOCK)
    if not there:
        return
    where = folder.location
    if EXPORT not in there:
        what = f"holds {there[0]} and not an export that could be continued"
        raise UserError(where, what, "give another output")
    try:
        found = json.loads(folder.read(EXPORT))
    except ValueError as error:
        raise UserError(f"{where}/{EXPORT}", f"cannot be read ({error})", "give another output") from error
    changes = changed_keys(found, export.to_dict())
    for key, (old, new) in changes.items():
        what = f"holds another export, its {key} is {short(old)} and not {short(new)}"
        raise UserError(where, what, "give another output")


# The samples, block by block.


@dataclass(frozen=True)
class Block:
    """Samples in the order of the set. Row j of every array and list is one sample.

    Attributes:
        tensors: name -> array of the exported dtype, with the names of the exported `Layout`.
        labels, indices: int64; -1 for no label, the place in the image source.
    """

    tensors: Mapping[str, np.ndarray]
    labels: np.ndarray
    indices: np.ndarray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)


class ExportedSamples:
    """The samples of a set in their exported form, by number. One verified shard is open at a time."""

    def __init__(self, export: Export) -> None:
        self.manifest, self.layout = export.manifest, export.layout
        self.index = self.manifest.shard_index
        self._ends = np.cumsum(self.index.counts)
        self._number = -1
        self._shard: OpenShard = {}
        self._ids: list[str] = []

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """Blocks of the samples from `start` to `stop` (exclusive), of at most 32 MB."""
        most = max(1, BLOCK_BYTES // self.layout.sample_bytes)
        while start < stop:
            number = int(np.searchsorted(self._ends, start, side="right"))
            self._open(number)
            end = min(stop, start + most, int(self._ends[number]))
            first = int(self._ends[number] - self.index.counts[number])
            yield self._block(slice(start - first, end - first))
            start = end

    def _open(self, number: int) -> None:
        if number == self._number:
            return
        where, record = self.manifest.where, self.index[number]
        self._shard = open_shard(where, number, record, self.manifest.layout, verify=True)
        self._ids, self._number = read_ids(where, number, record), number

    def _block(self, rows: slice) -> Block:
        indices = self._shard["index"][rows]
        tensors = {}
        for name in self.layout.names:
            stored = self._shard[self.manifest.content + (FLIPPED if name.endswith(FLIPPED) else "")][rows]
            values = _widened(stored) if self.manifest.dtype == "bfloat16" else stored
            tensors[name] = np.ascontiguousarray(self._posterior(name, values, indices))
        return Block(tensors, self._shard["label"][rows], indices, self._ids[rows])

    def _posterior(self, name: str, values: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """The exported form of stored values (n, ...). The noise is a function of the name and the source index."""
        if self.layout.content == self.manifest.content:
            return values
        channels = self.layout.latent_shape[0]
        if self.layout.content == "mean":
            return values[:, :channels]
        moments = torch.from_numpy(values.astype(np.float32))
        noise = [
            torch.randn(self.layout.latent_shape, generator=generator(0, "exported sample", name, int(index)))
            for index in indices
        ]
        latents = moments[:, :channels] + torch.exp(0.5 * moments[:, channels:]) * torch.stack(noise)
        found = latents.numpy().astype(self.layout.dtype)
        bad = ~np.isfinite(found).reshape(len(found), -1).all(1)
        if bad.any():
            raise UserError(
                f"{self.manifest.where.location}: the sample of source index {indices[bad.argmax()]} is not finite in "
                f"{self.layout.dtype}; export the moments or the mean instead"
            )
        return found


def _widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 given as uint16 -> the same numbers in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# The two formats.


def _write_parquet(blocks: Iterable[Block], layout: Layout, label_names: Sequence[str]) -> bytes:
    """A row group for each block, with features for `datasets`. Not compressed, since latents hardly compress."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = _features(layout, label_names).arrow_schema
    file = io.BytesIO()
    columns = ["id", "index", "label"]
    with parquet.ParquetWriter(
        file, schema, compression="none", use_dictionary=False, write_statistics=columns
    ) as writer:
        for block in blocks:
            plain = [pa.array(block.ids, pa.string()), pa.array(block.indices), pa.array(block.labels)]
            tensors = [
                pa.ExtensionArray.from_storage(schema.field(name).type, _nested(block.tensors[name]))
                for name in layout.names
            ]
            writer.write_table(pa.Table.from_arrays([*plain, *tensors], schema=schema), row_group_size=len(block))
    return file.getvalue()


def _features(layout: Layout, label_names: Sequence[str]) -> Any:
    """The columns, as `datasets.Features`."""
    from datasets import Array2D, Array3D, ClassLabel, Features, Value

    shape = layout.sample_shape
    tensor = (Array2D if len(shape) == 2 else Array3D)(shape, layout.dtype)
    label = ClassLabel(names=list(label_names)) if label_names else Value("int64")
    columns = {"id": Value("string"), "index": Value("int64"), "label": label}
    return Features(columns | dict.fromkeys(layout.names, tensor))


def _nested(array: np.ndarray) -> Any:
    """An array (n, ...) as nested lists, as `datasets` stores it; the numbers are not copied."""
    import pyarrow as pa

    values = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        values = pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, size, dtype=np.int32)), values)
    return values


def _write_tar(blocks: Iterable[Block], layout: Layout, label_names: Sequence[str]) -> bytes:
    """For each sample `KEY.moments.npy` (one for each tensor), `KEY.cls` and `KEY.json`.

    KEY is the source index: ids, which may hold dots and slashes, are in the JSON. Equal samples give equal bytes:
    members have no time and no owner.
    """
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for block in blocks:
            for row in range(len(block)):
                for name, data in _members(block, row, label_names):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _members(block: Block, row: int, label_names: Sequence[str]) -> list[tuple[str, bytes]]:
    """(name, bytes) of the files of one sample, sorted by name."""
    index, label = int(block.indices[row]), int(block.labels[row])
    facts: dict[str, Any] = {"id": block.ids[row], "index": index, "label": label}
    if 0 <= label < len(label_names):
        facts["label_name"] = label_names[label]
    found = {"cls": str(label).encode(), "json": canonical_json(facts).encode()}
    for name, values in block.tensors.items():
        array = io.BytesIO()
        np.save(array, values[row], allow_pickle=False)
        found[f"{name}.npy"] = array.getvalue()
    return [(f"{index:012d}.{name}", found[name]) for name in sorted(found)]


@dataclass(frozen=True)
class Format:
    """A file format. `names(n)`: names of n data files; `write(blocks, layout, label_names)`: the bytes of one."""

    names: Callable[[int], list[str]]
    write: Callable[[Iterable[Block], Layout, Sequence[str]], bytes]


FORMATS = {
    "parquet": Format(lambda n: [f"train-{number:05d}-of-{n:05d}.parquet" for number in range(n)], _write_parquet),
    "webdataset": Format(lambda n: [f"{number:06d}.tar" for number in range(n)], _write_tar),
}


# The dataset card.


def _card(export: Export) -> str:
    """The dataset card: the front matter from which `datasets` loads the folder, and a summary of the manifest."""
    manifest, facts = export.manifest, export.to_dict()
    pattern = "*" + Path(export.files[0]).suffix
    statistics, dtype = facts["statistics"], export.layout.dtype
    shape = "x".join(map(str, export.layout.sample_shape))
    lines = [
        *("---", "configs:", "- config_name: default", "  data_files:"),
        *("  - split: train", f'    path: "{pattern}"', "---", ""),
        f"# Latents of {manifest.count} images",
        "",
        f"Exported from latent shards of `ldm_vae`. `{EXPORT}` holds these facts, `{MANIFEST}` is that of the set.",
        "",
        "| | |",
        "|---|---|",
        f"| tensors | {', '.join(f'`{name}`' for name in export.layout.names)}: {shape}, {dtype}, unscaled |",
        f"| latent | {'x'.join(map(str, export.layout.latent_shape))} (channels, height, width) |",
        f"| autoencoder | `{manifest.autoencoder['class']}`, fingerprint `{manifest.autoencoder['fingerprint']}` |",
        f"| its encoder | `{manifest.autoencoder['encoder_fingerprint']}` |",
        f"| preprocessing | {', '.join(f'{key}: {value}' for key, value in manifest.preprocessing.items())} |",
        f"| images | {manifest.count}, and {manifest.rejected} left out because they could not be read |",
        f"| classes | {len(manifest.label_names)} |",
        *(f"| {name} | {value} |" for name, value in statistics.items()),
        "",
        *_advice(export),
        "",
    ]
    return "\n".join(lines)


def _advice(export: Export) -> list[str]:
    if export.layout.content == "indices":
        return ["Decode the codes with the autoencoder of this fingerprint and no other."]
    return [
        "Before training subtract the mean and divide by the std of each channel; undo it before decoding.",
        "Decode with the autoencoder of this fingerprint and no other.",
    ]
