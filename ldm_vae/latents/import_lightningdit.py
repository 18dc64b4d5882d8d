"""`ldm-vae latents import`: make a set from latents in the layout of LightningDiT's `extract_features.py`.

    latents_rank00_shard000.safetensors   latents (n, c, h, w) float32, latents_flip the same for the mirrored images,
                                          labels (n) int64; about 10,000 rows per file, numbered by rank and shard
    latents_stats.pt                      {"mean", "std"} (1, c, 1, 1) float32, from up to 10,000 random rows of latents

Latents are posterior samples, drawn once, unscaled; the trainer normalizes them. These files do not record the
autoencoder, the resolution and the images. The user gives them, and the set records them as asserted.
Source: hustvl/LightningDiT on GitHub, extract_features.py and datasets/img_latent_dataset.py.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm_vae import provenance
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.weights import describe_architecture
from ldm_vae.config import check_positive
from ldm_vae.data.sources import hash_items
from ldm_vae.errors import UserError
from ldm_vae.files import check_tensor_file, checksum, readable_json
from ldm_vae.latents.encode import parse_sizes, summary
from ldm_vae.latents.format import (
    FLIPPED,
    LATENT_DTYPES,
    SAFETENSORS_DTYPES,
    Manifest,
    Origin,
    plan_name,
    planned_shards,
    write_plan,
)
from ldm_vae.latents.shard import Shard, write_shard
from ldm_vae.latents.state import IMPORTED, read_state
from ldm_vae.latents.verify import verify
from ldm_vae.latents.writer import Output
from ldm_vae.storage.base import is_url, local_path
from ldm_vae.utils.progress import BYTE, Progress, begin, beside, end, end_dry_run, say
from ldm_vae.utils.text import pluralize

STATISTICS = "latents_stats.pt"
FILE_NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
DTYPES = {SAFETENSORS_DTYPES[name]: name for name in LATENT_DTYPES}
TENSORS = ("latents", "latents_flip", "labels")
FARTHEST = 0.1
"""Largest difference of the file's statistics from the measured ones: of the mean in stds, and of the std relative to
it. The file's are from a random part of the rows, for which a few hundredths are usual."""


@dataclass(frozen=True)
class ImportConfig:
    """`ldm-vae latents import`.

    The source is a local folder in the layout of LightningDiT's extract_features.py
    (latents_rank00_shard000.safetensors ...). These files do not record which autoencoder made them, so the set records
    the one that you give, as asserted. Channels and size are checked, and latents_stats.pt is compared with the data.
    The same command continues an interrupted import, and makes damaged shards again. Afterwards, view some samples
    with `ldm-vae latents decode`: only pictures show whether the autoencoder is the right one.

      ldm-vae latents import vavae_f16d32/imagenet_train_256 latents/imagenet autoencoder=models/vavae

    Args:
        source: the local folder with the files.
        output: the folder to make for the set, or its URL.
        autoencoder: the autoencoder that made the latents: a diffusers directory, a run of `train-vae`, or a hub id.
            This cannot be checked.
        resolution: size of the images in pixels: the side of square images, or HEIGHTxWIDTH.
        labels: a text file with the name of each class on a line; null: class numbers are used as names.
        dtype: precision of the stored values; null: as in the source.
        shard_size: rows per shard.
        layout: layout of the source; only one is supported.
    """

    source: str = "???"
    output: str = "???"
    autoencoder: str = "???"
    resolution: str = "256"
    labels: str | None = None
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    shard_size: int = 256
    layout: Literal["lightningdit"] = "lightningdit"

    def __post_init__(self) -> None:
        check_positive(self, "shard_size")
        if len(parse_sizes(self.resolution)) > 1:
            raise UserError(
                f"resolution: {self.resolution} are several sizes; give the one of the latents in the folder"
            )


def import_latents(config: ImportConfig, *, dry_run: bool = False) -> Manifest | None:
    """Make a set, see `import_set`, and print its summary and how to view it.

    Args:
        dry_run: read all headers, compare with the content of the output; write nothing, and return None.
    """
    if dry_run:
        source = Source(config.source)
        _begin(config, source)
        state = Output(config.output, plan_set(config, source)).check()
        end_dry_run(config.output, f"{state}; the time it takes was not measured")
        return None
    manifest = import_set(config)
    words = ["ldm-vae", "latents", "decode", config.output, f"autoencoder={config.autoencoder}"]
    sheet = "sheet.png" if is_url(config.output) else f"{beside(config.output, 'sheet')}.png"
    what = f"{summary(manifest)}; no file says that {config.autoencoder} made them, look at some"
    end(config.output, what, [*words, f"output={sheet}"])
    return manifest


