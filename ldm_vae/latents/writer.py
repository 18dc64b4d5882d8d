"""The folder of an encoding job: its owner, its finished parts, and its completion.

Only the main process opens or completes it; every process publishes shards into it. The folder may be behind a URL.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ldm_vae.config import to_dict
from ldm_vae.errors import DISK_FULL, FolderLocked, UserError
from ldm_vae.latents import format as manifests
from ldm_vae.latents.format import (
    INDEX_NAME,
    MANIFEST,
    STORED_DTYPES,
    Header,
    Manifest,
    Origin,
    ShardIndex,
    build_manifest,
    index_files,
    plan_name,
    read_sidecar,
    read_sidecar_header,
    shard_name,
    sidecar_name,
)
from ldm_vae.latents.image_loader import ImageBatch
from ldm_vae.latents.shard import Shard, no_space, write_shard
from ldm_vae.paths import check_writable
from ldm_vae.storage import open_folder
from ldm_vae.storage.base import Folder, is_url
from ldm_vae.training import watchdog
from ldm_vae.utils.progress import say
from ldm_vae.utils.text import pluralize

QUARANTINE = "quarantine.jsonl"
LOCK, PLAN_LOCK = "encode.lock", "plan.lock"
PLAN_ATTEMPTS, PLAN_PAUSE_SECONDS = 60, 1.0
OTHER_ORIGIN = "give the settings of the first run, or another output; `ldm-vae latents append` adds images to a set"
SIDECAR_NAME = re.compile(r"shard-(\d{6,})\.jsonl")
READERS = 32
"""Number of sidecars read in parallel: for an object store, latency and not bandwidth is the limit."""


@dataclass(frozen=True)
class Completed:
    """The files that turn shards into a set, not yet written.

    Attributes:
        manifest, index: those of all segments; the manifest cannot read its index before it is published.
        files: files that are published before the manifest, by name: the index, the list of rejected images.
    """

    manifest: Manifest
    index: ShardIndex
    files: dict[str, bytes]


class Output:
    """A folder, and the plan of the segment in progress."""

    def __init__(self, folder: Folder | str | Path, origin: Origin, segment: int = 0) -> None:
        self.folder = open_folder(folder) if isinstance(folder, (str, Path)) else folder
        self.where, self.origin, self.segment = str(self.folder.location), origin, segment

    @contextmanager
    def open(self, share: tuple[int, int] = (0, 1)) -> Iterator[None]:
        """Lock the folder, or one share of its units, for this plan, and write the plan.

        Raises:
            UserError: it holds other files or latents of another origin, or another process is using it.
        """
        plan = plan_name(self.segment)
        with self._writing():
            self._refuse_other_files()
            with contextlib.ExitStack() as held:
                held.enter_context(self.folder.lock(lock_name(share)))
                self._refuse_others(share)
                with self._planning(share):
                    if not self.folder.exists(plan):
                        manifests.write_plan(self.folder, self.origin, self.segment)
                    self._adopt(manifests.read_plan(self.folder, self.segment))
                if share == (0, 1):
                    self.folder.clean()
                lock = held.pop_all()
        with lock:
            yield

    def check(self) -> str:
        """Check, without writing anything, that a job can begin or continue here.

        Returns: what it would do, as text.

        Raises:
            UserError: see `open`.
        """
        if not is_url(self.where):
            check_writable(Path(self.where))
        with self._writing():
            self._refuse_other_files()
            self._refuse_others((0, 1))
            if not self.folder.exists(plan_name(self.segment)):
                return "a new set" if self.segment == 0 else "new shards"
            self._adopt(manifests.read_plan(self.folder, self.segment))
            if self.finished_manifest() is not None:
                return "it is finished already"
            return f"it continues with {pluralize(len(self.finished_units()), 'shard')} that are there"

    def _refuse_other_files(self) -> None:
        contents = sorted(name for name in self.folder.sizes() if not name.endswith(".lock"))
        if contents and plan_name(0) not in contents:
            raise UserError(
                f"{self.where}: holds {contents[0]} but no {plan_name(0)}; give another output, or empty it"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises: UserError instead of errors of the disk."""
        try:
            yield
        except OSError as error:
            if error.errno in DISK_FULL:
                raise no_space(self.folder) from error
            raise UserError(f"{self.where}: cannot be written ({error.strerror}); give another output") from error

    @contextmanager
    def _planning(self, share: tuple[int, int]) -> Iterator[None]:
        """A lock among jobs that each make a share, so that two with different settings do not both write the plan."""
        if share == (0, 1):
            yield
            return
        with contextlib.ExitStack() as held:
            for attempt in range(PLAN_ATTEMPTS):
                try:
                    held.enter_context(self.folder.lock(PLAN_LOCK))
                    break
                except FolderLocked:
                    if attempt == PLAN_ATTEMPTS - 1:
                        raise
                    time.sleep(PLAN_PAUSE_SECONDS)
            yield

    def _refuse_others(self, share: tuple[int, int]) -> None:
        """A job of the whole set and jobs of shares exclude each other. Each takes its lock, then checks for others."""
        others = self.folder.sizes("encode-" if share == (0, 1) else LOCK)
        for name in others:
            if holder := self.folder.holder(name):
                raise UserError(f"{self.where}: {holder} is encoding here; wait for it, or give another output")

    def _adopt(self, found: dict) -> None:
        """Compare the existing plan with this one. Values that do not affect latents are kept."""
        manifests.check_same(to_dict(self.origin), found, self.where, OTHER_ORIGIN)
        self.origin = replace(self.origin, autoencoder=found["autoencoder"])

    def finished_units(self, share: tuple[int, int] = (0, 1)) -> frozenset[int]:
        """Numbers (within the segment) of the complete shards of this plan; with a share, only its own."""
        sizes = self.folder.sizes("shard-")
        matches = (SIDECAR_NAME.fullmatch(name) for name in sizes)
        first, (place, shares) = self.origin.first_shard, share
        found = [int(match[1]) for match in matches if match]
        numbers = [number for number in found if number >= first and (number - first) % shares == place]
        return frozenset(header.shard - first for header in self._headers(self.origin.digest, numbers, sizes) if header)

    def finished_manifest(self) -> Manifest | None:
        """The manifest, if it and all of its shards exist."""
        if not self.folder.exists(MANIFEST):
            return None
        manifest = manifests.read_manifest(self.folder)
        if len(manifest.datasets) <= self.segment:
            return None
        sizes, index = self.folder.sizes("shard-"), manifest.shard_index
        there = all(
            sizes.get(shard_name(number)) == size and sidecar_name(number) in sizes
            for number, size in enumerate(index.columns["size_bytes"].tolist())
        )
        return manifest if there else None

    def complete(self, units: int | None) -> Completed:
        """The records that complete the set, from the plans and sidecars of all segments. Writes nothing.

        `units`: number of units of this segment; None for a stream: all existing ones.

        Raises:
            UserError: a shard of this or an earlier segment is missing, or no image could be read.
        """
        segments = list(self._segments(units))
        headers = [header for _, made in segments for header in made]
        index = ShardIndex.of([header.record for header in headers], [header.sums for header in headers])
        rejected = self._rejected(index)
        if not index.count:
            first = f"; the first: {rejected[0]['id']}, {rejected[0]['message']}" if rejected else ""
            raise UserError(f"{self.where}: no image of {index.rejected} could be read{first}")
        parts = index_files(index)
        files = {part.file: data for part, data in parts}
        files[QUARANTINE] = "".join(json.dumps(rejection) + "\n" for rejection in rejected).encode()
        origins = [origin for origin, _ in segments]
        manifest = build_manifest(origins, self.origin, index, [part for part, _ in parts], self.folder)
        return Completed(manifest, index, files)

    def _segments(self, units: int | None) -> Iterator[tuple[Origin, list[Header]]]:
        """The plan and the headers of every complete segment, in order. Segments after this one may be unfinished."""
        sizes, segment = self.folder.sizes(), 0
        while plan_name(segment) in sizes:
            origin = manifests.read_origin(self.folder, segment)
            if segment == self.segment:
                origin = self.origin
                count = len(self.finished_units()) if units is None else units
            elif plan_name(segment + 1) in sizes:
                count = manifests.read_origin(self.folder, segment + 1).first_shard - origin.first_shard
            else:
                count = manifests.planned_shards(origin) or 0
            numbers = range(origin.first_shard, origin.first_shard + count)
            headers = self._headers(origin.digest, numbers, sizes)
            missing = [shard_name(number) for number, header in zip(numbers, headers) if header is None]
            if missing and segment > self.segment:
                self._refuse_loss(segment, missing[0])
                return
            if missing:
                raise UserError(
                    f"{self.where}: {missing[0]} is not there at the end of the job; run the same command again"
                )
            if headers:
                yield origin, [header for header in headers if header is not None]
            segment += 1

    def _refuse_loss(self, segment: int, missing: str) -> None:
        """Raises: UserError if the manifest lists that segment. Without a manifest, a line is printed."""
        if not self.folder.exists(MANIFEST):
            say(f"{self.where}: {plan_name(segment)} is left out: {missing} is not there; append its images again")
        elif len(manifests.read_manifest(self.folder).datasets) > segment:
            raise UserError(f"{self.where}: {missing} is not there; make it again with `ldm-vae latents repair`")

    def publish(self, completed: Completed) -> None:
        """Publish the set, or its next version. The index of the previous version is kept for readers that have just
        opened it; older ones are removed."""
        before: set[str] = set()
        with contextlib.suppress(UserError):  # missing or damaged
            before = {part.file for part in manifests.read_manifest(self.folder).index}
        with self._writing():
            for name, data in completed.files.items():
                self.folder.write(name, data)
            manifests.write_manifest(self.folder, completed.manifest)
            for name in self.folder.sizes("index-"):
                if INDEX_NAME.fullmatch(name) and name not in before | completed.files.keys():
                    self.folder.remove(name)

    def _rejected(self, index: ShardIndex) -> list[dict]:
        """The rejected images. Only the sidecars of shards with rejected images are read."""
        numbers = index.columns["rejected"].nonzero()[0].tolist()
        with ThreadPoolExecutor(READERS) as pool:
            sidecars = pool.map(lambda number: read_sidecar(self.folder, number), numbers)
            return [asdict(rejection) for sidecar in sidecars for rejection in sidecar.rejected]

    def _headers(self, digest: str, numbers: Sequence[int], sizes: dict[str, int]) -> list[Header | None]:
        """The sidecar's header of each shard; None if the shard is incomplete or of another plan than `digest`."""

        def header(number: int) -> Header | None:
            if shard_name(number) not in sizes:
                return None
            try:
                found = read_sidecar_header(self.folder, number)
            except UserError:
                return None
            return found if found.origin == digest and found.record.size_bytes == sizes[shard_name(number)] else None

        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(header, numbers))


