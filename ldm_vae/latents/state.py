"""What the records of a set say: its plans, its manifest and its index, each judged by the others.

A plan is known by its digest, which the manifest and every sidecar carry; the manifest has one of its own and lists
the checksum of the index; and what one of them lost is in the others. Reads no shard.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from itertools import islice
from operator import add
from typing import Any, Literal

from ldm_vae import config as configuration
from ldm_vae.errors import UserError
from ldm_vae.files import check_tensor_header, checksum_bytes, readable_json
from ldm_vae.latents.format import (
    ALGORITHM,
    INDEX_NAME,
    MANIFEST,
    IndexPart,
    Manifest,
    Origin,
    Recipe,
    ShardIndex,
    measure,
    merge_label_names,
    plan_name,
    planned_shards,
    read_header,
    read_index,
    read_manifest,
    read_origin,
    short,
)
from ldm_vae.latents.writer import SIDECAR_NAME
from ldm_vae.storage.base import Folder
from ldm_vae.utils.text import pluralize, size_text

PLAN_NAME = re.compile(r"plan(?:-(\d{6}))?\.json")
SHARD_NAME = re.compile(r"shard-(\d{6,})\.(?:safetensors|jsonl)")
IMPORTED = "lightningdit"
"""The source of a set that was imported: no image is there that could be encoded again."""
WITNESSES = 8
"""Sidecars that are asked for the digest of their plan where no manifest has it."""


@dataclass(frozen=True)
class Segment:
    """A part of a set with a plan of its own.

    Attributes:
        number: 0 for the first encoding.
        digest: of the plan as it was written; None where nothing says so.
        origin: the plan as it was written, from elsewhere where its file is damaged; None where it is lost.
        first_shard: its shards begin here.
        shards: how many it has; None for a stream that has not come to its end.
        listed: it belongs to the finished set.
    """

    number: int
    digest: str | None
    origin: Origin | None
    first_shard: int
    shards: int | None
    listed: bool

    def __contains__(self, number: int) -> bool:
        return number >= self.first_shard and (self.shards is None or number < self.first_shard + self.shards)


@dataclass
class SetState:
    """A set, as far as its records can be relied on.

    Attributes:
        sizes: name -> bytes of its files.
        manifest, index: None where they are damaged or not there.
        findings: about plans, manifest and index.
        finished: there is a manifest, or an index, which is published just before it.
    """

    folder: Folder
    sizes: dict[str, int]
    manifest: Manifest | None = None
    index: ShardIndex | None = None
    segments: list[Segment] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    finished: bool = True

    def add(self, file: str, kind: Kind, message: str, **more: Any) -> None:
        self.findings.append(Finding(file, kind, message, **more))

    @property
    def listed(self) -> list[Segment]:
        return [segment for segment in self.segments if segment.listed]

    @property
    def shards(self) -> int:
        """Of the finished part."""
        return sum(segment.shards or 0 for segment in self.listed)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Of all segments whose plan is known; what is there of an unfinished one uses its names too."""
        names = self.manifest.label_names if self.manifest else ()
        for segment in self.segments:
            if segment.origin:
                names = merge_label_names(names, segment.origin.dataset["label_names"])
        return names

    @property
    def command(self) -> str:
        """The command that made the first segment."""
        origin = self.segments[0].origin
        return command_for(0, origin.dataset if origin else self.manifest.datasets[0] if self.manifest else {})

    def index_file(self, shard: int) -> str:
        """Where the record of a shard is."""
        last = 0
        for part in self.manifest.index if self.manifest else ():
            last += part.shards
            if shard < last:
                return part.file
        return MANIFEST

    def segment_of(self, shard: int) -> Segment | None:
        return next((segment for segment in self.segments if shard in segment), None)


def command_for(segment: int, dataset: Mapping[str, Any]) -> str:
    """The command that makes a segment. `dataset`: of its plan."""
    if segment:
        return "ldm-vae latents append"
    return "ldm-vae latents import" if dataset.get("source") == IMPORTED else "ldm-vae encode"


