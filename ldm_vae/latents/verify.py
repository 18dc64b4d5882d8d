"""Is a set of latent shards what was written, all of it, and which samples are affected where it is not?

Every file is read once, in a few threads, and compared with what others say about it: the shard with its sidecar and
the index, the index with the manifest, that with the plans; whatever has two copies names the damaged one. Owns the
walk over the set; what its records say is `state`'s, one shard is `shard_check`'s. Changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_vae.errors import UserError
from ldm_vae.files import checksum_bytes
from ldm_vae.latents.format import (
    ALGORITHM,
    STORED_DTYPES,
    Header,
    Layout,
    Rejection,
    Sample,
    ShardIndex,
    ShardRecord,
    open_set_folder,
    read_header,
    read_sidecar,
    shard_name,
    short,
    sidecar_name,
)
from ldm_vae.latents.normalizer import ROWS, channel_sums
from ldm_vae.latents.shard import MAXIMUM_HEADER_BYTES, row_checksums
from ldm_vae.latents.state import (
    Affected,
    Cure,
    Finding,
    Kind,
    Segment,
    SetState,
    Verification,
    check_manifest,
    command_for,
    read_state,
    reason,
)
from ldm_vae.latents.writer import LOCK, QUARANTINE
from ldm_vae.storage.base import Folder, is_url
from ldm_vae.storage.local import LocalFolder
from ldm_vae.storage.remote import RemoteFolder
from ldm_vae.training import watchdog
from ldm_vae.utils.concurrency import in_order

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


# One shard and its sidecar: are they the bytes that were written, for this place, and can they be right?

SUMS_TOLERANCE = 1e-9
"""Relative. exp differs in its last bits between processors, and so do the sums of variances."""


@dataclass(frozen=True)
class Place:
    """What a shard must be.

    Attributes:
        number: of the shard.
        digest: of the plan of its segment; None where no plan says so.
        layout: None where no plan says so; the content is not looked at then.
        first_index, images: its range of source indices; 0 images: not known.
        classes: how many labels there are; None: any.
        codes: size of the codebook; None for latents.
        record, sums: what the index says; None where there is none.
    """

    number: int
    digest: str | None
    layout: Layout | None
    first_index: int
    images: int
    classes: int | None
    codes: int | None
    record: ShardRecord | None
    sums: np.ndarray | None


@dataclass
class ShardReport:
    """What was found. `findings`: (file, kind, message, rows, cure), rows None for all of the shard.

    Attributes:
        header: of the sidecar, where it can be relied on.
        samples: of the sidecar, where it can be relied on; kept for the names of damaged samples.
        rejected: images left out; None where the sidecar cannot be relied on, or was not read whole.
        indices: of the shard's rows, where its bytes are right.
        misplaced: the number of the shard whose sidecar lies here instead.
        bytes_read: of the shard.
    """

    number: int
    findings: list[tuple[str, Kind, str, list[int] | None, Cure]] = field(default_factory=list)
    header: Header | None = None
    samples: list[Sample] | None = None
    rejected: list[Rejection] | None = None
    indices: np.ndarray | None = None
    misplaced: int | None = None
    bytes_read: int = 0

    def add(self, file: str, kind: Kind, message: str, rows: list[int] | None = None, cure: Cure = "encode") -> None:
        self.findings.append((file, kind, message, rows, cure))


def check_shard(folder: Folder, place: Place, sizes: dict[str, int], quick: bool) -> ShardReport:
    """Look at a shard and its sidecar. `sizes`: of the files of the folder.

    Raises:
        UserError: the folder cannot be reached.
    """
    report = ShardReport(place.number)
    _check_sidecar(folder, place, sizes, quick, report)
    name = shard_name(place.number)
    if name not in sizes:
        report.add(name, "missing", "is not there")
        _name_samples(folder, place, report)
        return report
    try:
        scan = scan_header(folder, name, sizes[name]) if quick else scan_shard(folder, name, place.layout, place.codes)
    except FileNotFoundError:
        report.add(name, "missing", "is not there")
        return report
    except OSError as error:
        report.add(name, "damaged", f"cannot be read ({error.strerror})")
        return report
    report.bytes_read = 0 if quick else scan.size_bytes
    if quick:
        _check_header(place, scan, report)
        _name_samples(folder, place, report)
    elif _is_as_written(folder, place, scan, report):
        report.indices = scan.indices
        _check_content(place, scan, report)
    return report


def _check_sidecar(folder: Folder, place: Place, sizes: dict[str, int], quick: bool, report: ShardReport) -> None:
    """Where its header only differs from the index, the bytes of the shard decide later which of them is damaged."""
    name = sidecar_name(place.number)
    if name not in sizes:
        report.add(name, "missing", "is not there")
        return
    try:
        header = read_header(folder, place.number)
        ShardIndex.of([header.record], [header.sums])  # or it holds what no index could
    except (UserError, ValueError, TypeError, AttributeError, OverflowError) as error:
        report.misplaced = _true_number(folder, name)
        if report.misplaced not in (None, place.number):
            report.add(name, "foreign", f"is the sidecar of {shard_name(report.misplaced or 0)}")
        else:
            report.misplaced = None
            report.add(name, "damaged", reason(error) if isinstance(error, UserError) else "its header cannot be right")
        return
    if place.digest is not None and header.origin != place.digest:
        ours = shard_name(place.number) in sizes and _origin_of(folder, place.number, sizes) == place.digest
        said = f"is of another plan ({short(header.origin)} and not {short(place.digest)})"
        report.add(name, "damaged" if ours else "foreign", said)
        return
    report.header = header
    if quick:
        if not _fits(header, place):
            report.add(name, "damaged", "its header does not fit the index")
        return
    try:
        sidecar = read_sidecar(folder, place.number)
        report.samples, report.rejected = sidecar.samples, sidecar.rejected
    except (UserError, ValueError, TypeError, KeyError) as error:
        report.add(name, "damaged", reason(error) if isinstance(error, UserError) else "its lines cannot be right")


def _name_samples(folder: Folder, place: Place, report: ShardReport) -> None:
    """Read the ids that a quick look does without, where something is wrong."""
    if report.findings and report.header is not None and report.samples is None:
        with contextlib.suppress(UserError, ValueError, TypeError, KeyError):
            report.samples = read_sidecar(folder, place.number).samples


def _fits(header: Header, place: Place) -> bool:
    """Whether a header is the one that the index has, where there is one."""
    if place.record is None or place.sums is None:
        return True
    return header.record == place.record and np.array_equal(header.sums, place.sums)


def _check_header(place: Place, scan: Scan, report: ShardReport) -> None:
    """What can be said without reading a shard's content."""
    name, record = shard_name(place.number), place.record or (report.header.record if report.header else None)
    if record is None:
        return
    if strange := _strangeness(place, scan):
        report.add(name, "foreign", strange)
    elif scan.size_bytes != record.size_bytes:
        report.add(name, "damaged", _size_message(scan.size_bytes, record.size_bytes))
    elif place.layout and (scan.tensors is None or row_count(scan.tensors, place.layout) != record.count):
        report.add(name, "damaged", "its header does not describe the tensors that it must hold")


