"""Images that a training could not read: named once, whichever process met them, and listed in `quarantine.jsonl`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm_vae.training.loader import MicroBatch

FILE = "quarantine.jsonl"
SAID_AT_ONCE = 10


class Quarantine:
    """The images that other ones replaced. What an earlier attempt of the run has listed is not listed again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._listed: set[str] = set()
        self._met: list[tuple[str, str]] = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # torn
                    self._listed.add(json.loads(line)["id"])

    def meet(self, parts: Iterable[MicroBatch]) -> None:
        """Take note of what the samples of a step say."""
        for part in parts:
            self._met += [tuple(pair) for pair in part.data.get("rejected", []) if pair[0] not in self._listed]

    def take_new(self, accelerator: Any) -> list[tuple[str, str]]:
        """(id, reason) of those that no process had met before. All processes must call this."""
        from accelerate.utils import gather_object

        met = gather_object(self._met) if accelerator.num_processes > 1 else self._met
        new = [pair for pair in dict(met).items() if pair[0] not in self._listed]
        self._met, self._listed = [], self._listed | {identity for identity, _ in new}
        return new

    def append(self, new: list[tuple[str, str]]) -> None:
        """List them in the file; for the main process. Raises: OSError."""
        with open(self.path, "a+") as file:
            file.seek(0)
            before = file.read()
            torn = bool(before) and not before.endswith("\n")  # by a killed attempt
            lines = [json.dumps({"id": identity, "reason": reason}) + "\n" for identity, reason in new]
            file.write("\n" * torn + "".join(lines))


def sentences(new: list[tuple[str, str]]) -> list[str]:
    """The first ones in words, and how many more there are."""
    said = [f"{identity}: cannot be read ({reason}); another image takes its place" for identity, reason in new]
    more = len(said) - SAID_AT_ONCE
    return said if more <= 0 else [*said[:SAID_AT_ONCE], f"{more} more cannot be read, see {FILE}"]