def read_state(folder: Folder) -> SetState:
    """Raises: UserError where there is no set, or one of another format version."""
    state = SetState(folder, folder.sizes())
    names = state.sizes
    if MANIFEST not in names and plan_name(0) not in names and not any(map(SHARD_NAME.fullmatch, names)):
        read_manifest(folder)  # says so
    state.finished = MANIFEST in names or any(map(INDEX_NAME.fullmatch, names))
    _read_manifest(state)
    _read_segments(state)
    _read_index(state)
    if state.manifest is None:
        _guess_listed(state)
    state.findings += _foreign(state)
    return state


def _read_manifest(state: SetState) -> None:
    if MANIFEST not in state.sizes:
        if state.finished:
            state.add(MANIFEST, "missing", "is not there, and the set was finished once")
        return
    try:
        state.manifest = read_manifest(state.folder)
        data = state.folder.read(MANIFEST)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:  # whatever a flipped bit can lead to
        own = isinstance(error, UserError) and f"/{MANIFEST}: " in str(error)
        said = reason(error).split(" (")[0] if own and isinstance(error, UserError) else ""
        if "format version" in said and _is_version(state.folder, said):
            raise
        state.add(MANIFEST, "damaged", said or "damaged or edited, its digest does not fit its content")
        return
    if _is_other_writing(data):
        state.add(MANIFEST, "damaged", "is not written as it was, though it says the same")


def _is_version(folder: Folder, said: str) -> bool:
    """Whether the plan is of another format version too: then this is no damage."""
    try:
        read_origin(folder)
    except UserError as error:
        return "format version" in str(error)
    return False


def _is_other_writing(data: bytes) -> bool:
    """Equal in length to what `readable_json` makes of the content, but not equal: a flipped bit, as in 1E-05; or cut
    off before the last newline. Another writer's way with spaces and order is no damage."""
    right = readable_json(json.loads(data)).encode()
    return data != right and (len(data) == len(right) or data + b"\n" == right)


def _read_segments(state: SetState) -> None:
    manifest = state.manifest
    matches = [match for match in map(PLAN_NAME.fullmatch, state.sizes) if match]
    numbers = [int(match[1] or 0) for match in matches]
    listed = len(manifest.datasets) if manifest else 0
    shards_before = 0
    for number in range(max([listed, *(number + 1 for number in numbers), 1])):
        found, trouble = _read_plan(state, number)
        if manifest and number < listed:
            segment = _listed_segment(state, manifest, number, found, trouble)
        else:
            segment = _other_segment(state, number, found, trouble, shards_before)
        state.segments.append(segment)
        shards_before = segment.first_shard + (segment.shards or 0)


def _read_plan(state: SetState, number: int) -> tuple[Origin | None, str]:
    """(the plan as it stands, what is wrong with it)."""
    name = plan_name(number)
    if name not in state.sizes:
        return None, "is not there"
    try:
        origin = read_origin(state.folder, number)
        origin.layout.tensors(1), origin.digest, planned_shards(origin)
        unlike = _is_other_writing(state.folder.read(name))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, OverflowError) as error:
        said = reason(error).split(" (")[0] if isinstance(error, UserError) else ""
        if "format version" in said and state.manifest is None and MANIFEST not in state.sizes:
            raise
        return None, said or "damaged"
    return origin, "is not written as it was, though it says the same" if unlike else ""


def _listed_segment(
    state: SetState, manifest: Manifest, number: int, found: Origin | None, trouble: str
) -> Segment:  # fmt: skip
    record = manifest.datasets[number]
    origin = found
    if found is None or found.digest != record["plan"]:
        origin = rebuilt_origin(manifest, number)
        if found is not None:
            changes = configuration.changed_keys(
                configuration.to_dict(origin) if origin else {}, configuration.to_dict(found)
            )
            trouble = "its digest is not the recorded"  # all that is to say of, for one, a renamed key without a value
            for key, (right, wrong) in list(changes.items())[:1] if origin else ():
                trouble = f"{key} is {short(wrong)} and was {short(right)}"
    if trouble:
        kind: Kind = "damaged" if plan_name(number) in state.sizes else "missing"
        state.add(plan_name(number), kind, trouble, cure="plan")
    following = [record["first_shard"] for record in manifest.datasets[number + 1 :]]
    shards = [*following, manifest.shards][0] - record["first_shard"]
    return Segment(number, record["plan"], origin, record["first_shard"], shards, listed=True)