def _is_as_written(folder: Folder, place: Place, scan: Scan, report: ShardReport) -> bool:
    """Whether the shard is the one that the index or its sidecar describes; says which of the three is not."""
    name, header = shard_name(place.number), report.header
    record = place.record or (header.record if header else None)
    if record is None:  # nothing says what its bytes were; its sidecar has a finding, so it is made again
        return False
    if scan.checksum == record.checksum:
        if header is not None and not _fits(header, place):
            report.add(sidecar_name(place.number), "damaged", "its first line is not the one that the index knows")
            report.header = None
        return True
    if header is not None and scan.checksum == header.record.checksum:
        report.add("", "stale", f"has another checksum of {name} than the shard itself and its sidecar", [], "rebuild")
        return True
    rows = _damaged_rows(folder, place, record, report, scan)
    if rows != [] and (strange := _strangeness(place, scan)):
        report.add(name, "foreign", strange)
        return False
    message = _size_message(scan.size_bytes, record.size_bytes) or "its checksum is not the recorded one"
    if rows == []:
        message += "; every row is as it was written, the damage is outside of them"
    report.add(name, "damaged", message, rows)
    return False


def _strangeness(place: Place, scan: Scan) -> str:
    """What a shard says of itself, where it belongs elsewhere."""
    if scan.origin is not None and place.digest is not None and scan.origin != place.digest:
        return f"is a shard of another plan ({short(scan.origin)} and not {short(place.digest)})"
    return f"is shard {scan.shard} of this set" if scan.shard not in (None, place.number) else ""


def _size_message(found: int, expected: int) -> str:
    if found < expected:
        return f"cut off, {found} of {expected} bytes are there"
    return f"{found - expected} bytes longer than it was" if found > expected else ""


