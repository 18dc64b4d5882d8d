"""The folder that an encoding job fills: whose it is, what is finished in it, and its completion.

Only the main process opens or completes it; every process publishes shards into it. The folder may be behind a URL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ldm_vae.config import to_dict
from ldm_vae.errors import UserError
from ldm_vae.latents import manifest as manifests
from ldm_vae.latents.index import INDEX_NAME, ShardIndex, shard_name, sidecar_name, write_index
from ldm_vae.latents.manifest import MANIFEST, Manifest, Origin, Recipe, merge_label_names, plan_name
from ldm_vae.latents.shard import no_space
from ldm_vae.latents.sidecar import Header, read_header, read_sidecar
from ldm_vae.storage import DISK_FULL, Folder, open_folder

QUARANTINE = "quarantine.jsonl"
LOCK = "encode.lock"
OTHER_ORIGIN = "give the settings of the first run, or another output"
SIDECAR_NAME = re.compile(r"shard-(\d{6,})\.jsonl")
READERS = 32
"""Sidecars read at once: against an object store the wait is latency, not bandwidth."""


class Output:
    """A folder, and the plan of the segment that is being made in it."""

    def __init__(self, folder: Folder | str | Path, origin: Origin, segment: int = 0) -> None:
        self.folder = open_folder(folder) if isinstance(folder, (str, Path)) else folder
        self.where, self.origin, self.segment = str(self.folder.location), origin, segment

    @contextmanager
    def open(self, share: tuple[int, int] = (0, 1)) -> Iterator[None]:
        """Take the folder, or one share of its units, for this plan, and write the plan down.

        Raises:
            UserError: it holds other files, latents of another origin, or another process is at work in it.
        """
        try:
            plan = plan_name(self.segment)
            contents = sorted(name for name in self.folder.sizes() if not name.endswith(".lock"))
            if contents and plan_name(0) not in contents:
                raise UserError(
                    f"{self.where}: holds {contents[0]} but no {plan_name(0)}; give another output, or empty it"
                )
            with self.folder.hold(lock_name(share)):
                self._refuse_others(share)
                if not self.folder.exists(plan):
                    manifests.write_plan(self.folder, self.origin, self.segment)
                self._adopt(manifests.read_plan(self.folder, self.segment))
                if share == (0, 1):
                    self.folder.clean()
                yield
        except OSError as error:
            if error.errno in DISK_FULL:
                raise no_space(self.folder) from error
            raise UserError(f"{self.where}: cannot be written ({error.strerror}); give another output") from error

    def _refuse_others(self, share: tuple[int, int]) -> None:
        """A whole job and the shares of one exclude each other. Each holds its own lock before it looks for others."""
        alone = share == (0, 1)
        others = self.folder.sizes("encode-" if alone else LOCK)
        for name in others:
            if holder := self.folder.holder(name):
                raise UserError(f"{self.where}: {holder} is encoding here; wait for it, or give another output")

    def _adopt(self, found: dict) -> None:
        """Compare the plan that is there with ours; of what makes no difference to a latent, theirs stands."""
        manifests.check_same(to_dict(self.origin), found, self.where, OTHER_ORIGIN)
        self.origin = replace(self.origin, autoencoder=found["autoencoder"])

    def finished_units(self) -> frozenset[int]:
        """Numbers within the segment of the shards that are published whole, of this plan."""
        sizes = self.folder.sizes("shard-")
        matches = (SIDECAR_NAME.fullmatch(name) for name in sizes)
        first = self.origin.first_shard
        numbers = [int(match[1]) for match in matches if match and int(match[1]) >= first]
        return frozenset(header.shard - first for header in self._headers(self.origin.digest, numbers, sizes) if header)

    def finished_manifest(self) -> Manifest | None:
        """The manifest, where it and all of its shards are there."""
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

    def complete(self, units: int | None) -> Manifest:
        """The manifest, which follows from the plans and sidecars of all segments; also publishes its index and the
        list of images left out. `units`: of this segment; None for a stream, where all there are count.

        Raises:
            UserError: a shard of this segment or of one before is not there, or no image could be read.
        """
        segments = list(self._segments(units))
        headers = [header for _, made in segments for header in made]
        index = ShardIndex.of([header.record for header in headers], [header.sums for header in headers])
        rejected = self._write_quarantine(index)
        if not index.count:
            first = f"; the first: {rejected[0]['id']}, {rejected[0]['message']}" if rejected else ""
            raise UserError(f"{self.where}: none of {index.rejected} images could be read{first}")
        label_names: tuple[str, ...] = ()
        for origin, _ in segments:
            label_names = merge_label_names(label_names, origin.dataset["label_names"])
        return Manifest(
            **{field.name: getattr(self.origin, field.name) for field in fields(Recipe)},
            datasets=tuple(segment_record(origin, made) for origin, made in segments),
            label_names=label_names,
            count=index.count,
            rejected=index.rejected,
            shards=len(index),
            index=write_index(self.folder, index),
            statistics=manifests.measure(index, self.origin.layout, self.origin.encoding.get("codebook_size")),
            where=self.folder,
        )

    def _segments(self, units: int | None) -> Iterator[tuple[Origin, list[Header]]]:
        """The plan and the headers of every segment that is whole, in order. Later ones than this may be unfinished."""
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
        """Raises: UserError when the manifest lists that segment. Without a manifest nobody knows: it is said."""
        if not self.folder.exists(MANIFEST):
            print(f"{self.where}: {plan_name(segment)} is left out: {missing} is not there; append its images again")
        elif len(manifests.read_manifest(self.folder).datasets) > segment:
            raise UserError(f"{self.where}: {missing} is not there; make it again with `ldm-vae latents repair`")

    def publish(self, manifest: Manifest) -> None:
        """Make the manifest the set's, and remove the index of the one before."""
        manifests.write_manifest(self.folder, manifest)
        listed = {part.file for part in manifest.index}
        for name in self.folder.sizes("index-"):
            if INDEX_NAME.fullmatch(name) and name not in listed:
                self.folder.remove(name)

    def _write_quarantine(self, index: ShardIndex) -> list[dict]:
        """Only the sidecars of shards with images left out are read."""
        numbers = index.columns["rejected"].nonzero()[0].tolist()
        with ThreadPoolExecutor(READERS) as pool:
            sidecars = pool.map(lambda number: read_sidecar(self.folder, number), numbers)
            rejected = [asdict(rejection) for sidecar in sidecars for rejection in sidecar.rejected]
        self.folder.write(QUARANTINE, "".join(json.dumps(rejection) + "\n" for rejection in rejected).encode())
        return rejected

    def _headers(self, digest: str, numbers: Sequence[int], sizes: dict[str, int]) -> list[Header | None]:
        """Of each number the sidecar's header; None where the shard is not whole or not of the plan `digest`."""

        def header(number: int) -> Header | None:
            if shard_name(number) not in sizes:
                return None
            try:
                found = read_header(self.folder, number)
            except UserError:
                return None
            return found if found.origin == digest and found.record.size_bytes == sizes[shard_name(number)] else None

        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(header, numbers))


def lock_name(share: tuple[int, int]) -> str:
    """The lock of a job: of the whole folder, or of one share."""
    number, shares = share
    return LOCK if shares == 1 else f"encode-{number}-of-{shares}.lock"


def segment_record(origin: Origin, headers: Sequence[Header]) -> dict[str, Any]:
    """What a manifest says of a segment: its dataset, now with the count, and where it begins."""
    count = headers[-1].record.last_index + 1 - origin.first_index
    place = {"first_shard": origin.first_shard, "first_index": origin.first_index, "plan": origin.digest}
    return origin.dataset | {"count": count} | place
