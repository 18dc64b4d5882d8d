"""What `verify` says: each thing that is wrong with a set, the samples it concerns, and what mends it.

Owns these records and their words, for people and as JSON; how damage is found is the business of the files beside.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

from ldm_vae.errors import UserError
from ldm_vae.latents.words import counted, size_text

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
        size = f"{counted(self.count, 'sample')} in {counted(self.shards, 'shard')}"
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