def _begin(config: ImportConfig, source: Source) -> None:
    shape = "x".join(map(str, source.files[0].latent_shape))
    rows = f"{pluralize(source.count, 'row')} of {shape} in {pluralize(len(source.files), 'file')} of {config.source}"
    begin("latents import", rows, config.autoencoder, f"to {config.output}")


def import_set(config: ImportConfig) -> Manifest:
    """Make a set from a folder in LightningDiT's layout, or finish or repair it. Every row becomes a sample.

    Raises:
        UserError: the folder, the autoencoder or the output is not usable, a latent is not finite, or latents_stats.pt
            belongs to other latents.
    """
    started = time.time()
    source = Source(config.source)
    _begin(config, source)
    theirs = read_statistics(source.folder, source.files[0].latent_shape[0])
    for note in source.notes():
        say(f"note: {config.source}: {note}")
    output = Output(config.output, plan_set(config, source))
    _restore_plan(output)
    with output.open():
        verification = verify(output.where, progress=True)
        finished = output.finished_manifest() if verification.whole else None
        if finished:
            say(f"{output.where}: finished already")
            return finished
        for finding in verification.findings:
            say(f"{output.where}/{finding}")
        damaged = {finding.shard for finding in verification.findings if finding.cure == "encode"}
        origin, there = output.origin, output.finished_units() - damaged
        units = planned_shards(origin) or 0
        with Progress("import", source.count, "row") as bar:
            for unit in range(units):
                start, stop = unit * config.shard_size, min((unit + 1) * config.shard_size, source.count)
                if unit not in there:
                    write_shard(output.folder, unit, shard(source, origin, start, stop), origin.layout, origin.digest)
                bar.advance(stop - start)
        completed = output.complete(units)
        if theirs:
            say(compare_statistics(completed.manifest, theirs, source.folder / STATISTICS))
        record = provenance.run_record(None, started, time.time() - started, images=completed.manifest.count)
        completed.files[provenance.RUN_RECORD] = readable_json(record).encode()
        output.publish(completed)
    return completed.manifest


@dataclass(frozen=True)
class File:
    """One of the files and its header."""

    path: Path
    count: int
    latent_shape: tuple[int, ...]
    dtype: str
    flipped: bool
    others: tuple[str, ...]
    """Names of tensors that are not imported."""