def rebuilt_origin(manifest: Manifest, number: int) -> Origin | None:
    """The plan of a segment, which a manifest holds too; None where what is made of it has another digest."""
    record = dict(manifest.datasets[number])
    digest, first_shard, first_index = (record.pop(name) for name in ("plan", "first_shard", "first_index"))
    recipe = {part.name: getattr(manifest, part.name) for part in fields(Recipe)}
    for dataset in (record, record | {"count": None}):  # a stream's plan did not know its length
        origin = Origin(**recipe, dataset=dataset, first_shard=first_shard, first_index=first_index)
        if origin.digest == digest:
            return origin
    return None


def _other_segment(
    state: SetState, number: int, found: Origin | None, trouble: str, first_shard: int
) -> Segment:  # fmt: skip
    """A segment that the manifest does not list, or of a set without one: its shards are asked which plan made them."""
    said = _witnesses(state, found.first_shard if found else first_shard)
    digest = found.digest if found else said
    if found and said and said != found.digest:
        trouble, digest, found = "its digest is not the one that the shards carry", said, None
    if trouble and (plan_name(number) in state.sizes or state.manifest is None):
        kind: Kind = "damaged" if plan_name(number) in state.sizes else "missing"
        lost = state.manifest is not None
        trouble += "; its images were not appended yet: delete it, and append them again" if lost else ""
        state.add(plan_name(number), kind, trouble, cure="none" if lost else "plan")
    first_shard = found.first_shard if found else first_shard
    return Segment(number, digest, found, first_shard, planned_shards(found) if found else None, listed=False)


def _numbers(state: SetState) -> Iterator[int]:
    """Of the sidecars that are there."""
    return (int(match[1]) for match in map(SIDECAR_NAME.fullmatch, state.sizes) if match)


def _witnesses(state: SetState, first_shard: int) -> str | None:
    """The digest of the plan that most of the first shards from here on carry."""
    digests: Counter[str] = Counter()
    for number in sorted(number for number in _numbers(state) if number >= first_shard)[:WITNESSES]:
        try:
            digests[read_header(state.folder, number).origin] += 1
        except UserError:
            continue
    return digests.most_common(1)[0][0] if digests else None


def _read_index(state: SetState) -> None:
    """Of a set without a manifest the files of an index are known by their names, which hold their checksums."""
    manifest = state.manifest
    if manifest is None:
        parts = _self_named_parts(state)
    else:
        parts = list(manifest.index)
    layout = next((segment.origin.layout for segment in state.segments if segment.origin), None)
    if manifest:
        layout = manifest.layout
    if layout is None or not parts:
        return
    read: list[ShardIndex] = []
    for part in parts:
        try:
            read.append(read_index(state.folder, [part], layout.summed_channels, "read it again"))
        except UserError as error:
            state.add(part.file, "damaged" if part.file in state.sizes else "missing", reason(error).split(" (")[0])
    if len(read) < len(parts):
        return
    state.index = reduce(add, read)
    if manifest and len(state.index) != manifest.shards:
        state.add(MANIFEST, "stale", f"shards is {manifest.shards} and the index has {len(state.index)}")
        state.index = None


