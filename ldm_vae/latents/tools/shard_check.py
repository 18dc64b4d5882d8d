"""One shard and its sidecar: are they the bytes that were written, for this place, and can they be right?

A shard is read once, in blocks, whatever its size; only one that is damaged is read again, whole, to compare its rows
with their checksums. Knows nothing of the set but what `Place` says.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field

import numpy as np

from ldm_vae.errors import UserError
from ldm_vae.files import checksum_bytes
from ldm_vae.latents.contents import Layout
from ldm_vae.latents.index import ShardIndex, ShardRecord, shard_name, sidecar_name
from ldm_vae.latents.manifest import short
from ldm_vae.latents.shard import row_checksums
from ldm_vae.latents.sidecar import Header, Rejection, Sample, read_header, read_sidecar
from ldm_vae.latents.tools.findings import Cure, Kind, reason
from ldm_vae.latents.tools.shard_scan import Scan, extents_of, row_count, scan_header, scan_shard, usual_extents
from ldm_vae.storage import Folder

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