class Source:
    """The folder, as one sequence of the rows of all files in the order of ranks and then shards.

    Raises:
        UserError: no such folder, no files, or files that do not fit each other.
    """

    def __init__(self, location: str) -> None:
        if is_url(location):
            raise UserError(f"{location}: is a URL; copy the folder to a local disk first")
        self.folder = local_path(location)
        if not self.folder.is_dir():
            raise UserError(f"{location}: no such folder; give the one with latents_rank00_shard000.safetensors")
        paths = sorted(self.folder.glob("*.safetensors"), key=lambda path: natural_key(path.name))
        if not paths:
            raise UserError(f"{location}: holds no .safetensors files; give the folder of `extract_features.py`")
        self.files = [read_file(path) for path in paths]
        for file in self.files:
            for name in ("latent_shape", "dtype", "flipped"):
                expected, found = getattr(self.files[0], name), getattr(file, name)
                if found != expected:
                    raise UserError(
                        f"{file.path}: its {name} is {found}, that of {self.files[0].path.name} is {expected}; "
                        "import them as two sets"
                    )
        self.starts = [0]
        for file in self.files:
            self.starts.append(self.starts[-1] + file.count)

    @property
    def count(self) -> int:
        return self.starts[-1]

    @cached_property
    def labels(self) -> Tensor:
        """The label of every row, int64."""
        from safetensors import safe_open

        found = []
        for file in self.files:
            with safe_open(file.path, framework="pt") as opened:
                found.append(opened.get_tensor("labels").long())
        labels = torch.cat(found)
        if len(labels) and int(labels.min()) < -1:
            raise UserError(f"{self.folder}: holds the label {int(labels.min())}; labels count from 0, -1 is none")
        return labels

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Name (latents, latents_flip) -> rows from `start` to `stop` (exclusive)."""
        from safetensors import safe_open

        parts: dict[str, list[Tensor]] = {}
        while start < stop:
            number = bisect_right(self.starts, start) - 1
            end, first = min(stop, self.starts[number + 1]), self.starts[number]
            file = self.files[number]
            with safe_open(file.path, framework="pt") as opened:
                for name in TENSORS[:2] if file.flipped else TENSORS[:1]:
                    parts.setdefault(name, []).append(opened.get_slice(name)[start - first : end - first])
            start = end
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def id(self, row: int) -> str:
        """FILE:ROW."""
        number = bisect_right(self.starts, row) - 1
        return f"{self.files[number].path.name}:{row - self.starts[number]}"

    def fingerprint(self) -> str:
        """sha256 hex over names, sizes and checksums of the files; reads all of them."""
        items: list[tuple[object, ...]] = [("lightningdit",)]
        size_bytes = sum(file.path.stat().st_size for file in self.files)
        with Progress("check", size_bytes, BYTE, leave=False) as bar:
            for file in self.files:
                size = file.path.stat().st_size
                items.append((file.path.name, size, checksum(file.path)))
                bar.advance(size)
        return hash_items(items)

    def notes(self) -> list[str]:
        """Notes about the folder: ignored tensors, files that seem to be missing."""
        notes = []
        if others := sorted({name for file in self.files for name in file.others}):
            notes.append(f"left out: {', '.join(others)}")
        ranks: dict[int, dict[int, int]] = {}
        for file in self.files:
            if match := FILE_NAME.fullmatch(file.path.name):
                ranks.setdefault(int(match[1]), {})[int(match[2])] = file.count
        for rank in range(max(ranks, default=-1) + 1):
            shards = ranks.get(rank, {})
            missing = [number for number in range(max(shards, default=0) + 1) if number not in shards]
            if missing:
                notes.append(
                    f"latents_rank{rank:02d}_shard{missing[0]:03d}.safetensors is missing; is the copy complete?"
                )
        rows = {sum(shards.values()) for shards in ranks.values()}
        if len(rows) > 1:  # the sampler gives each rank the same number, repeating images if necessary
            notes.append(
                f"the ranks have {min(rows)} to {max(rows)} rows, a finished extraction has the same number in each"
            )
        return notes


def natural_key(name: str) -> list[tuple[int, str]]:
    """A sort key that puts shard1000 after shard999."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def read_file(path: Path) -> File:
    """Raises: UserError if the file is damaged, or has another layout."""
    from safetensors import SafetensorError, safe_open

    check_tensor_file(path)
    try:
        with safe_open(path, framework="pt") as opened:
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            tensors = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in found.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it again") from error
    dtype, shape = tensors.get("latents", ("", ()))
    if dtype not in DTYPES or len(shape) != 4:
        raise UserError(
            f"{path}: holds no float `latents` (n, c, h, w), but {_described(tensors)}; give another folder"
        )
    if tensors.get("latents_flip", (dtype, shape)) != (dtype, shape):
        raise UserError(f"{path}: latents_flip does not fit latents: {_described(tensors)}; extract it again")
    if tensors.get("labels") not in [("I64", shape[:1]), ("I32", shape[:1])]:
        raise UserError(f"{path}: holds no `labels` (n) of integers, but {_described(tensors)}; add them, -1 is none")
    others = tuple(name for name in tensors if name not in TENSORS)
    return File(path, shape[0], shape[1:], DTYPES[dtype], "latents_flip" in tensors, others)


def _described(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(tensors.items())) or "nothing"


def plan_set(config: ImportConfig, source: Source) -> Origin:
    """The plan of the set. Raises: UserError if the autoencoder cannot have made latents of this shape."""
    autoencoder = load_autoencoder(config.autoencoder)
    (height, width), factor = parse_sizes(config.resolution)[0], autoencoder.downsampling
    expected = (autoencoder.latent_channels, height / factor, width / factor)
    shape = source.files[0].latent_shape
    if shape != expected:
        raise UserError(
            f"{config.source}: its latents are {_times(shape)}, {config.autoencoder} makes {_times(expected)} of "
            f"images of {height}x{width}; give the autoencoder that made them, and resolution=PIXELS"
        )
    record = {"fingerprint": autoencoder.fingerprint(), "encoder_fingerprint": autoencoder.encoder_fingerprint()}
    return Origin(
        autoencoder=record | describe_architecture(autoencoder) | {"asserted": True},
        preprocessing=lightningdit_preprocessing(height, width),
        dataset={
            "source": IMPORTED,
            "part": "all",
            "fingerprint": source.fingerprint(),
            "label_names": label_names(config.labels, source.labels),
            "count": source.count,
        },
        content="mean" if autoencoder.deterministic else "sample",
        dtype=config.dtype or source.files[0].dtype,
        latent_shape=(shape[0], shape[1], shape[2]),
        flipped=source.files[0].flipped,
        encoding={"shard_size": config.shard_size},
    )