def _self_named_parts(state: SetState) -> list[IndexPart]:
    """Of each number the one with the most shards: that of the version before may be there too."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    parts: dict[str, list[IndexPart]] = {}
    for name in sorted(filter(INDEX_NAME.fullmatch, state.sizes)):
        data = state.folder.read(name)
        found = checksum_bytes(data)
        if found.removeprefix(ALGORITHM)[:16] != name[13:29]:
            state.add(name, "damaged", f"its checksum is {found}, and its name says another one")
            return []
        try:
            check_tensor_header(data[8:], int.from_bytes(data[:8], "little"), name)
            parts.setdefault(name[:12], []).append(IndexPart(name, len(load(data)["count"]), found))
        except (SafetensorError, KeyError, UserError) as error:
            state.add(name, "damaged", f"is no index ({error})")
            return []
    latest = [sorted(same, key=lambda part: part.shards)[-2:] for same in parts.values()]
    unclear = any(len(same) > 1 and same[0].shards == same[1].shards for same in latest)
    return [] if unclear else [same[-1] for same in latest]


def _guess_listed(state: SetState) -> None:
    """Without a manifest: the segments that the index covers, or else those whose shards are all there."""
    names = set(_numbers(state))
    for place, segment in enumerate(state.segments):
        following = [other.first_shard for other in state.segments[place + 1 :] if other.origin]
        last = max([segment.first_shard - 1, *names, len(state.index) - 1 if state.index else -1])
        shards = segment.shards
        if shards is None:  # its plan is lost, or was that of a stream
            shards = [*following, last + 1][0] - segment.first_shard
        end = segment.first_shard + shards
        covered = end <= len(state.index) if state.index else names >= set(range(segment.first_shard, end))
        if not state.finished or not (covered or place == 0):
            return
        state.segments[place] = replace(segment, shards=shards, listed=True)


def _foreign(state: SetState) -> Iterator[Finding]:
    """Shards and plans that do not belong to the set. Whatever else lies in the folder is its owner's business, and the
    index of the version before is kept for readers."""
    plans = {plan_name(segment.number) for segment in state.segments}
    sure = state.manifest is not None or all(segment.origin for segment in state.segments)
    for name in sorted(state.sizes):
        match = SHARD_NAME.fullmatch(name)
        if match and sure and not state.segment_of(int(match[1])):
            yield Finding(name, "foreign", "is no shard of this set", cure="remove")
        elif PLAN_NAME.fullmatch(name) and name not in plans:
            yield Finding(name, "foreign", "is no plan of this set", cure="remove")


def check_manifest(state: SetState, index: ShardIndex) -> Iterator[Finding]:
    """What the manifest must say, given the plans and the records of the shards, against what it says."""
    manifest, origins = state.manifest, [segment.origin for segment in state.listed]
    if manifest is None or len(index) != manifest.shards:
        return
    datasets = []
    for segment, record in zip(state.listed, manifest.datasets):
        last = segment.first_shard + (segment.shards or 0) - 1
        count = int(index.columns["last_index"][last]) + 1 - record["first_index"]
        datasets.append(record | {"count": count})
    codes = manifest.encoding.get("codebook_size")
    expected: dict[str, Any] = {
        "count": index.count, "rejected": index.rejected, "statistics": measure(index, manifest.layout, codes),
        "datasets": datasets,
    }  # fmt: skip
    known = [origin for origin in origins if origin is not None]
    if len(known) == len(origins):
        names: tuple[str, ...] = ()
        for origin in known:
            names = merge_label_names(names, origin.dataset["label_names"])
        plan = configuration.to_dict(known[-1])
        makers = [configuration.to_dict(origin)["autoencoder"] for origin in known]
        same = {"autoencoder": manifest.autoencoder} if manifest.autoencoder in makers else {}
        expected |= {"label_names": list(names)} | {part.name: plan[part.name] for part in fields(Recipe)} | same
    found = manifest.to_dict()
    changes = configuration.changed_keys(expected, {name: found[name] for name in expected})
    for key, (right, wrong) in changes.items():
        yield Finding(MANIFEST, "stale", f"{key} is {short(wrong)}, but by plans and shards {short(right)}")


# What `verify` says: each thing that is wrong with a set, the samples it concerns, and what mends it.

Kind = Literal["missing", "damaged", "foreign", "content", "stale", "duplicate"]
"""missing: a file is not there. damaged: its bytes are not those that were written. foreign: it belongs to another
place or set. content: as it was written, but it cannot be right. stale: whole, but it does not fit the shards.
duplicate: an id that two samples have."""

Cure = Literal["encode", "rebuild", "plan", "remove", "none"]
"""encode: make the shard again. rebuild: derive the file from plans and sidecars. plan: restore the plan from the
manifest or the settings. remove: it does not belong here. none: nothing here can mend it."""

SHOWN_SAMPLES = 3
SHOWN_FINDINGS = 40


@dataclass(frozen=True)
class Affected:
    """A sample: its number in the set, its place in the image source and its id there; None where nothing says so."""

    sample: int | None
    index: int | None
    id: str | None

    def __str__(self) -> str:
        known = [self.id or "", "" if self.index is None else f"index {self.index}"]
        shown = ", ".join(word for word in known if word)
        number = "of unknown number" if self.sample is None else str(self.sample)
        return f"{number} ({shown})" if shown else number


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        file: where.
        kind: see `Kind`.
        message: what is wrong, as the end of a sentence that begins with the file.
        samples: that are damaged, lost or in doubt.
        cure: see `Cure`.
        shard: the number of the shard that the file belongs to, where it belongs to one.
    """

    file: str
    kind: Kind
    message: str
    samples: tuple[Affected, ...] = ()
    cure: Cure = "rebuild"
    shard: int | None = None

    def __str__(self) -> str:
        if not self.samples:
            return f"{self.file}: {self.kind}: {self.message}"
        shown = ", ".join(map(str, islice(self.samples, SHOWN_SAMPLES)))
        more = f" and {len(self.samples) - SHOWN_SAMPLES} more" if len(self.samples) > SHOWN_SAMPLES else ""
        word = "sample" if len(self.samples) == 1 else f"{len(self.samples)} samples:"
        return f"{self.file}: {self.kind}: {self.message}; {word} {shown}{more}"


