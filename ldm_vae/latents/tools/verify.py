"""Is a set of latent shards what was written, all of it, and which samples are affected where it is not?

Every file is read once, in a few threads, and compared with what others say about it: the shard with its sidecar and
the index, the index with the manifest, that with the plans; whatever has two copies names the damaged one. Owns the
walk over the set; what its records say is `state`'s, one shard is `shard_check`'s. Changes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm_vae.latents.ahead import in_order
from ldm_vae.latents.index import ShardIndex, shard_name, sidecar_name
from ldm_vae.latents.output import LOCK, QUARANTINE
from ldm_vae.latents.sidecar import Header, Rejection, Sample, read_sidecar
from ldm_vae.latents.tools.findings import Affected, Finding, Verification
from ldm_vae.latents.tools.place import open_set_folder
from ldm_vae.latents.tools.shard_check import Place, ShardReport, check_shard, stray_samples
from ldm_vae.latents.tools.state import Segment, SetState, check_manifest, command_for, read_state
from ldm_vae.storage import is_url
from ldm_vae.training import watchdog

THREADS, REMOTE_THREADS = 4, 16
"""Shards read at once; each takes some 25 MB, behind a URL 100 MB."""


def verify(location: str | Path, quick: bool = False, progress: bool = False) -> Verification:
    """Compare everything with everything, without the images and the autoencoder.

    Memory: 16 bytes a sample for the hashes of ids, that of the threads, and what is said about damage.

    Args:
        location: the folder, or its URL.
        quick: sizes, headers, index and manifest only: no shard is read.
        progress: show a bar.

    Raises:
        UserError: there is no set, it is of another format version, or it cannot be reached.
    """
    started, folder = time.monotonic(), open_set_folder(location)
    state = read_state(folder)
    survey = _Survey(state)
    places = list(_places(state))
    total = sum(state.sizes.get(shard_name(place.number), 0) for place in places)
    threads = REMOTE_THREADS if is_url(location) else THREADS
    check = partial(check_shard, folder, sizes=state.sizes, quick=quick)
    with _bar(0 if quick else total, progress and not quick) as bar:
        for place, report in in_order(check, places, threads=threads, ahead=2 * threads):
            survey.add(place, report)
            bar.update(report.bytes_read)
            watchdog.advance()
    findings = [*state.findings, *survey.findings()]
    index = survey.index()
    if index is not None:
        findings += check_manifest(state, index)
    notes = list(_notes(state))
    if state.finished:
        found = list(_check_quarantine(state, survey, quick))
        findings += [finding for finding in found if isinstance(finding, Finding)]
        notes += [note for note in found if isinstance(note, str)]
    counts = survey.counts.clip(min=0) if state.finished else np.array(survey.unlisted, np.int64)
    return Verification(
        str(location), quick, tuple(findings), tuple(notes), state.finished, len(counts), int(counts.sum()),
        survey.bytes_read, time.monotonic() - started, state.command,
    )  # fmt: skip


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", dynamic_ncols=True, disable=not shown) as bar:
        yield bar


def _places(state: SetState) -> Iterator[Place]:
    """Of every shard that must be there, and of those of unfinished segments that are."""
    known = state.manifest is not None or all(segment.origin for segment in state.segments)
    classes = len(state.label_names) or None if known else None
    for segment in state.segments:
        shards = segment.shards
        if segment.listed:
            numbers: Iterable[int] = range(segment.first_shard, segment.first_shard + (shards or 0))
        else:
            numbers = _present(state, segment)
        for number in numbers:
            yield _place(state, segment, number, classes)


def _present(state: SetState, segment: Segment) -> list[int]:
    """The shards of an unfinished segment that are there, with their sidecars."""
    names = (name for name in state.sizes if name.startswith("shard-") and name.endswith(".jsonl"))
    numbers = (int(name[6:-6]) for name in names if name[6:-6].isdecimal())
    return sorted(number for number in numbers if number in segment and shard_name(number) in state.sizes)


def _place(state: SetState, segment: Segment, number: int, classes: int | None) -> Place:
    origin, index = segment.origin, state.index
    known = index is not None and number < len(index) and segment.listed
    unit = origin.encoding["shard_size"] if origin else 0
    first_index = origin.first_index + (number - segment.first_shard) * unit if origin else 0
    return Place(
        number=number,
        digest=segment.digest,
        layout=origin.layout if origin else None,
        first_index=first_index,
        images=unit,
        classes=classes,
        codes=origin.encoding.get("codebook_size") if origin else None,
        record=index[number] if index and known else None,
        sums=index.sums[number] if index and known else None,
    )


class _Survey:
    """What the reports on shards add up to. Of shards without findings only counts and hashes are kept."""

    def __init__(self, state: SetState) -> None:
        self.state = state
        self.counts = np.full(state.shards, -1, np.int64)
        if state.index is not None:
            known = state.index.counts[: state.shards]
            self.counts[: len(known)] = known
        self.bad: list[tuple[Place, ShardReport]] = []
        self.stray: dict[int, str] = {}
        self.hashes: list[tuple[int, np.ndarray]] = []
        self.headers: list[Header] | None = [] if state.index is None else None
        self.rejected: list[Rejection] | None = []
        self.unlisted: list[int] = []
        self.unlisted_rejected: list[Rejection] = []
        self.bytes_read = 0

    def add(self, place: Place, report: ShardReport) -> None:
        import xxhash

        number, listed = place.number, place.number < len(self.counts)
        self.bytes_read += report.bytes_read
        if report.header and listed and self.counts[number] < 0:
            self.counts[number] = report.header.record.count
        if self.headers is not None and listed:
            if report.header:
                self.headers.append(report.header)
            else:
                self.headers = None
        if listed:
            lost = report.rejected is None and (place.record is None or place.record.rejected > 0)
            if lost:
                self.rejected = None
            elif self.rejected is not None:
                self.rejected += report.rejected or []
        else:
            self.unlisted.append(report.header.record.count if report.header else 0)
            self.unlisted_rejected += report.rejected or []
        if report.samples is not None:
            hashes = (xxhash.xxh3_64_intdigest(sample.id.encode()) for sample in report.samples)
            self.hashes.append((number, np.fromiter(hashes, np.uint64, len(report.samples))))
        if report.misplaced is not None:
            self.stray[report.misplaced] = sidecar_name(number)
        if report.findings:
            self.bad.append((place, report))

    def index(self) -> ShardIndex | None:
        """Of the finished part; None where too much of it is damaged to have one."""
        if self.state.index is not None:
            return self.state.index
        if self.headers is None or len(self.headers) != len(self.counts) or not self.headers:
            return None
        return ShardIndex.of([header.record for header in self.headers], [header.sums for header in self.headers])

    def findings(self) -> Iterator[Finding]:
        """Of the shards, with the samples that are affected; then of ids."""
        for place, report in self.bad:
            for file, kind, message, rows, cure in report.findings:
                samples = self._affected(place, report, rows)
                yield Finding(file or self.state.index_file(place.number), kind, message, samples, cure, place.number)
        yield from self._duplicates()

    def _affected(self, place: Place, report: ShardReport, rows: list[int] | None) -> tuple[Affected, ...]:
        first, number = self._first_sample(place.number), place.number
        samples = report.samples
        if samples is None and place.record is not None and number in self.stray:
            samples = stray_samples(self.state.folder, self.stray[number], place.record)
        if samples is not None:
            indices: list[int | None] = [sample.index for sample in samples]
            count = len(samples)
        elif report.indices is not None:
            indices, count = report.indices.tolist(), len(report.indices)
        else:
            record = place.record
            count = record.count if record else max(0, int(self.counts[number]) if number < len(self.counts) else 0)
            whole = record is not None and not record.rejected
            indices = [place.first_index + row if whole and place.layout else None for row in range(count)]
        chosen = range(count) if rows is None else [row for row in rows if row < count]
        return tuple(
            Affected(None if first is None else first + row, indices[row], samples[row].id if samples else None)
            for row in chosen
        )

    def _first_sample(self, shard: int) -> int | None:
        """The number in the set of a shard's first sample; None where that of a shard before is not known."""
        return int(self._starts[shard]) if shard < len(self._starts) else None

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first sample of each shard, up to the one after which it is not known any more."""
        unknown = np.flatnonzero(self.counts < 0)
        known = self.counts[: unknown[0]] if len(unknown) else self.counts
        return np.concatenate([[0], known.cumsum()])

    def _duplicates(self) -> Iterator[Finding]:
        every = np.concatenate([np.empty(0, np.uint64), *(hashes for _, hashes in self.hashes)])
        every.sort()
        doubled = np.unique(every[1:][every[1:] == every[:-1]])
        if not len(doubled):
            return
        seen: dict[str, tuple[int, int, Sample]] = {}
        for number, hashes in self.hashes:
            rows = np.flatnonzero(np.isin(hashes, doubled)).tolist()
            samples = read_sidecar(self.state.folder, number).samples if rows else []
            for row in rows:
                sample = samples[row]
                other, place, first = seen.setdefault(sample.id, (number, row, sample))
                if first is sample:
                    continue
                places = [(other, place, first), (number, row, sample)]
                affected = [(self._first_sample(shard), line, found) for shard, line, found in places]
                yield Finding(
                    sidecar_name(number), "duplicate",
                    f"the id {sample.id} is in {sidecar_name(other)} too" if other != number else "has an id twice",
                    tuple(Affected(None if begin is None else begin + line, found.index, found.id)
                          for begin, line, found in affected),
                    "none", number,
                )  # fmt: skip


def _check_quarantine(state: SetState, survey: _Survey, quick: bool) -> Iterator[Finding | str]:
    """The list of images left out, which follows from the sidecars: what is wrong with it, or a note.

    It is published before the manifest, so that of a segment that is about to be finished it may hold the images too.
    """
    if QUARANTINE not in state.sizes:
        yield Finding(QUARANTINE, "missing", "is not there")
        return
    found = state.folder.read(QUARANTINE)
    lines = found.decode(errors="replace").splitlines()
    if quick:
        if state.manifest and not survey.unlisted and len(lines) != state.manifest.rejected:
            yield Finding(QUARANTINE, "damaged", f"has {len(lines)} lines and not {state.manifest.rejected}")
        return
    if survey.rejected is None:  # a sidecar with such images is damaged, and with it made again this file will be too
        return
    if _lists(found, survey.rejected):
        return
    if survey.unlisted_rejected and _lists(found, [*survey.rejected, *survey.unlisted_rejected]):
        yield f"{QUARANTINE} lists the images of the unfinished segment already"
    else:
        yield Finding(QUARANTINE, "damaged", "does not list the images that the sidecars say were left out")


def _lists(found: bytes, rejected: list[Rejection]) -> bool:
    """Whether a list of images left out holds just these; another writer's spaces are no damage."""
    right = [json.dumps(asdict(rejection)) for rejection in rejected]
    expected = "".join(line + "\n" for line in right).encode()
    if found == expected:
        return True
    same = _parsed(found.decode(errors="replace").splitlines()) == _parsed(right)
    return same and len(found) != len(expected) and found + b"\n" != expected


def _parsed(lines: list[str]) -> list[Any] | None:
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return None


def _notes(state: SetState) -> Iterator[str]:
    for segment in state.segments:
        if segment.listed:
            continue
        present, planned = len(_present(state, segment)), segment.shards
        command = command_for(segment.number, segment.origin.dataset if segment.origin else {})
        yield (
            f"segment {segment.number} is unfinished: {present} of {planned or 'its'} shards are there; run the same "
            f"`{command}` command again"
        )
    for name in sorted(name for name in state.sizes if name.startswith(LOCK.split(".")[0]) and name.endswith(".lock")):
        if holder := state.folder.holder(name):
            yield f"{holder} is at work here: what it has not finished may look damaged"
