"""Mending a set: shards that are damaged or missing are encoded again, and what follows from others is derived again.

Everything that decides the bytes of a shard is compared with its plan before anything changes. Nothing is deleted to be
made anew: each file is replaced when its successor is complete, and one that would become what it is stays untouched.
Owns the order of this; what is wrong is `verify`'s, encoding is `encode`'s, the images of a later segment `append`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from ldm_vae.config import to_dict
from ldm_vae.errors import UserError
from ldm_vae.latents.append import AppendConfig, NewSegment, first_segment, open_segment, segment_job
from ldm_vae.latents.encode import EncodeConfig, Job, encode_units, prepare
from ldm_vae.latents.format import (
    Origin,
    check_same,
    plan_name,
    read_header,
    read_manifest,
    read_origin,
    shard_name,
    short,
    write_plan,
)
from ldm_vae.latents.state import IMPORTED, Segment, SetState, read_state
from ldm_vae.latents.verify import Verification, verify
from ldm_vae.latents.writer import LOCK, OTHER_ORIGIN, Output
from ldm_vae.storage import open_folder
from ldm_vae.storage.base import Folder
from ldm_vae.training.distributed import run_on_main, wait_for_all
from ldm_vae.utils.text import pluralize


@dataclass(frozen=True)
class Damage:
    """What is to be done, as every process must know it.

    Attributes:
        shards: segment -> units of it that are made again.
        segments: of the set, as they were planned.
        checksums: shard number -> what its checksum was, where something still says so.
        plans: numbers of the segments whose plan is damaged.
        foreign: files that do not belong here.
        hopeless: things that nothing here can mend.
        manifest: it is whole.
        any: anything is wrong.
    """

    shards: Mapping[int, frozenset[int]]
    segments: Mapping[int, Segment]
    checksums: Mapping[int, str]
    plans: tuple[int, ...]
    foreign: tuple[str, ...]
    hopeless: int
    manifest: bool
    any: bool


def repair(config: AppendConfig, accelerator: Any, remove_foreign: bool = False) -> int:
    """Verify and mend the set of each size asked for. For all processes.

    Args:
        config: the settings with which the damaged shards were made.
        remove_foreign: delete files that do not belong to the set.

    Returns: 0 when everything is whole, 1 when something is left.

    Raises:
        UserError: the settings, the autoencoder or the images are not those of the set; nothing was changed then.
    """
    if config.share is not None:
        raise UserError("share: has no effect here, all that is damaged is made by one job; leave it out")
    left = 0
    for _, one in config.of_each_size():
        left |= repair_set(one, accelerator, remove_foreign)
    return left


def repair_set(config: EncodeConfig, accelerator: Any, remove_foreign: bool) -> int:
    """Of one size. Returns and raises: as `repair`."""
    folder = cast(Folder, Sparing(open_folder(config.output)))
    damage = run_on_main(accelerator, partial(_examine, config.output))
    if not damage.any:
        return 0
    done: list[int] = []
    first = damage.segments[0]
    _refuse_imported(damage, config.output)
    job = prepare(config, accelerator) if 0 in damage.shards or first.origin is None else None
    if job is not None:
        job = _fitting(job, folder, damage)
    run_on_main(accelerator, partial(_restore_plans, folder, damage, job.origin if job else None))
    if job is not None and 0 in damage.shards:
        _encode(job, Output(folder, job.origin), damage.segments[0], damage.shards[0])
        done.append(0)
    later = sorted(number for number in damage.shards if number)
    if later and not damage.manifest:  # the images of these are found with its help
        run_on_main(accelerator, partial(_rebuild, folder, damage, later[0]))
    refusals: dict[int, UserError | SystemExit] = {}
    for number in later:
        try:
            job, output = segment_job(config, accelerator, folder, number)
        except (UserError, SystemExit) as error:  # the latter where the main process has the former
            refusals[number] = error
            continue
        _encode(job, output, damage.segments[number], damage.shards[number])
        done.append(number)
    if refusals and not (done or damage.plans or not damage.manifest):
        raise next(iter(refusals.values()))
    if accelerator.is_main_process:
        for number, refusal in refusals.items():
            print(f"{refusal} - so the damaged shards of segment {number} stay as they are now")
    return run_on_main(accelerator, partial(_finish, folder, damage, done, remove_foreign))


def _refuse_imported(damage: Damage, where: str) -> None:
    """Raises: UserError when shards are damaged whose images are not there."""
    origin = damage.segments[0].origin
    if 0 in damage.shards and origin is not None and origin.dataset["source"] == IMPORTED:
        raise UserError(
            f"{where}: its latents were imported, there are no images to encode; run the same `ldm-vae latents import` "
            "command again, which makes damaged shards again"
        )


def _examine(location: str) -> Damage:
    verification = verify(location, progress=True)
    if verification.whole and not verification.finished:
        raise UserError(
            f"{location}: is not damaged, but not finished; run the same `{verification.command}` command again"
        )
    print("\n".join(verification.lines()[:-1] if verification.findings else verification.lines()))
    return _damage(verification, read_state(open_folder(location)))


def _damage(verification: Verification, state: SetState) -> Damage:
    shards: dict[int, set[int]] = {}
    checksums = {}
    for finding in verification.findings:
        segment = state.segment_of(finding.shard) if finding.shard is not None else None
        if finding.cure != "encode" or segment is None or finding.shard is None:
            continue
        shards.setdefault(segment.number, set()).add(finding.shard - segment.first_shard)
        if checksum := _recorded(state, segment, finding.shard):
            checksums[finding.shard] = checksum
    names = {plan_name(segment.number): segment.number for segment in state.segments}
    return Damage(
        shards={number: frozenset(units) for number, units in shards.items()},
        segments={segment.number: segment for segment in state.segments},
        checksums=checksums,
        plans=tuple(names[finding.file] for finding in verification.findings if finding.cure == "plan"),
        foreign=tuple(finding.file for finding in verification.findings if finding.cure == "remove"),
        hopeless=sum(finding.cure == "none" for finding in verification.findings),
        manifest=state.manifest is not None,
        any=not verification.whole,
    )


def _recorded(state: SetState, segment: Segment, shard: int) -> str | None:
    """The checksum that a shard had."""
    if state.index is not None and segment.listed and shard < len(state.index):
        return state.index[shard].checksum
    try:
        header = read_header(state.folder, shard)
    except UserError:
        return None
    return header.record.checksum if header.origin == segment.digest else None


def _fitting(job: Job, folder: Folder, damage: Damage) -> Job | None:
    """The job that makes the first segment again; None where the settings are those of another segment. For all
    processes. Raises: UserError where they must be those of the first and are not."""
    fits, grown = run_on_main(job.accelerator, partial(_judge, job, folder, damage))
    if grown is not None:
        job, _ = open_segment(job, folder, grown)
    return job if fits else None


def _judge(job: Job, folder: Folder, damage: Damage) -> tuple[bool, NewSegment | None]:
    """(whether the settings are those of the first segment; it, where its source has grown since)."""
    segment = damage.segments[0]
    if segment.origin is None:
        if job.origin.digest != segment.digest:
            raise UserError(
                f"{folder.location}/{plan_name(0)}: is damaged, and these settings make another one: its digest was "
                f"{short(segment.digest)} and theirs is {short(job.origin.digest)}; give exactly the settings, the "
                "autoencoder and the images of the first run"
            )
        return True, None
    try:
        if len(damage.segments) > 1 and damage.manifest and _only_images_differ(job.origin, segment.origin):
            return True, first_segment(job, folder)
        _check_dataset(job.origin, segment.origin, folder.location)
        check_same(to_dict(job.origin), to_dict(segment.origin), folder.location, OTHER_ORIGIN)
    except UserError as error:
        if set(damage.shards) == {0}:
            raise
        print(f"{error} - so only the shards of other segments are made again now")
        return False, None
    return True, None


def _check_dataset(ours: Origin, theirs: Origin, where: str) -> None:
    """Raises: UserError when everything else is the same, but the images are others."""
    if _only_images_differ(ours, theirs):
        here, there = ours.dataset, theirs.dataset
        raise UserError(
            f"{where}: dataset.fingerprint is {short(there['fingerprint'])} there ({there['count']} images) and "
            f"{short(here['fingerprint'])} here ({here['count']} images): images were added, removed or changed since; "
            "give exactly those of the first run, for example a folder with links to them"
        )


def _only_images_differ(ours: Origin, theirs: Origin) -> bool:
    here, there = ours.dataset, theirs.dataset
    same = replace(ours, dataset={}, autoencoder={}) == replace(theirs, dataset={}, autoencoder={})
    same = same and all(here[key] == there[key] for key in ("source", "part", "held_out"))
    return same and here["fingerprint"] != there["fingerprint"]


def _restore_plans(folder: Folder, damage: Damage, ours: Origin | None) -> None:
    """Write damaged plans as they were: from the manifest, that of the first segment else from the settings."""
    lost = [number for number in damage.plans if damage.segments[number].origin is None]
    if lost and not (lost == [0] and ours is not None):
        raise UserError(
            f"{folder.location}/{plan_name(lost[0])}: is damaged, and {'nothing else' if damage.manifest else 'so is'} "
            f"{'holds what was in it' if damage.manifest else 'the manifest'}; restore one of them from a copy, or "
            "encode to another output"
        )
    if damage.plans:
        with folder.lock(LOCK):
            for number in damage.plans:
                origin = damage.segments[number].origin or ours
                assert origin is not None
                write_plan(folder, origin, number)
                print(f"{folder.location}: {plan_name(number)} is as it was again")


def _encode(job: Job, output: Output, segment: Segment, units: Iterable[int]) -> None:
    """Make these units of a segment again. For all processes."""
    units = frozenset(units)
    with contextlib.ExitStack() as stack:

        def take() -> Origin:
            stack.enter_context(output.open())
            return output.origin

        output.origin = run_on_main(job.accelerator, take)
        total = segment.shards or max(units) + 1
        encode_units(replace(job, origin=output.origin), output, frozenset(range(total)) - units)
        wait_for_all(job.accelerator)


def _rebuild(folder: Folder, damage: Damage, end: int | None = None) -> None:
    """Derive index, list of images left out and manifest from plans and sidecars, of the segments before `end`."""
    listed = [
        segment for segment in damage.segments.values() if segment.listed and (end is None or segment.number < end)
    ]
    if not listed:
        return
    last = listed[-1]
    hidden = frozenset(plan_name(number) for number in damage.segments if number > last.number)
    origin = read_origin(folder, last.number)
    if damage.manifest:
        origin = replace(origin, autoencoder=read_manifest(folder).autoencoder)
    output = Output(cast(Folder, Sparing(folder, hidden)), origin, last.number)
    with output.open():
        output.publish(output.complete(last.shards))


def _finish(folder: Folder, damage: Damage, done: Iterable[int], remove_foreign: bool) -> int:
    """Publish what follows from the shards, and say what became of them. Returns: as `repair`."""
    for number in done:
        first = damage.segments[number].first_shard
        for shard in sorted(first + unit for unit in damage.shards[number]):
            before, now = damage.checksums.get(shard), read_header(folder, shard).record.checksum
            other = (
                "other bytes than before (another machine, or other versions)" if before else "not known what it was"
            )
            same = "the same bytes as before" if before == now else other
            print(f"{folder.location}: {shard_name(shard)} is made again: {same}")
    for name in damage.foreign:
        if remove_foreign:
            folder.remove(name)
        what = "is removed" if remove_foreign else "does not belong here and is left alone; --remove-foreign deletes it"
        print(f"{folder.location}: {name} {what}")
    left = {number: units for number, units in damage.shards.items() if number not in set(done)}
    for number, units in left.items():
        things = pluralize(len(units), "damaged shard")
        print(f"{folder.location}: {things} of segment {number} left; run this again with the settings that made it")
    if left:
        return 1
    _rebuild(folder, damage)
    verification = verify(folder.location, quick=True)
    print("\n".join(verification.lines()))
    if damage.hopeless:
        print(f"{folder.location}: {damage.hopeless} of the things above cannot be mended here")
    return int(not verification.whole or damage.hopeless > 0)


class Sparing:
    """A folder that leaves a file alone which has the content already that is to be written.

    `hidden`: files that are not listed. Everything else is the folder's.
    """

    def __init__(self, folder: Folder, hidden: frozenset[str] = frozenset()) -> None:
        self.folder, self.hidden = folder, hidden

    def write(self, name: str, data: bytes) -> None:
        with contextlib.suppress(OSError, UserError):  # what cannot be read is replaced
            if self.folder.read(name) == data:
                return
        self.folder.write(name, data)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {name: size for name, size in self.folder.sizes(prefix).items() if name not in self.hidden}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.folder, name)
