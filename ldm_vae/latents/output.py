"""The folder that an encoding job fills: whose it is, what is finished in it, and its completion.

Only the main process opens or completes it; every process publishes shards into it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ldm_vae.config import to_dict
from ldm_vae.errors import UserError
from ldm_vae.files import write_text
from ldm_vae.latents import manifest as manifests
from ldm_vae.latents.manifest import MANIFEST, PLAN, Manifest, Origin
from ldm_vae.latents.shard import Sidecar, finished_sidecar, shard_name
from ldm_vae.latents.statistics import combine

QUARANTINE = "quarantine.jsonl"
LOCK = "encode.lock"
OTHER_ORIGIN = "give the settings of the first run, or another output"


class Output:
    """The folder of one plan."""

    def __init__(self, path: str | Path, origin: Origin) -> None:
        self.path, self.origin = Path(path), origin

    @contextmanager
    def open(self) -> Iterator[None]:
        """Take the folder for this plan, alone, and write the plan down.

        Raises:
            UserError: it holds other files, latents of another origin, or another process is at work in it.
        """
        try:
            contents = self._contents()
            if contents and PLAN not in contents:
                raise UserError(f"{self.path}: holds {contents[0]} but no {PLAN}; give another output, or empty it")
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "a+")  # noqa: SIM115 - closed below
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); give another output") from error
        with lock:
            _lock(lock, self.path)
            if PLAN in contents:
                found = manifests.read_plan(self.path)
                manifests.check_same_origin(to_dict(self.origin), found, str(self.path), OTHER_ORIGIN)
            else:
                manifests.write_plan(self.path, self.origin)
            for leftover in self.path.glob(".tmp-*"):
                leftover.unlink()
            yield

    def _contents(self) -> list[str]:
        if not self.path.exists():
            return []
        return sorted(path.name for path in self.path.iterdir() if path.name != LOCK and not path.name.startswith("."))

    def finished_units(self) -> frozenset[int]:
        """Numbers of the shards that are published whole. One without its sidecar, or of another size, is not."""
        digest = self.origin.digest
        stems = (path.stem.removeprefix("shard-") for path in self.path.glob("shard-*.json"))
        numbers = (int(stem) for stem in stems if stem.isdecimal())
        return frozenset(number for number in numbers if finished_sidecar(self.path, number, digest))

    def finished_manifest(self) -> Manifest | None:
        """The manifest, where it and all of its shards are there."""
        if not (self.path / MANIFEST).exists():
            return None
        manifest = manifests.read_manifest(self.path)
        done = self.finished_units()
        return manifest if done.issuperset(range(len(manifest.shards))) else None

    def complete(self, sidecars: list[Sidecar]) -> Manifest:
        """The manifest of all shards, which follows from their sidecars; also writes the list of images left out.

        Raises:
            UserError: no image could be read.
        """
        rejected = [asdict(rejection) for sidecar in sidecars for rejection in sidecar.rejected]
        write_text(self.path / QUARANTINE, "".join(json.dumps(rejection) + "\n" for rejection in rejected))
        if not any(sidecar.record.count for sidecar in sidecars):
            first = f"; the first: {rejected[0]['id']}, {rejected[0]['message']}" if rejected else ""
            raise UserError(f"{self.path}: none of {len(rejected)} images could be read{first}")
        origin = self._counted(sidecars[-1].record.last_index + 1)
        return Manifest(
            **{field.name: getattr(origin, field.name) for field in fields(Origin)},
            shards=tuple(sidecar.record for sidecar in sidecars),
            statistics=combine([sidecar.sums for sidecar in sidecars]),
            rejected=len(rejected),
        )

    def sidecars(self, units: int | None) -> list[Sidecar]:
        """Those of the shards 0 to `units` - 1, in order; for a stream (None), of all there are."""
        if units is None:
            units = len(self.finished_units())
        digest = self.origin.digest
        found = [finished_sidecar(self.path, number, digest) for number in range(units)]
        missing = [shard_name(number) for number, sidecar in enumerate(found) if sidecar is None]
        if missing:
            raise UserError(f"{self.path}: {missing[0]} is not there at the end of the job; run the same command again")
        return [sidecar for sidecar in found if sidecar is not None]

    def _counted(self, count: int) -> Origin:
        dataset: dict[str, Any] = self.origin.dataset | {"count": count}
        return replace(self.origin, dataset=dataset)


def _lock(file: Any, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise UserError(f"{path}: process {holder} is encoding here; wait for it, or give another output") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