def lock_name(share: tuple[int, int]) -> str:
    """The name of a job's lock: for the whole folder, or for one share."""
    number, shares = share
    return LOCK if shares == 1 else f"encode-{number}-of-{shares}.lock"


# Batches of latents become shards: rows are gathered on the device, checked once per shard, published in a thread.


class OpenShard:
    """A shard in progress. Its rows stay on the device until it is closed, so there is one copy and wait per shard."""

    def __init__(self, unit: int, origin: Origin) -> None:
        self.unit, self.origin = unit, origin
        self.batches: list[ImageBatch] = []
        self.tensors: dict[str, list[Tensor]] = {name: [] for name in origin.layout.names}

    def add(self, batch: ImageBatch, stored: dict[str, Tensor]) -> None:
        """Add a batch. `stored`: for each name of the layout, one row per row of the batch, on any device."""
        for name, tensor in stored.items():
            self.tensors[name].append(tensor)
        self.batches.append(replace(batch, images=batch.images.new_empty(0)))  # the pixels are no longer needed

    def close(self) -> Shard:
        """Raises: UserError that names the first image whose latent is not finite."""
        size, first_index = self.origin.encoding["batch"], self.origin.first_index
        rows = torch.tensor([size * i + row for i, batch in enumerate(self.batches) for row in batch.rows]).long()
        ids = [id for batch in self.batches for id in batch.ids]
        rejected = [rejection for batch in self.batches for rejection in batch.rejected]
        indices = [index for batch in self.batches for index in batch.indices]
        tensors = {name: self._stored(torch.cat(parts).cpu()[rows], ids) for name, parts in self.tensors.items()}
        return Shard(
            first_index=first_index + self.unit * self.origin.encoding["shard_size"],
            last_index=first_index + max([*indices, *(rejection.index for rejection in rejected)]),
            tensors=tensors,
            labels=[label for batch in self.batches for label in batch.labels],
            indices=[first_index + index for index in indices],
            ids=ids,
            rejected=[replace(rejection, index=first_index + rejection.index) for rejection in rejected],
        )

    def _stored(self, tensor: Tensor, ids: list[str]) -> Tensor:
        dtype = STORED_DTYPES[self.origin.dtype]
        if not dtype.is_floating_point:
            return torch.from_numpy(tensor.numpy().astype(self.origin.dtype))
        tensor = tensor.to(dtype)
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
            raise UserError(
                f"{ids[bad]}: its latent is not finite in {self.origin.dtype}; check the autoencoder on this image "
                "with `ldm-vae reconstruct`, or try precision=fp32 and dtype=float32 with another output"
            )
        return tensor


class Writer:
    """Closes and publishes shards in order, in its own thread, at most one behind the encoding."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def publish(self, shard: OpenShard) -> None:
        """Raises: the error of the previous shard."""
        self._wait()
        self.pending = self.thread.submit(self._publish, shard)

    def _publish(self, shard: OpenShard) -> None:
        origin = self.output.origin
        write_shard(
            self.output.folder, origin.first_shard + shard.unit, shard.close(), origin.layout, origin.digest
        )  # fmt: skip

    def _wait(self) -> None:
        if self.pending is not None:
            with watchdog.solo():  # publishing to a remote folder may take long
                self.pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with watchdog.solo():
            self.thread.shutdown()
        if kind is None:
            self._wait()