@dataclass(frozen=True)
class Verification:
    """What was found in a set.

    Attributes:
        location: of the set.
        quick: only sizes, headers, index and manifest were looked at.
        findings: what is wrong, in the order of the shards.
        notes: what is no damage, but worth knowing, as a segment that is not finished.
        finished: it has, or had, a manifest. Without one there is no set yet, only the beginning of one.
        shards, count: of the finished part, as far as it is known; of a set that is not finished, what is there.
        bytes_read, seconds: what it took.
        command: that made the set.
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
        """No damage."""
        return not self.findings

    @property
    def samples(self) -> tuple[Affected, ...]:
        """All that are affected, each once for every number, index and id under which it was found."""
        return tuple(dict.fromkeys(sample for finding in self.findings for sample in finding.samples))

    def to_dict(self) -> dict[str, Any]:
        """For `--report`: plain containers, with every sample."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found = [
            {"file": finding.file, "kind": finding.kind, "message": finding.message, "cure": finding.cure,
             "samples": [asdict(sample) for sample in finding.samples]}
            for finding in self.findings
        ]  # fmt: skip
        return values | {"whole": self.whole, "notes": list(self.notes), "findings": found}

    def lines(self) -> list[str]:
        """For people; the last line says what to do."""
        shown = [str(finding) for finding in self.findings[:SHOWN_FINDINGS]]
        if len(self.findings) > SHOWN_FINDINGS:
            shown.append(f"and {len(self.findings) - SHOWN_FINDINGS} more; --report FILE.json lists all")
        return [*shown, *(f"note: {note}" for note in self.notes), f"{self.location}: {self._conclusion()}"]

    def _conclusion(self) -> str:
        looked = "sizes and headers are right" if self.quick else "every byte is as it was written"
        speed = f" ({size_text(self.bytes_read)} in {self.seconds:.1f} s)" if self.bytes_read else ""
        if self.seconds < 0.05:  # shown as 0.0
            speed = ""
        size = f"{pluralize(self.count, 'sample')} in {pluralize(self.shards, 'shard')}"
        if self.whole and self.finished:
            more = "; without --quick the content is compared too" if self.quick else ""
            return f"whole: {size}, {looked}{speed}{more}"
        if self.whole:
            return f"not finished: {size} so far, {looked}{speed}; run the same `{self.command}` command again"
        affected = len(self.samples)
        concerned = f"{affected} of {self.count} samples" if affected else "no samples"
        things = "1 thing is" if len(self.findings) == 1 else f"{len(self.findings)} things are"
        return f"{things} wrong, {concerned} affected{speed}; {self._advice()}"

    def _advice(self) -> str:
        cures = {finding.cure for finding in self.findings}
        if cures == {"none"}:
            return "nothing in the set can mend this: encode again to another output"
        if cures == {"remove"}:
            return "move these files elsewhere, or let `ldm-vae latents repair ... --remove-foreign` delete them"
        if self.command != "ldm-vae encode":
            return f"run the same `{self.command}` command again, which makes damaged files again"
        remove = " --remove-foreign" if "remove" in cures else ""
        return (
            f"run `ldm-vae latents repair ...{remove}` with the settings of the `ldm-vae encode` command that made it"
        )


def reason(error: UserError) -> str:
    """The middle of *where: what; what to do instead*."""
    said = str(error).partition(": ")[2].rpartition("; ")[0]
    return re.sub(r"^damaged, | \(\w+: .*\)$", "", said)
