"""`ldm-vae latents verify`: check that a set is intact and complete, and find the affected samples if it is not.

Every file is read once, in a few threads. A shard is compared with the checksums in the index and in its sidecar, the
index with the manifest, and the manifest with the plans, see `state`. The sidecar has a checksum of each row, which
finds the affected samples of a damaged shard. Nothing is changed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.files import checksum_bytes, write_json
from ldm_vae.latents.format import (
    STORED_DTYPES,
    Header,
    Layout,
    MisplacedSidecar,
    Rejection,
    Sample,
    ShardIndex,
    ShardRecord,
    open_set_folder,
    read_sidecar,
    read_sidecar_header,
    refuse_inside,
    shard_name,
    short,
    sidecar_name,
)
from ldm_vae.latents.normalizer import ROWS, channel_sums
from ldm_vae.latents.shard import arrays_in, kinds, parse_header, row_checksums
from ldm_vae.latents.state import (
    Affected,
    Cure,
    Finding,
    Kind,
    Segment,
    SetState,
    check_manifest,
    command_for,
    read_state,
)
from ldm_vae.latents.writer import LOCK, QUARANTINE
from ldm_vae.provenance import RUN_RECORD
from ldm_vae.storage.base import Folder, is_url
from ldm_vae.training import watchdog
from ldm_vae.utils.concurrency import in_order
from ldm_vae.utils.progress import BYTE, Progress, begin, end, end_dry_run, say
from ldm_vae.utils.text import pluralize, size_text

THREADS, REMOTE_THREADS = 4, 16
"""Number of shards read in parallel, if they are small."""
MEMORY_BYTES = 2 << 30
"""Approximate size of all shards read in parallel, each of which is in memory while it is checked."""
HEADER_BYTES = 1 << 13
"""Bytes of each shard that a quick verification reads."""
SHOWN_FINDINGS = 40
SUMS_TOLERANCE = 1e-9
"""Relative tolerance. exp differs in its last bits between processors, and so do the sums of variances."""


@dataclass(frozen=True)
class VerifyConfig:
    """`ldm-vae latents verify`.

    Reads every file once and compares it with the records in the others. Finds flipped bits, cut, missing and foreign
    files, wrong statistics and counts, and values that are not finite. Changes nothing; needs no images and no
    autoencoder. Exit code 0: intact; 1: damaged; 2: there is no finished set, or it cannot be reached.

      ldm-vae latents verify latents/mine
      ldm-vae latents verify s3://bucket/latents/mine --quick
      ldm-vae latents verify latents/mine report=damage.json

    Args:
        latents: the folder of a set, or its URL.
        quick: compare sizes, headers, index and manifest only; no shard is read.
        report: a JSON file to write, with all findings and samples.
    """

    latents: str = "???"
    quick: bool = False
    report: str | None = None


@dataclass(frozen=True)
class Verification:
    """The result of a verification.

    Attributes:
        location: location of the set.
        quick: only sizes, headers, index and manifest were compared.
        findings: the problems, in the order of the shards.
        notes: information other than damage, such as an unfinished segment.
        finished: whether it has, or had, a manifest.
        shards, count: number of shards and samples of the finished part, if known; of an unfinished set, those that
            exist.
        bytes_read, seconds: amount of data and time of the verification.
        command: the command that made the set.
    """

    location: str
    quick: bool
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    finished: bool
    shards: int
    count: int
    bytes_read: int
    seconds: float
    command: str = "ldm-vae encode"

    @property
    def whole(self) -> bool:
        """Whether there is no damage."""
        return not self.findings

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0 intact, 1 damaged, 2 not finished."""
        if not self.whole:
            return 1
        return 0 if self.finished else EXIT_USER_ERROR

    @property
    def samples(self) -> tuple[Affected, ...]:
        """All affected samples."""
        return tuple(dict.fromkeys(sample for finding in self.findings for sample in finding.samples))

    def to_dict(self) -> dict[str, Any]:
        """The report: plain containers, with every sample."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found = [
            {"file": finding.file, "kind": finding.kind, "message": finding.message, "cure": finding.cure,
             "samples": [asdict(sample) for sample in finding.samples]}
            for finding in self.findings
        ]  # fmt: skip
        return values | {"whole": self.whole, "notes": list(self.notes), "findings": found}

    def lines(self) -> list[str]:
        """The report as text; the last line is the next step."""
        return [*self.remarks(), f"{self.location}: {self.conclusion()}"]

    def remarks(self) -> list[str]:
        """The first findings, and all notes."""
        shown = [str(finding) for finding in self.findings[:SHOWN_FINDINGS]]
        if len(self.findings) > SHOWN_FINDINGS:
            shown.append(f"and {len(self.findings) - SHOWN_FINDINGS} more; report=FILE.json lists all")
        return [*shown, *(f"note: {note}" for note in self.notes)]

    def conclusion(self) -> str:
        """The summary and the next step."""
        checked = "sizes and headers are right" if self.quick else "every byte is as it was written"
        speed = f" ({size_text(self.bytes_read)} in {self.seconds:.1f} s)" if self.bytes_read else ""
        if self.seconds < 0.05:  # shown as 0.0
            speed = ""
        size = f"{pluralize(self.count, 'sample')} in {pluralize(self.shards, 'shard')}"
        if self.whole and self.finished:
            more = "; without --quick the content is compared too" if self.quick else ""
            return f"whole: {size}, {checked}{speed}{more}"
        if self.whole:
            return f"not finished: {size} so far, {checked}{speed}; run the same `{self.command}` command again"
        affected = len(self.samples)
        damage = f"{affected} of {self.count} samples" if affected else "no samples"
        things = "1 thing is" if len(self.findings) == 1 else f"{len(self.findings)} things are"
        return f"{things} wrong, {damage} affected{speed}; {self._advice()}"

    def _advice(self) -> str:
        cures = {finding.cure for finding in self.findings}
        if cures == {"none"}:
            return "nothing in the set can repair this: encode again to another output"
        if cures == {"remove"}:
            return "move these files elsewhere, or let `ldm-vae latents repair ... --remove-foreign` delete them"
        if self.command != "ldm-vae encode":
            return f"run the same `{self.command}` command again, which makes damaged files again"
        remove = " --remove-foreign" if "remove" in cures else ""
        return (
            f"run `ldm-vae latents repair ...{remove}` with the settings of the `ldm-vae encode` command that made it"
        )


def verify_latents(config: VerifyConfig, *, dry_run: bool = False) -> Verification:
    """Verify a set, print what was found, and write the report.

    `dry_run`: only compare the sizes and headers. Raises: UserError, see `verify`.
    """
    if config.report:
        refuse_inside(config.report, "report")
    if dry_run:
        verification = verify(config.latents, quick=True, command="latents verify")
        end_dry_run(config.latents, "the time that reading every byte takes was not measured")
        return verification
    verification = verify(config.latents, quick=config.quick, progress=True, command="latents verify")
    if config.report:
        write_json(Path(config.report), verification.to_dict())
    say_verification(verification)
    return verification


def say_verification(verification: Verification) -> None:
    """Print the findings and the next command: the statistics of an intact set, the repair of a damaged one."""
    for line in verification.remarks():
        say(line)
    words = ["ldm-vae", "latents", "stats", verification.location]
    if not verification.whole:
        words = repair_words(verification.location)
    end(verification.location, verification.conclusion(), words if verification.finished else [])


def repair_words(location: str) -> list[str]:
    """The words of the `latents repair` command of a set, from the recorded encode command; empty if not recorded."""
    try:
        command = json.loads(open_set_folder(location).read(RUN_RECORD))["command"]
        words = command[2:] if command[0] == "ldm-vae" and command[1] == "encode" else []
    except (OSError, UserError, ValueError, LookupError, TypeError):
        return []
    kept = [word for word in words if isinstance(word, str) and not re.match(r"(--)?(output|out)=", word)]
    options = [word for word in kept if re.match(r"--(output|out)$|(--)?share|(--)?resolution=.*,", word)]
    missing = [word for word in kept if re.match(r"[^=-]+$", word) and not Path(word).expanduser().exists()]
    if len(kept) != len(words) - 1 or options or missing:
        return []  # the output has another form, or there are several sets, or it was typed in another folder
    return ["ldm-vae", "latents", "repair", *kept, f"output={location}"]


def verify(location: str | Path, quick: bool = False, progress: bool = False, command: str = "") -> Verification:
    """Compare all files with each other, without the images and the autoencoder.

    Memory: 16 bytes per sample for the hashes of ids, and the shards that are read in parallel.

    Args:
        location: the folder, or its URL.
        quick: compare sizes, headers, index and manifest only.
        progress: show a bar.
        command: name of the command for the first line; empty: no first line.

    Raises:
        UserError: there is no set, it has another format version, or it cannot be reached.
    """
    started, folder = time.monotonic(), open_set_folder(location)
    state = read_state(folder)
    survey = _Survey(state)
    places = list(_places(state))
    sizes = [state.sizes.get(shard_name(place.number), 0) for place in places]
    threads = REMOTE_THREADS if is_url(location) else THREADS
    if not quick:
        threads = max(1, min(threads, MEMORY_BYTES // max([1, *sizes])))
    if command:
        extent = "sizes and headers" if quick else f"every byte of {size_text(sum(sizes))}"
        begin(command, str(location), pluralize(len(places), "shard"), extent)
    check = partial(check_shard, folder, sizes=state.sizes, quick=quick)
    with Progress("verify", sum(sizes), BYTE, shown=progress and not quick) as bar:
        for place, report in in_order(check, places, threads=threads, ahead=2 * threads):
            survey.add(place, report)
            bar.advance(report.bytes_read)
            watchdog.advance()
    findings, notes = [*state.findings, *survey.findings()], list(_notes(state))
    index = survey.index()
    if index is not None:
        findings += check_manifest(state, index)
    if state.finished:
        findings += _check_quarantine(state, survey, quick)
        if survey.lists_unfinished:
            notes.append(f"{QUARANTINE} lists the images of the unfinished segment already")
    counts = survey.counts.clip(min=0) if state.finished else np.array(survey.unlisted, np.int64)
    return Verification(
        str(location), quick, tuple(findings), tuple(notes), state.finished, len(counts), int(counts.sum()),
        survey.bytes_read, time.monotonic() - started, state.command,
    )  # fmt: skip


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
            yield f"{holder} is using this folder: unfinished files may look damaged"


# The expected properties of each shard.


@dataclass(frozen=True)
class ExpectedShard:
    """The expected properties of a shard.

    Attributes:
        digest: digest of the plan of its segment; None if unknown.
        layout: None if no plan is known; the content is not checked then.
        first_index, images: its range of source indices; 0 images: unknown.
        classes: number of labels; None: unknown.
        codes: size of the codebook; None for latents.
        record, sums: its entries in the index; None without an index.
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

    def is_described_by(self, header: Header) -> bool:
        """Whether the header of a sidecar matches the index, if there is one."""
        if self.record is None or self.sums is None:
            return True
        return header.record == self.record and np.array_equal(header.sums, self.sums)


