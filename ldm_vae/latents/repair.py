"""`ldm-vae latents repair`: encode damaged and missing shards again, and derive the other records from them.

Everything that determines the bytes of a shard is compared with its plan before anything changes. The result is
compared with the recorded checksum. Nothing is deleted first: each file is replaced when its new version is complete,
and files that are correct do not change. `verify` finds the damage; images of later segments are found as in `append`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from ldm_vae.config import to_dict
from ldm_vae.errors import UserError
from ldm_vae.latents.append import AppendConfig, NewSegment, first_segment, open_segment, segment_job
from ldm_vae.latents.encode import Job, encode_units, prepare, preview_encoding, run_job
from ldm_vae.latents.format import (
    Origin,
    check_same,
    plan_name,
    read_manifest,
    read_origin,
    read_sidecar_header,
    shard_name,
    short,
    write_plan,
)
from ldm_vae.latents.state import IMPORTED, Segment, SetState, read_state
from ldm_vae.latents.verify import Verification, say_verification, verify
from ldm_vae.latents.writer import LOCK, OTHER_ORIGIN, Output
from ldm_vae.storage import open_folder
from ldm_vae.storage.base import Folder
from ldm_vae.training.distributed import run_on_main, wait_for_all
from ldm_vae.utils.progress import end_dry_run, say
from ldm_vae.utils.text import duration_text, pluralize


@dataclass(frozen=True)
class RepairConfig(AppendConfig):
    """`ldm-vae latents repair`: encode damaged and missing shards again, and derive other damaged files from the rest.

    Give the settings of the `ldm-vae encode` command that made the set (for appended shards, those of that
    `ldm-vae latents append`). The set is verified first; an intact set does not change. Settings, autoencoder and
    images are compared with the plan before anything changes, and only damaged files are replaced. Exit code 0:
    intact now; 1: some damage is left; 2: the settings do not fit, and nothing was changed.

      ldm-vae latents repair runs/mine data=~/images output=latents/mine
      ldm-vae latents repair runs/mine data=~/images output=latents/mine --remove-foreign
      torchrun --nproc_per_node 4 -m ldm_vae.cli latents repair runs/mine output=latents/mine ...

    Args:
        remove_foreign: delete shards and plans of other sets.
    """

    remove_foreign: bool = False


@dataclass(frozen=True)
class RepairResult:
    """`whole`: the set is intact now; otherwise the remaining damage was printed."""

    whole: bool
    dry_run: bool = False

    @property
    def exit_code(self) -> int:
        return 0 if self.whole or self.dry_run else 1


@dataclass(frozen=True)
class Damage:
    """The work to do, for every process.

    Attributes:
        shards: segment -> its units to make again.
        segments: the planned segments of the set.
        checksums: shard number -> the recorded checksum, if any.
        plans: numbers of the segments whose plan is damaged.
        foreign: files that do not belong here.
        hopeless: number of findings that cannot be repaired here.
        manifest: whether the manifest is intact.
        any: whether there is any damage.
    """

    shards: Mapping[int, frozenset[int]]
    segments: Mapping[int, Segment]
    checksums: Mapping[int, str]
    plans: tuple[int, ...]
    foreign: tuple[str, ...]
    hopeless: int
    manifest: bool
    any: bool


def repair_latents(config: RepairConfig, *, dry_run: bool = False) -> RepairResult:
    """Verify and repair the set of each size, on the configured device and processes.

    Args:
        dry_run: verify, compare settings and images with the set, and report what would be made again; write nothing.

    Raises:
        UserError: the settings, the autoencoder or the images differ from those of the set. Nothing was changed.
    """
    return run_job(config, partial(repair_all_sizes, dry_run=dry_run))


def repair_all_sizes(config: RepairConfig, accelerator: Any, dry_run: bool = False) -> RepairResult:
    """`repair_latents` with an open accelerator. For all processes."""
    if config.share is not None:
        raise UserError("share: has no effect here, since one job makes all damaged shards; leave it out")
    whole = [_repair_set(one, accelerator, dry_run) for _, one in config.of_each_size()]
    return RepairResult(all(whole), dry_run)


def _repair_set(config: RepairConfig, accelerator: Any, dry_run: bool) -> bool:
    """Repair the set of one size. Returns: whether it is intact now."""
    folder = cast(Folder, Sparing(open_folder(config.output)))
    damage = run_on_main(accelerator, partial(_examine, config.output, dry_run))
    if not damage.any:
        return True
    _refuse_imported(damage, config.output)
    job = prepare(config, accelerator) if 0 in damage.shards or damage.segments[0].origin is None else None
    if job is not None:
        job = _first_segment_job(job, folder, damage)
    if dry_run:
        shards = pluralize(sum(map(len, damage.shards.values())), "shard")
        expected = f"; one of them takes {_seconds_a_shard(job)}" if job is not None and damage.shards else ""
        end_dry_run(config.output, f"{shards} would be encoded again{expected}")
        return False
    run_on_main(accelerator, partial(_restore_plans, folder, damage, job.origin if job else None))
    done: list[int] = []
    if job is not None and 0 in damage.shards:
        _encode(job, Output(folder, job.origin), damage.segments[0], damage.shards[0])
        done.append(0)
    done += _encode_later_segments(config, accelerator, folder, damage, done)
    return run_on_main(accelerator, partial(_finish, folder, damage, done, config.remove_foreign))


def _seconds_a_shard(job: Job) -> str:
    """The time of encoding a shard without reading, as text."""
    return f"about {duration_text(job.config.shard_size / preview_encoding(job).images_per_second)}"


def _encode_later_segments(
    config: RepairConfig, accelerator: Any, folder: Folder, damage: Damage, done: Sequence[int]
) -> list[int]:
    """Make the damaged shards of appended segments with these settings again. Returns: their numbers."""
    numbers, made = sorted(number for number in damage.shards if number), []
    if numbers and not damage.manifest:  # it is needed to find their images
        run_on_main(accelerator, partial(_rebuild, folder, damage, numbers[0]))
    refusals: dict[int, UserError | SystemExit] = {}
    for number in numbers:
        try:
            job, output = segment_job(config, accelerator, folder, number)
        except (UserError, SystemExit) as error:  # the second if the main process has the first
            refusals[number] = error
            continue
        _encode(job, output, damage.segments[number], damage.shards[number])
        made.append(number)
    if refusals and not (done or made or damage.plans or not damage.manifest):
        raise next(iter(refusals.values()))
    if accelerator.is_main_process:
        for number, refusal in refusals.items():
            say(f"{refusal} - so the damaged shards of segment {number} are not repaired now")
    return made


def _refuse_imported(damage: Damage, where: str) -> None:
    """Raises: UserError if shards are damaged whose images are not available."""
    origin = damage.segments[0].origin
    if 0 in damage.shards and origin is not None and origin.dataset["source"] == IMPORTED:
        instead = "run the same `ldm-vae latents import` command again, which makes damaged shards again"
        raise UserError(where, "its latents were imported, so there are no images to encode", instead)


def _examine(location: str, dry_run: bool) -> Damage:
    verification = verify(location, progress=True, command="latents repair")
    if verification.whole and not verification.finished:
        instead = f"run the same `{verification.command}` command again"
        raise UserError(location, "is not damaged, but not finished", instead)
    if verification.findings:
        for line in verification.remarks():
            say(line)
    elif dry_run:
        end_dry_run(
            location, "the set is intact, so nothing would be made; it takes about the time of this verification"
        )
    else:
        say_verification(verification)
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
    """The recorded checksum of a shard, from the index or from its sidecar."""
    if state.index is not None and segment.listed and shard < len(state.index):
        return state.index[shard].checksum
    try:
        header = read_sidecar_header(state.folder, shard)
    except UserError:
        return None
    return header.record.checksum if header.origin == segment.digest else None


def _first_segment_job(job: Job, folder: Folder, damage: Damage) -> Job | None:
    """The job that makes the first segment again; None if the settings belong to another segment. For all processes.
    Raises: UserError if they must be those of the first segment and are not."""
    fits, grown = run_on_main(job.accelerator, partial(_is_first_segment, job, folder, damage))
    if grown is not None:
        job, _ = open_segment(job, folder, grown)
    return job if fits else None


def _is_first_segment(job: Job, folder: Folder, damage: Damage) -> tuple[bool, NewSegment | None]:
    """(whether the settings are those of the first segment; the segment, if its source has grown since)."""
    segment = damage.segments[0]
    if segment.origin is None:
        if job.origin.digest != segment.digest:
            raise UserError(
                f"{folder.location}/{plan_name(0)}",
                f"is damaged, and these settings make another one: its digest was {short(segment.digest)} and theirs "
                f"is {short(job.origin.digest)}",
                "give exactly the settings, the autoencoder and the images of the first run",
            )
        return True, None
    try:
        if _only_images_differ(job.origin, segment.origin):
            if len(damage.segments) > 1 and damage.manifest:
                return True, first_segment(job, folder)
            here, there = job.origin.dataset, segment.origin.dataset
            raise UserError(
                folder.location,
                f"was made with {there['count']} images, the given ones are {here['count']}, and their fingerprint is "
                f"{short(here['fingerprint'])} instead of {short(there['fingerprint'])}: images were added, removed or "
                "changed since",
                "give exactly the images of the first run, for example a folder with links to them",
            )
        check_same(to_dict(job.origin), to_dict(segment.origin), folder.location, OTHER_ORIGIN)
    except UserError as error:
        if set(damage.shards) == {0}:
            raise
        say(f"{error} - so only the shards of other segments are made again now")
        return False, None
    return True, None


def _only_images_differ(ours: Origin, theirs: Origin) -> bool:
    here, there = ours.dataset, theirs.dataset
    same = replace(ours, dataset={}, autoencoder={}) == replace(theirs, dataset={}, autoencoder={})
    same = same and all(here[key] == there[key] for key in ("source", "part", "held_out"))
    return same and here["fingerprint"] != there["fingerprint"]


def _restore_plans(folder: Folder, damage: Damage, ours: Origin | None) -> None:
    """Restore damaged plans from the manifest; without it, that of the first segment from the settings."""
    lost = [number for number in damage.plans if damage.segments[number].origin is None]
    if lost and not (lost == [0] and ours is not None):
        others = "nothing else holds what was in it" if damage.manifest else "so is the manifest"
        instead = "restore one of them from a copy, or encode to another output"
        raise UserError(f"{folder.location}/{plan_name(lost[0])}", f"is damaged, and {others}", instead)
    if damage.plans:
        with folder.lock(LOCK):
            for number in damage.plans:
                origin = damage.segments[number].origin or ours
                assert origin is not None
                write_plan(folder, origin, number)
                say(f"{folder.location}: {plan_name(number)} is restored")


def _encode(job: Job, output: Output, segment: Segment, units: Iterable[int]) -> None:
    """Make these units of a segment again. For all processes."""
    units = frozenset(units)
    with contextlib.ExitStack() as stack:

        def take() -> Origin:
            stack.enter_context(output.open())
            return output.origin

        output.origin = run_on_main(job.accelerator, take)
        if not job.accelerator.is_main_process:
            stack.enter_context(output.folder.watch(LOCK))
        total = segment.shards or max(units) + 1
        encode_units(replace(job, origin=output.origin), output, frozenset(range(total)) - units)
        wait_for_all(job.accelerator)


def _rebuild(folder: Folder, damage: Damage, end: int | None = None) -> None:
    """Derive index, list of rejected images and manifest of the segments before `end` from plans and sidecars."""
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


def _finish(folder: Folder, damage: Damage, done: Iterable[int], remove_foreign: bool) -> bool:
    """Publish the derived records and print the result for each shard. Returns: whether the set is intact."""
    where = folder.location
    for number in done:
        first = damage.segments[number].first_shard
        for shard in sorted(first + unit for unit in damage.shards[number]):
            before, now = damage.checksums.get(shard), read_sidecar_header(folder, shard).record.checksum
            if before is None:
                found = "no checksum of the earlier one is left"
            elif before == now:
                found = "the same bytes as before"
            else:
                found = "other bytes than before (another machine, or other versions)"
            say(f"{where}: {shard_name(shard)} is made again: {found}")
    for name in damage.foreign:
        if remove_foreign:
            folder.remove(name)
        what = (
            "is removed" if remove_foreign else "does not belong to this set and is kept; --remove-foreign deletes it"
        )
        say(f"{where}: {name} {what}")
    left = {number: units for number, units in damage.shards.items() if number not in set(done)}
    for number, units in left.items():
        things = pluralize(len(units), "damaged shard")
        say(f"{where}: {things} of segment {number} left; run this again with the settings that made it")
    if left:
        return False
    _rebuild(folder, damage)
    verification = verify(where, quick=True)
    if damage.hopeless:
        say(f"{where}: {damage.hopeless} of the findings above cannot be repaired here")
    say_verification(verification)
    return verification.whole and not damage.hopeless


class Sparing:
    """A folder that does not rewrite a file whose content is already right.

    Args:
        hidden: files to leave out of listings.
    """

    def __init__(self, folder: Folder, hidden: frozenset[str] = frozenset()) -> None:
        self.folder, self.hidden = folder, hidden

    def write(self, name: str, data: bytes) -> None:
        with contextlib.suppress(OSError, UserError):  # an unreadable file is replaced
            if self.folder.read(name) == data:
                return
        self.folder.write(name, data)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {name: size for name, size in self.folder.sizes(prefix).items() if name not in self.hidden}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.folder, name)