def _times(shape: Sequence[float]) -> str:
    return "x".join(f"{side:g}" for side in shape)


def lightningdit_preprocessing(height: int, width: int) -> dict[str, Any]:
    """The image transform in LightningDiT's code, which differs from that of `encode`."""
    return {
        "version": 1,
        "height": height,
        "width": width,
        "fit": "cover, centre crop",
        "filter": "halved by box while twice too large, then bicubic, 8-bit",
        "colour": "as stored",
        "alpha": "dropped",
        "orientation": "as stored",
        "asserted": True,
    }


def label_names(path: str | None, labels: Tensor) -> list[str]:
    """A name for each class. Raises: UserError if the file has too few names, or a name twice."""
    classes = int(labels.max()) + 1 if len(labels) else 0
    if path is None:
        return [str(number) for number in range(classes)]
    try:
        names = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a text file with a name on each line") from error
    if len(names) < classes:
        raise UserError(f"{path}: has {len(names)} names, the labels go to {classes - 1}; give {classes} lines")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: has the name {twice!r} twice; give the two classes different names")
    return names


def _restore_plan(output: Output) -> None:
    """Write a damaged plan again, if it was the plan of these settings: manifest and shards hold its digest."""
    if not output.folder.sizes("shard-"):
        return
    state = read_state(output.folder)
    damaged = any(finding.file == plan_name(0) for finding in state.findings)
    if damaged and state.segments[0].digest == output.origin.digest:
        write_plan(output.folder, output.origin)


def shard(source: Source, origin: Origin, start: int, stop: int) -> Shard:
    """Rows `start` to `stop` (exclusive). Raises: UserError that names a row that is not finite."""
    tensors = {}
    for name, rows in source.read(start, stop).items():
        stored = rows.to(LATENT_DTYPES[origin.dtype])
        bad = ~stored.isfinite().flatten(1).all(1)
        if bad.any():
            where = source.id(start + int(bad.nonzero()[0]))
            raise UserError(f"{where}: {name} is not finite in {origin.dtype}; extract it again, or take a wider dtype")
        tensors[origin.content + (FLIPPED if name == "latents_flip" else "")] = stored
    return Shard(
        first_index=start,
        last_index=stop - 1,
        tensors=tensors,
        labels=source.labels[start:stop].tolist(),
        indices=range(start, stop),
        ids=[source.id(row) for row in range(start, stop)],
        rejected=(),
    )


def read_statistics(folder: Path, channels: int) -> dict[str, Tensor] | None:
    """`mean` and `std` (c) of latents_stats.pt, float64; None without such a file."""
    path = folder / STATISTICS
    if not path.exists():
        return None
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: values[name].double().reshape(channels) for name in ("mean", "std")}
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path}: holds no mean and std of {channels} channels ({error}); remove it") from error
    return found


def compare_statistics(manifest: Manifest, theirs: dict[str, Tensor], path: Path) -> str:
    """The difference of latents_stats.pt from the statistics of the data, as text. Raises: UserError if too large."""
    mean, std = (torch.tensor(manifest.statistics[name], dtype=torch.float64) for name in ("mean", "std"))
    distances = {"mean": (theirs["mean"] - mean).abs() / std, "std": (theirs["std"] / std - 1).abs()}
    for name, distance in distances.items():
        channel = int(distance.argmax())
        if not float(distance[channel]) <= FARTHEST:
            raise UserError(
                f"{path}: its {name} of channel {channel} is {float(theirs[name][channel]):.4g}, the latents have "
                f"{manifest.statistics[name][channel]:.4g}; it belongs to other latents, or they were scaled; "
                "correct that, or move the file away to import without it, and run the same command again"
            )
    largest = {name: f"{float(distance.max()):.2%}" for name, distance in distances.items()}
    return (
        f"{path}: agrees with the data: means differ by up to {largest['mean']} of a std, stds by up to "
        f"{largest['std']}; those of the whole set are used"
    )