def _places(state: SetState) -> Iterator[ExpectedShard]:
    """Every required shard, and the existing shards of unfinished segments."""
    known = state.manifest is not None or all(segment.origin for segment in state.segments)
    classes = len(state.label_names) or None if known else None
    for segment in state.segments:
        end = segment.first_shard + (segment.shards or 0)
        for number in range(segment.first_shard, end) if segment.listed else _present(state, segment):
            yield _place(state, segment, number, classes)


def _present(state: SetState, segment: Segment) -> list[int]:
    """The existing shards of an unfinished segment, with their sidecars."""
    numbers = state.sidecar_numbers()
    return sorted(number for number in numbers if number in segment and shard_name(number) in state.sizes)


def _place(state: SetState, segment: Segment, number: int, classes: int | None) -> ExpectedShard:
    origin, index = segment.origin, state.index if segment.listed else None
    unit = origin.encoding["shard_size"] if origin else 0
    return ExpectedShard(
        number=number,
        digest=segment.digest,
        layout=origin.layout if origin else None,
        first_index=origin.first_index + (number - segment.first_shard) * unit if origin else 0,
        images=unit,
        classes=classes,
        codes=origin.encoding.get("codebook_size") if origin else None,
        record=index[number] if index else None,
        sums=index.sums[number] if index else None,
    )


