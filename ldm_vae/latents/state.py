"""The records of a set: its plans, its manifest and its index, each compared with its checksum.

The manifest holds its own digest, the digest of each plan and the checksum of each index file. Sidecars also hold the
digest of their plan. This module reads no shard, and at most a few headers of sidecars.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from itertools import islice
from operator import add
from typing import Any, Literal

from ldm_vae import config as configuration
from ldm_vae.errors import UserError
from ldm_vae.files import readable_json
from ldm_vae.latents.format import (
    INDEX_NAME,
    MANIFEST,
    RESTORE,
    Manifest,
    Origin,
    OtherFormat,
    Recipe,
    ShardIndex,
    build_manifest,
    merge_label_names,
    plan_name,
    planned_shards,
    read_index,
    read_manifest,
    read_origin,
    read_sidecar_header,
    short,
)
from ldm_vae.latents.writer import SIDECAR_NAME
from ldm_vae.storage.base import Folder

PLAN_NAME = re.compile(r"plan(?:-(\d{6}))?\.json")
SHARD_NAME = re.compile(r"shard-(\d{6,})\.(?:safetensors|jsonl)")
IMPORTED = "lightningdit"
"""`source` of an imported set, which has no images to encode again."""
ASKED_SIDECARS = 8
"""Number of sidecars to read for the digest of their plan if no manifest has it."""
OTHER_WRITING = "is not written as it was, though it says the same"

Kind = Literal["missing", "damaged", "foreign", "content", "stale", "duplicate"]
"""missing: a file does not exist. damaged: its bytes have changed. foreign: it belongs to another place or set.
content: unchanged since it was written, but its content cannot be right. stale: intact, but it does not fit the shards.
duplicate: two samples have the same id."""

Cure = Literal["encode", "rebuild", "plan", "remove", "none"]
"""encode: make the shard again. rebuild: derive the file from plans and sidecars. plan: restore the plan from the
manifest or the settings. remove: it does not belong here. none: nothing here can repair it."""

SHOWN_SAMPLES = 3


@dataclass(frozen=True)
class Affected:
    """A sample: its number in the set, its place in the image source and its id; None if unknown."""

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
    """One problem of a set.

    Attributes:
        file: the affected file.
        message: the problem, as the end of a sentence that begins with the file.
        samples: the samples that are damaged, lost or doubtful.
        cure: how to repair it, see `Cure`.
        shard: the number of the shard that the file belongs to, if it belongs to one.
    """

    file: str
    kind: Kind
    message: str
    samples: tuple[Affected, ...] = ()
    cure: Cure = "rebuild"
    shard: int | None = None

    def __str__(self) -> str:
        if not self.samples:
            return f"{self.file}: {self.message}"
        shown = ", ".join(map(str, islice(self.samples, SHOWN_SAMPLES)))
        more = f" and {len(self.samples) - SHOWN_SAMPLES} more" if len(self.samples) > SHOWN_SAMPLES else ""
        word = "sample" if len(self.samples) == 1 else f"{len(self.samples)} samples:"
        return f"{self.file}: {self.message}; {word} {shown}{more}"


@dataclass(frozen=True)
class Segment:
    """A part of a set with its own plan.

    Attributes:
        number: 0 for the first encoding.
        digest: digest of the plan when it was written; None if unknown.
        origin: the plan, from the manifest if its file is damaged; None if it is lost.
        first_shard: number of its first shard.
        shards: number of its shards; None for an unfinished stream.
        listed: whether it belongs to the finished set.
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
    """A set, as far as its records are reliable.

    Attributes:
        sizes: name -> bytes of its files.
        manifest, index: None if they are damaged or missing.
        findings: problems of plans, manifest and index.
        finished: there is a manifest, or an index, which is published just before it.
    """

    folder: Folder
    sizes: dict[str, int]
    manifest: Manifest | None = None
    index: ShardIndex | None = None
    segments: list[Segment] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    finished: bool = True

    def add(self, file: str, message: str, cure: Cure = "rebuild") -> None:
        kind: Kind = "damaged" if file in self.sizes else "missing"
        self.findings.append(Finding(file, kind, message, cure=cure))

    @property
    def listed(self) -> list[Segment]:
        return [segment for segment in self.segments if segment.listed]

    @property
    def shards(self) -> int:
        """Number of shards of the finished part."""
        return sum(segment.shards or 0 for segment in self.listed)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names of all segments with a known plan, also of an unfinished one."""
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
        """The file with the record of a shard."""
        last = 0
        for part in self.manifest.index if self.manifest else ():
            last += part.shards
            if shard < last:
                return part.file
        return MANIFEST

    def segment_of(self, shard: int) -> Segment | None:
        return next((segment for segment in self.segments if shard in segment), None)

    def sidecar_numbers(self) -> Iterator[int]:
        return (int(match[1]) for match in map(SIDECAR_NAME.fullmatch, self.sizes) if match)


def command_for(segment: int, dataset: Mapping[str, Any]) -> str:
    """The command that makes a segment. `dataset`: from its plan."""
    if segment:
        return "ldm-vae latents append"
    return "ldm-vae latents import" if dataset.get("source") == IMPORTED else "ldm-vae encode"


def read_state(folder: Folder) -> SetState:
    """Read and compare the records of a set. Raises: UserError if there is no set, OtherFormat."""
    state = SetState(folder, folder.sizes())
    names = state.sizes
    if MANIFEST not in names and plan_name(0) not in names and not any(map(SHARD_NAME.fullmatch, names)):
        read_manifest(folder)  # raises
    state.finished = MANIFEST in names or any(map(INDEX_NAME.fullmatch, names))
    _read_manifest(state)
    plans = [int(match[1] or 0) for match in map(PLAN_NAME.fullmatch, names) if match]
    segments = max([len(state.manifest.datasets) if state.manifest else 1, *(number + 1 for number in plans)])
    for number in range(segments):
        state.segments.append(_read_segment(state, number))
    if state.manifest is None:
        _list_segments(state)
    else:
        _read_index(state, state.manifest)
    state.findings += _foreign(state)
    return state


def _read_manifest(state: SetState) -> None:
    if MANIFEST not in state.sizes:
        if state.finished:
            state.add(MANIFEST, "is missing, although the set was finished")
        return
    try:
        state.manifest = read_manifest(state.folder)
        if _is_other_writing(state.folder.read(MANIFEST)):
            state.add(MANIFEST, OTHER_WRITING)
    except OtherFormat as error:
        try:
            read_origin(state.folder)
        except OtherFormat:  # the plan as well: not an accident
            raise error from None
        except UserError:
            pass
        state.add(MANIFEST, error.what)
    except UserError as error:
        state.add(MANIFEST, error.what)


def _is_other_writing(data: bytes) -> bool:
    """Whether JSON with the right values has a damaged byte, as in 1E-05, or lost its last newline. Other spaces or
    another order of keys come from another program and do not count as damage."""
    right = readable_json(json.loads(data)).encode()
    return data != right and (len(data) == len(right) or data + b"\n" == right)


def _read_segment(state: SetState, number: int) -> Segment:
    """A segment, with its plan compared with the digest in the manifest, or else in the sidecars."""
    manifest, name = state.manifest, plan_name(number)
    origin, trouble = _read_plan(state, name, number)
    listed = manifest is not None and number < len(manifest.datasets)
    if manifest is not None and listed:
        first_shard = manifest.datasets[number]["first_shard"]
        digest = manifest.datasets[number]["plan"]
    else:
        before = state.segments[-1] if state.segments else None
        first_shard = before.first_shard + (before.shards or 0) if before else 0
        first_shard = origin.first_shard if origin else first_shard
        digest = _digest_in_sidecars(state, first_shard) or (origin.digest if origin else None)
    if origin is not None and origin.digest != digest:
        origin, trouble = None, "its digest is not the recorded one"
    if manifest is not None and listed:
        if trouble:
            state.add(name, trouble, cure="plan")
        origin = origin or rebuilt_origin(manifest, number)
        ends = [record["first_shard"] for record in manifest.datasets[number + 1 :]] + [manifest.shards]
        return Segment(number, digest, origin, first_shard, ends[0] - first_shard, listed=True)
    if trouble and manifest is None:
        state.add(name, trouble, cure="plan")
    elif trouble and name in state.sizes:
        instead = "its images were not appended yet: delete it, and append them again"
        state.add(name, f"{trouble}; {instead}", cure="none")
    return Segment(number, digest, origin, first_shard, planned_shards(origin) if origin else None, listed=False)


def _read_plan(state: SetState, name: str, number: int) -> tuple[Origin | None, str]:
    """(the plan in its file, the problem of the file)."""
    if name not in state.sizes:
        return None, "is not there"
    try:
        origin = read_origin(state.folder, number)
        return origin, OTHER_WRITING if _is_other_writing(state.folder.read(name)) else ""
    except OtherFormat as error:
        if MANIFEST not in state.sizes:  # there is no sign of an accident
            raise
        return None, error.what
    except UserError as error:
        return None, error.what


def rebuilt_origin(manifest: Manifest, number: int) -> Origin | None:
    """The plan of a segment from the manifest, which has all of its values; None if its digest differs."""
    record = dict(manifest.datasets[number])
    digest, first_shard, first_index = (record.pop(name) for name in ("plan", "first_shard", "first_index"))
    recipe = {part.name: getattr(manifest, part.name) for part in fields(Recipe)}
    for dataset in (record, record | {"count": None}):  # the plan of a stream has no length
        origin = Origin(**recipe, dataset=dataset, first_shard=first_shard, first_index=first_index)
        if origin.digest == digest:
            return origin
    return None


def _digest_in_sidecars(state: SetState, first_shard: int) -> str | None:
    """The plan digest in most of the first sidecars from here on."""
    digests: Counter[str] = Counter()
    for number in sorted(number for number in state.sidecar_numbers() if number >= first_shard)[:ASKED_SIDECARS]:
        try:
            digests[read_sidecar_header(state.folder, number).origin] += 1
        except UserError:
            continue
    return digests.most_common(1)[0][0] if digests else None


def _list_segments(state: SetState) -> None:
    """Without a manifest: the segments with all their shards, up to the first incomplete one."""
    there = {int(match[1]) for match in map(SHARD_NAME.fullmatch, state.sizes) if match}
    for place, segment in enumerate(state.segments):
        end = segment.first_shard + (segment.shards or 0)
        if segment.shards is None:  # its plan is lost, or was that of a stream
            following = [other.first_shard for other in state.segments[place + 1 :] if other.origin]
            end = [*following, max(there, default=segment.first_shard - 1) + 1][0]
        whole = there.issuperset(range(segment.first_shard, end))
        if not state.finished or not (whole or place == 0):
            return
        state.segments[place] = replace(segment, shards=end - segment.first_shard, listed=True)


def _read_index(state: SetState, manifest: Manifest) -> None:
    found: list[ShardIndex] = []
    for part in manifest.index:
        try:
            found.append(read_index(state.folder, [part], manifest.layout.summed_channels, RESTORE))
        except UserError as error:
            state.add(part.file, error.what)
    if not found or len(found) < len(manifest.index):
        return
    index = reduce(add, found)
    if len(index) == manifest.shards:
        state.index = index
    else:
        message = f"shards is {manifest.shards} and the index has {len(index)}"
        state.findings.append(Finding(MANIFEST, "stale", message))


def _foreign(state: SetState) -> Iterator[Finding]:
    """Shards and plans that do not belong to the set. Other files beside a set are allowed, and the index of the
    previous version is kept for readers."""
    plans = {plan_name(segment.number) for segment in state.segments}
    sure = state.manifest is not None or all(segment.origin for segment in state.segments)
    for name in sorted(state.sizes):
        match = SHARD_NAME.fullmatch(name)
        if match and sure and not state.segment_of(int(match[1])):
            yield Finding(name, "foreign", "is not a shard of this set", cure="remove")
        elif PLAN_NAME.fullmatch(name) and name not in plans:
            yield Finding(name, "foreign", "is not a plan of this set", cure="remove")


def check_manifest(state: SetState, index: ShardIndex) -> Iterator[Finding]:
    """Compare the manifest with the one derived from the plans and the records of the shards."""
    manifest = state.manifest
    origins = [segment.origin for segment in state.listed if segment.origin]
    if manifest is None or len(index) != manifest.shards or len(origins) != len(manifest.datasets):
        return
    right = build_manifest(origins, origins[-1], index, manifest.index, state.folder).to_dict()
    found = manifest.to_dict()
    if found["autoencoder"] in [configuration.to_dict(origin)["autoencoder"] for origin in origins]:
        right["autoencoder"] = found["autoencoder"]  # segments may differ in the decoder
    right["datasets"] = [{**old, **new} for old, new in zip(found["datasets"], right["datasets"])]
    for key, (expected, value) in configuration.changed_keys(right, found).items():
        message = f"{key} is {short(value)}, but by plans and shards {short(expected)}"
        yield Finding(MANIFEST, "stale", message)