def _check_content(place: Place, scan: Scan, report: ShardReport) -> None:
    """Whether a shard that is as it was written, and its sidecar, can be right."""
    name, sidecar, header = shard_name(place.number), sidecar_name(place.number), report.header
    layout, labels, indices = place.layout, scan.labels, scan.indices
    if layout is None:
        return
    if labels is None or indices is None or scan.tensors is None:
        report.add(name, "content", "does not hold the tensors that the plan says")
        return
    if scan.improper:
        what = "values are not finite" if place.codes is None else f"codes are outside of 0 to {place.codes - 1}"
        report.add(name, "content", what, scan.improper)
    highest = np.iinfo(np.int64).max if place.classes is None else place.classes - 1
    if bad := np.flatnonzero((labels < -1) | (labels > highest)).tolist():
        report.add(name, "content", f"labels are outside of -1 to {highest}, as {labels[bad[0]]}", bad)
    last = place.first_index + place.images - 1 if place.images else np.iinfo(np.int64).max
    wrong = (indices < place.first_index) | (indices > last)
    wrong[1:] |= indices[1:] <= indices[:-1]
    if bad := np.flatnonzero(wrong).tolist():
        report.add(name, "content", f"source indices are out of order, or not in {place.first_index} to {last}", bad)
    if header is None:
        return
    if scan.sums is not None and not scan.improper and not _close(header.sums, scan.sums, len(labels), layout):
        report.add(sidecar, "content", "its sums are not those of the shard's values, so statistics are wrong", [])
    record, samples, rejected = header.record, report.samples, report.rejected
    if samples is None or rejected is None:
        return
    if [sample.index for sample in samples] != indices.tolist():
        report.add(sidecar, "content", "its samples are not those of the shard")
    images = len(samples) + len(rejected)
    right = (len(indices), len(rejected), place.first_index, place.first_index + images - 1)
    found = (record.count, record.rejected, record.first_index, record.last_index)
    if found != right or (place.images and images > place.images):
        words = "count, rejected, first_index, last_index"
        report.add(sidecar, "content", f"{words} are {found} and must be {right}", [])


def _close(sums: np.ndarray, found: np.ndarray, rows: int, layout: Layout) -> bool:
    """Equal up to rounding. A sum of values may cancel: by Cauchy and Schwarz it is at most sqrt(n * their squares)."""
    if sums.shape != found.shape or not np.isfinite(sums).all():
        return False
    scale = np.abs(found)
    scale[0] = np.sqrt(found[1] * rows * len(layout.names) * np.prod(layout.latent_shape[1:]))
    return bool((np.abs(sums - found) <= SUMS_TOLERANCE * scale).all())


def _damaged_rows(
    folder: Folder, place: Place, record: ShardRecord, report: ShardReport, scan: Scan
) -> list[int] | None:
    """Rows that do not have the checksums of the sidecar; None: all, as far as can be said."""
    samples, layout = report.samples, place.layout
    fits = report.header is not None and _fits(report.header, place)
    if samples is None or layout is None or not fits or len(samples) != record.count:
        return None
    if not record.count:
        return []
    data = np.array(bytearray(folder.read(shard_name(place.number))), np.uint8)
    usable = scan.tensors is not None and row_count(scan.tensors, layout) == record.count
    extents = extents_of(scan.tensors) if scan.tensors and usable else usual_extents(layout, record.count)
    start = record.size_bytes - max(end for _, _, end in extents)
    there = len(data) - start
    data = np.concatenate([data, np.zeros(max(0, record.size_bytes - len(data)), np.uint8)])
    rows = {name: data[start + begin : start + end].reshape(record.count, -1) for name, begin, end in extents}
    damaged = {row for row, found in enumerate(row_checksums(rows)) if found != samples[row].checksum}
    for _, begin, end in extents:  # what was cut off may have been zeros
        row_bytes = (end - begin) // record.count
        damaged.update(range(max(0, there - begin) // row_bytes if row_bytes else record.count, record.count))
    return sorted(damaged)


def _true_number(folder: Folder, name: str) -> int | None:
    """Which shard a sidecar says that it belongs to."""
    try:
        return int(json.loads(folder.read(name).partition(b"\n")[0])["shard"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _origin_of(folder: Folder, number: int, sizes: dict[str, int]) -> str | None:
    """The digest of the plan that a shard says that it was made by."""
    name = shard_name(number)
    return scan_header(folder, name, sizes[name]).origin if name in sizes else None


def stray_samples(folder: Folder, name: str, record: ShardRecord) -> list[Sample] | None:
    """The samples of a sidecar that lies under another name, if it is the one that `record` describes."""
    try:
        first, _, body = folder.read(name).partition(b"\n")
        if checksum_bytes(first) != record.sidecar_checksum or checksum_bytes(body) != json.loads(first)["body"]:
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        return [Sample(**line) for line in lines if "reason" not in line]
    except (OSError, ValueError, KeyError, TypeError):
        return None


# What a shard's file turns out to hold: read once, in blocks, whatever its size, and whatever has become of it.

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