# One shard and its sidecar.


@dataclass
class ShardReport:
    """The result for one shard. `findings`: (file, kind, message, rows, cure); rows None: all of the shard.

    Attributes:
        header, samples: those of the sidecar, if it is reliable.
        rejected: rejected images; None if the sidecar is not reliable, or was not read completely.
        indices: source indices of the shard's rows, if its bytes are right.
        misplaced: the number of the shard whose sidecar is here instead.
        bytes_read: number of bytes read of the shard.
    """

    findings: list[tuple[str, Kind, str, list[int] | None, Cure]] = field(default_factory=list)
    header: Header | None = None
    samples: list[Sample] | None = None
    rejected: list[Rejection] | None = None
    indices: np.ndarray | None = None
    misplaced: int | None = None
    bytes_read: int = 0

    def add(self, file: str, kind: Kind, message: str, rows: list[int] | None = None, cure: Cure = "encode") -> None:
        self.findings.append((file, kind, message, rows, cure))


@dataclass
class ShardFile:
    """The bytes of a shard (for a quick verification, the first ones) and its header.

    Attributes:
        tensors, start: see `shard.parse_header`; None if the header cannot be read.
        origin, number: digest of the plan and number of the shard, from the header.
    """

    data: bytes
    size_bytes: int
    tensors: dict[str, Any] | None = None
    start: int = 0
    origin: str | None = None
    number: int | None = None

    def __post_init__(self) -> None:
        try:
            self.tensors, metadata, self.start = parse_header(self.data)
            self.origin, self.number = metadata["origin"], metadata["shard"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.tensors = None

    def holds(self, layout: Layout, count: int) -> bool:
        """Whether the header describes the tensors of `count` samples."""
        return self.tensors is not None and kinds(self.tensors) == layout.tensors(count)

    def strangeness(self, place: ExpectedShard) -> str:
        """The origin of a shard that belongs elsewhere, as text."""
        if self.origin is not None and place.digest is not None and self.origin != place.digest:
            return f"is a shard of another plan ({short(self.origin)} and not {short(place.digest)})"
        return f"is shard {self.number} of this set" if self.number not in (None, place.number) else ""


def check_shard(folder: Folder, place: ExpectedShard, sizes: dict[str, int], quick: bool) -> ShardReport:
    """Check a shard and its sidecar. `sizes`: sizes of the files of the folder.

    Raises:
        UserError: the folder cannot be reached.
    """
    report, name = ShardReport(), shard_name(place.number)
    _check_sidecar(folder, place, sizes, quick, report)
    try:
        if name not in sizes:
            raise FileNotFoundError
        file = ShardFile(folder.read(name, HEADER_BYTES if quick else None), sizes[name])
    except FileNotFoundError:
        report.add(name, "missing", "is not there")
    except OSError as error:
        report.add(name, "damaged", f"cannot be read ({error.strerror})")
    else:
        if quick:
            _check_header(place, file, report)
        else:
            report.bytes_read = file.size_bytes = len(file.data)
            _check_bytes(place, file, report)
    if quick and report.findings and report.header is not None:
        report.samples = _samples_of(folder, place.number, sidecar_name(place.number))
    return report


def _check_sidecar(
    folder: Folder, place: ExpectedShard, sizes: dict[str, int], quick: bool, report: ShardReport
) -> None:
    """Check a sidecar. If only its header differs from the index, the shard's bytes decide later which is damaged."""
    name = sidecar_name(place.number)
    if name not in sizes:
        report.add(name, "missing", "is not there")
        return
    try:
        header = read_sidecar_header(folder, place.number)
        if place.digest is not None and header.origin != place.digest:
            message = f"is of another plan ({short(header.origin)} and not {short(place.digest)})"
            report.add(name, "foreign", message)
            return
        report.header = header
        if quick:
            if not place.is_described_by(header):
                report.add(name, "damaged", "its header does not fit the index")
            return
        sidecar = read_sidecar(folder, place.number)
        report.samples, report.rejected = sidecar.samples, sidecar.rejected
    except MisplacedSidecar as error:
        report.misplaced = error.number
        report.add(name, "foreign", error.what)
    except UserError as error:
        report.add(name, "damaged", error.what)


def _samples_of(folder: Folder, number: int, name: str, record: ShardRecord | None = None) -> list[Sample] | None:
    """The samples of a shard in the sidecar file `name`, if it is intact and belongs to `record`."""
    try:
        sidecar = read_sidecar(folder, number, name)
    except UserError:
        return None
    return sidecar.samples if record in (None, sidecar.header.record) else None


def _check_header(place: ExpectedShard, file: ShardFile, report: ShardReport) -> None:
    """All checks that need no reading of a shard."""
    name, record = shard_name(place.number), place.record or (report.header.record if report.header else None)
    if record is None:
        return
    if strange := file.strangeness(place):
        report.add(name, "foreign", strange)
    elif file.size_bytes != record.size_bytes:
        report.add(name, "damaged", _size_message(file.size_bytes, record.size_bytes))
    elif place.layout and not file.holds(place.layout, record.count):
        report.add(name, "damaged", "its header does not describe the tensors that it must hold")


def _check_bytes(place: ExpectedShard, file: ShardFile, report: ShardReport) -> None:
    """Compare a shard with the checksums in the index and in its sidecar, to find which of the three is damaged."""
    name, header = shard_name(place.number), report.header
    record = place.record or (header.record if header else None)
    if record is None:  # there is no checksum; its sidecar has a finding, so it is made again
        return
    found = checksum_bytes(file.data)
    if found != record.checksum and (header is None or found != header.record.checksum):
        rows = _damaged_rows(place, record, file, report)
        strange = "" if rows == [] else file.strangeness(place)
        message = _size_message(file.size_bytes, record.size_bytes) or "its checksum is not the recorded one"
        if rows == []:
            message += "; all rows are intact, the damage is outside of them"
        report.add(name, "foreign" if strange else "damaged", strange or message, None if strange else rows)
        return
    if found != record.checksum:
        message = f"has another checksum of {name} than the shard itself and its sidecar"
        report.add("", "stale", message, [], "rebuild")
    elif header is not None and not place.is_described_by(header):
        report.add(sidecar_name(place.number), "damaged", "its first line does not fit the index")
        report.header = None
    if place.layout is not None:
        _check_content(place, place.layout, file, report)


def _size_message(found: int, expected: int) -> str:
    if found < expected:
        return f"cut off, {found} of {expected} bytes are there"
    return f"{found - expected} bytes longer than it was" if found > expected else ""


def _damaged_rows(place: ExpectedShard, record: ShardRecord, file: ShardFile, report: ShardReport) -> list[int] | None:
    """Rows with other checksums than in the sidecar; None: all, if unknown."""
    samples, layout, header = report.samples, place.layout, report.header
    if samples is None or layout is None or header is None or not place.is_described_by(header):
        return None
    if len(samples) != record.count or not record.count:
        return None if record.count else []
    extents = _usual_extents(layout, record.count)
    if file.holds(layout, record.count):
        extents = {name: tuple(tensor["data_offsets"]) for name, tensor in (file.tensors or {}).items()}
    start = record.size_bytes - max(end for _, end in extents.values())
    data = np.frombuffer(file.data.ljust(record.size_bytes, b"\0"), np.uint8)[start:]
    rows = {name: data[first:last].reshape(record.count, -1) for name, (first, last) in extents.items()}
    damaged = {row for row, found in enumerate(row_checksums(rows)) if found != samples[row].checksum}
    for first, last in extents.values():  # what was cut off may have been zeros
        row_bytes = (last - first) // record.count
        damaged.update(range(max(0, len(file.data) - start - first) // row_bytes, record.count))
    return sorted(damaged)


def _usual_extents(layout: Layout, count: int) -> dict[str, tuple[int, int]]:
    """Tensor name -> (begin, end) in the order of safetensors: wide types first, then by name."""
    extents, begin = {}, 0
    for name in ("index", "label", *layout.names):
        end = begin + count * (8 if name in ("index", "label") else layout.sample_bytes // len(layout.names))
        extents[name] = (begin, end)
        begin = end
    return extents


def _check_content(place: ExpectedShard, layout: Layout, file: ShardFile, report: ShardReport) -> None:
    """Check that the content of an unchanged shard and its sidecar is plausible."""
    name, sidecar, header = shard_name(place.number), sidecar_name(place.number), report.header
    record = place.record or (header.record if header else None)
    count = record.count if record else 0
    if not file.holds(layout, count):
        report.add(name, "content", "does not hold the tensors of the plan")
        return
    arrays = arrays_in(file.data, file.tensors or {}, file.start)
    labels, report.indices = arrays["label"], arrays["index"]
    sums, improper = _measure(arrays, layout, place.codes)
    if improper:
        what = "values are not finite" if place.codes is None else f"codes are outside of 0 to {place.codes - 1}"
        report.add(name, "content", what, improper)
    highest = np.iinfo(np.int64).max if place.classes is None else place.classes - 1
    if bad := np.flatnonzero((labels < -1) | (labels > highest)).tolist():
        report.add(name, "content", f"labels are outside of -1 to {highest}, as {labels[bad[0]]}", bad)
    last = place.first_index + place.images - 1 if place.images else np.iinfo(np.int64).max
    wrong = (report.indices < place.first_index) | (report.indices > last)
    wrong[1:] |= report.indices[1:] <= report.indices[:-1]
    if bad := np.flatnonzero(wrong).tolist():
        report.add(name, "content", f"source indices are out of order, or not in {place.first_index} to {last}", bad)
    if header is None:
        return
    if not improper and not _close(header.sums, sums, count, layout):
        report.add(sidecar, "content", "its sums are not those of the shard's values, so statistics are wrong", [])
    _check_counts(place, header.record, report)


def _check_counts(place: ExpectedShard, record: ShardRecord, report: ShardReport) -> None:
    """Check that a sidecar lists the samples of its shard and counts them right."""
    name, samples, rejected, indices = sidecar_name(place.number), report.samples, report.rejected, report.indices
    if samples is None or rejected is None or indices is None:
        return
    if [sample.index for sample in samples] != indices.tolist():
        report.add(name, "content", "its samples are not those of the shard")
    images = len(samples) + len(rejected)
    right = (len(indices), len(rejected), place.first_index, place.first_index + images - 1)
    found = (record.count, record.rejected, record.first_index, record.last_index)
    if found != right or (place.images and images > place.images):
        words = "count, rejected, first_index, last_index"
        report.add(name, "content", f"{words} are {found} and must be {right}", [])


def _measure(arrays: dict[str, np.ndarray], layout: Layout, codes: int | None) -> tuple[np.ndarray, list[int]]:
    """(sums (3, c), rows with impossible values) of the content of a shard."""
    values = [arrays[name] for name in layout.names]
    if layout.content == "indices":
        highest = np.iinfo(values[0].dtype).max if codes is None else codes - 1
        bad = [((part < 0) | (part > highest)).reshape(len(part), -1).any(1) for part in values]
        return np.zeros((len(ROWS), 0)), np.flatnonzero(np.any(bad, axis=0)).tolist()
    tensors = [torch.from_numpy(part.copy()).view(STORED_DTYPES[layout.dtype]) for part in values]
    with np.errstate(all="ignore"):
        sums = channel_sums(tensors, layout.latent_shape[0])
    if np.isfinite(sums).all():
        return sums, []
    bad = [~part.float().isfinite().flatten(1).all(1).numpy() for part in tensors]
    return sums, np.flatnonzero(np.any(bad, axis=0)).tolist()


def _close(sums: np.ndarray, found: np.ndarray, rows: int, layout: Layout) -> bool:
    """Equal up to rounding. A sum of values may cancel: by Cauchy and Schwarz it is at most sqrt(n * their squares)."""
    if sums.shape != found.shape or not np.isfinite(sums).all():
        return False
    scale = np.abs(found)
    scale[0] = np.sqrt(found[1] * rows * len(layout.names) * np.prod(layout.latent_shape[1:]))
    return bool((np.abs(sums - found) <= SUMS_TOLERANCE * scale).all())


# All shards together: counts, affected samples, ids, rejected images.


class _Survey:
    """The sum of the reports on shards. For shards without findings, only counts and hashes are kept."""

    def __init__(self, state: SetState) -> None:
        self.state = state
        self.counts = np.full(state.shards, -1, np.int64) if state.index is None else state.index.counts.copy()
        self.bad: list[tuple[ExpectedShard, ShardReport]] = []
        self.stray: dict[int, str] = {}
        self.hashes: list[tuple[int, np.ndarray]] = []
        self.headers: list[Header] = []
        self.rejected: list[Rejection] | None = []
        self.unlisted: list[int] = []
        self.unlisted_rejected: list[Rejection] = []
        self.lists_unfinished = False
        self.bytes_read = 0

    def add(self, place: ExpectedShard, report: ShardReport) -> None:
        import xxhash

        number, header = place.number, report.header
        self.bytes_read += report.bytes_read
        if number < len(self.counts):
            if header and self.state.index is None:
                self.counts[number] = header.record.count
                self.headers.append(header)
            if report.rejected is None and (place.record is None or place.record.rejected):
                self.rejected = None
            elif self.rejected is not None:
                self.rejected += report.rejected or []
        else:
            self.unlisted.append(header.record.count if header else 0)
            self.unlisted_rejected += report.rejected or []
        if report.samples is not None:
            hashes = (xxhash.xxh3_64_intdigest(sample.id.encode()) for sample in report.samples)
            self.hashes.append((number, np.fromiter(hashes, np.uint64, len(report.samples))))
        if report.misplaced is not None:
            self.stray[report.misplaced] = sidecar_name(number)
        if report.findings:
            self.bad.append((place, report))

    def index(self) -> ShardIndex | None:
        """The index of the finished part; if it is damaged, derived from the sidecars if all are intact."""
        if self.state.index is not None or not self.headers or len(self.headers) < len(self.counts):
            return self.state.index
        return ShardIndex.of([header.record for header in self.headers], [header.sums for header in self.headers])

    def findings(self) -> Iterator[Finding]:
        """The findings of the shards, with the affected samples, then those of ids."""
        for place, report in self.bad:
            for file, kind, message, rows, cure in report.findings:
                samples = self._affected(place, report, rows)
                yield Finding(file or self.state.index_file(place.number), kind, message, samples, cure, place.number)
        yield from self._duplicates()

    def _affected(self, place: ExpectedShard, report: ShardReport, rows: list[int] | None) -> tuple[Affected, ...]:
        first, number, record = self._first_sample(place.number), place.number, place.record
        samples, indices = report.samples, report.indices
        if samples is None and record is not None and number in self.stray:
            samples = _samples_of(self.state.folder, number, self.stray[number], record)
        if samples is not None:
            known: list[int | None] = [sample.index for sample in samples]
        elif indices is not None:
            known = indices.tolist()
        else:
            count = record.count if record else max(0, int(self.counts[number]) if number < len(self.counts) else 0)
            whole = record is not None and not record.rejected and place.layout is not None
            known = [place.first_index + row if whole else None for row in range(count)]
        chosen = range(len(known)) if rows is None else [row for row in rows if row < len(known)]
        return tuple(
            Affected(None if first is None else first + row, known[row], samples[row].id if samples else None)
            for row in chosen
        )

    def _first_sample(self, shard: int) -> int | None:
        """The number of a shard's first sample in the set; None if the size of an earlier shard is unknown."""
        return int(self._starts[shard]) if shard < len(self._starts) else None

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first sample of each shard, up to the first shard of unknown size."""
        unknown = np.flatnonzero(self.counts < 0)
        known = self.counts[: unknown[0]] if len(unknown) else self.counts
        return np.concatenate([[0], known.cumsum()])

    def _duplicates(self) -> Iterator[Finding]:
        every = np.concatenate([np.empty(0, np.uint64), *(hashes for _, hashes in self.hashes)])
        every.sort()
        doubled = np.unique(every[1:][every[1:] == every[:-1]])
        if not len(doubled):
            return
        found: dict[str, tuple[int, Affected]] = {}
        for number, hashes in self.hashes:
            rows = np.flatnonzero(np.isin(hashes, doubled)).tolist()
            samples = read_sidecar(self.state.folder, number).samples if rows else []
            first = self._first_sample(number)
            for row in rows:
                sample = samples[row]
                here = (number, Affected(None if first is None else first + row, sample.index, sample.id))
                other, before = found.setdefault(sample.id, here)
                if before is here[1]:
                    continue
                message = (
                    f"the id {sample.id} is in {sidecar_name(other)} too" if other != number else "has an id twice"
                )
                yield Finding(sidecar_name(number), "duplicate", message, (before, here[1]), "none", number)


def _check_quarantine(state: SetState, survey: _Survey, quick: bool) -> Iterator[Finding]:
    """Compare the list of rejected images with the sidecars.

    It is published before the manifest, so it may already list images of a segment that is about to be finished.
    """
    if QUARANTINE not in state.sizes:
        yield Finding(QUARANTINE, "missing", "is not there")
        return
    found = state.folder.read(QUARANTINE)
    if quick:
        lines = found.count(b"\n")
        if state.manifest and not survey.unlisted and lines != state.manifest.rejected:
            yield Finding(QUARANTINE, "damaged", f"has {lines} lines and not {state.manifest.rejected}")
    elif survey.rejected is None or _lists(found, survey.rejected):
        return  # if a sidecar with rejected images is damaged, this file will be made again with it
    elif survey.unlisted_rejected and _lists(found, [*survey.rejected, *survey.unlisted_rejected]):
        survey.lists_unfinished = True
    else:
        yield Finding(QUARANTINE, "damaged", "does not list the rejected images of the sidecars")


def _lists(found: bytes, rejected: list[Rejection]) -> bool:
    """Whether a list of rejected images holds exactly these. Other spaces, from another program, are allowed."""
    right = [asdict(rejection) for rejection in rejected]
    expected = "".join(json.dumps(line) + "\n" for line in right).encode()
    if len(found) == len(expected) or found + b"\n" == expected:  # a damaged byte may leave the values equal
        return found == expected
    try:
        return [json.loads(line) for line in found.splitlines()] == right
    except (ValueError, RecursionError):
        return False
