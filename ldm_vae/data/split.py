"""Train and held-out parts of a collection. The part of an image depends only on its id, so it never changes.

    all = train + held_out        held_out = validation + test

Settings, checkpoints and models are chosen on `validation`. The reported results are measured on `test`.
Adding images does not move any other, and a larger `held_out` only adds to the held-out part and to both of its halves.
The id belongs to the source image (a file name or a row), so crops of one image are never in two parts.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from typing import Literal

import numpy as np

from ldm_vae.data.sources import ImageSource, labels_from
from ldm_vae.errors import UserError

Part = Literal["all", "train", "held_out", "validation", "test"]

NEVER_TRAINED_ON = ("held_out", "validation", "test")


def part_of(id: str, held_out: float) -> Literal["train", "held_out"]:
    """The part of an image id; a fraction `held_out` (0 to 1) of all ids is held out."""
    place = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") / 2**64
    return "held_out" if place < held_out else "train"


def half_of(id: str) -> Literal["validation", "test"]:
    """The half of the held-out part that an image id belongs to if it is held out; other bytes of the same hash."""
    return "validation" if hashlib.sha256(id.encode()).digest()[8] < 128 else "test"


def in_part(id: str, part: Part, held_out: float) -> bool:
    """Whether an image id is in a part at this fraction of held-out ids."""
    if part == "all":
        return True
    found = part_of(id, held_out)
    return found == part or (found == "held_out" and half_of(id) == part)


def subset(source: ImageSource, part: Part, held_out: float) -> ImageSource:
    """A view of one part of a source; `all` is the source itself. Ids and labels pass through.

    Raises:
        UserError: if the part would be empty.
    """
    if part == "all":
        return source
    indices = [i for i in range(len(source)) if in_part(source.id(i), part, held_out)]
    if not indices:
        cure = "lower data.held_out" if part == "train" else "increase data.held_out"
        raise UserError(
            f"data: none of the {len(source)} images is in the {part} part at data.held_out={held_out}; "
            f"{cure} or add images"
        )
    return Subset(source, np.array(indices, np.int64), f"{part} {held_out!r}")


def repeated(source: ImageSource, times: Mapping[str, int]) -> ImageSource:
    """A view that repeats images whose ids match a pattern (`photos/*`) in each epoch. The first match counts.

    Raises:
        UserError: a pattern matches no image, or only images that earlier patterns match.
    """
    if not times:
        return source
    first = [next((p for p in times if fnmatch.fnmatchcase(source.id(i), p)), None) for i in range(len(source))]
    for pattern in times:
        if pattern not in first:
            raise UserError(f"repeat: no training image is left for {pattern!r}; ids look like {source.id(0)!r}")
    counts = [1 if pattern is None else times[pattern] for pattern in first]
    return Subset(source, np.repeat(np.arange(len(source)), counts), f"repeated {dict(times)!r}")


class Subset:
    """The images of another source at `indices`, in this order. `name` is part of the fingerprint."""

    def __init__(self, source: ImageSource, indices: np.ndarray, name: str) -> None:
        self.source, self.indices, self.name = source, indices, name
        self.label_names, self.labels_from = source.label_names, labels_from(source)

    def __len__(self) -> int:
        return len(self.indices)

    def id(self, i: int) -> str:
        return self.source.id(int(self.indices[i]))

    def label(self, i: int) -> int:
        return self.source.label(int(self.indices[i]))

    def read(self, i: int) -> np.ndarray:
        return self.source.read(int(self.indices[i]))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.source.fingerprint()} {self.name}".encode()).hexdigest()
