"""A description of a collection of images, for the first line of a command and for `--dry-run`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ldm_vae.data.samples import Enlarged, Rejected, enlarged_sentences, iterate_crops
from ldm_vae.data.sources import ImageSource, labels_from
from ldm_vae.utils.text import pluralize

SHOWN_CLASSES = 4
LOOKED_AT = 24
"""Number of images that a dry run reads, to find images that cannot be read or are too small."""


def describe_images(source: ImageSource, count: int | None = None) -> str:
    """`1,998 images of 10 classes (ball, box, cone, cup ...; from the subfolders)`, `3 of 9 images without classes`.

    Args:
        count: how many of them are used; None: all.
    """
    images = pluralize(len(source), "image")
    if count is not None and count != len(source):
        images = f"{count:,} of {images}"
    return f"{images} {describe_classes(source.label_names, labels_from(source))}"


def describe_classes(names: Sequence[str], origin: str = "") -> str:
    """`of 2 classes (cat, dog; from labels.csv)` or `without classes`; `origin`: where they were found."""
    if not names:
        return "without classes"
    more = " ..." if len(names) > SHOWN_CLASSES else ""
    listed = ", ".join(names[:SHOWN_CLASSES]) + more
    return f"of {pluralize(len(names), 'class')} ({listed}{f'; from {origin}' if origin else ''})"


@dataclass
class Look:
    """What was found in a sample of the images of a collection.

    Attributes:
        images: the number of images that were read.
        seconds: the time that reading one image takes.
    """

    images: int = 0
    seconds: float = 0.0
    rejected: Rejected = field(default_factory=list)
    enlarged: Enlarged = field(default_factory=list)

    def lines(self) -> list[str]:
        """The problems that were found, as sentences; empty if there are none."""
        found = []
        if self.rejected:
            name, reason = self.rejected[0]
            images = f"{len(self.rejected)} of {pluralize(self.images, 'image')} looked at"
            found.append(f"{images} cannot be read, for example {name} ({reason})")
        readable = self.images - len(self.rejected)
        for line in enlarged_sentences([short for _, short in self.enlarged], readable):
            found.append(f"of those looked at, {line}")
        return found


def look_at(source: ImageSource, indices: Sequence[int], resolution: int | tuple[int, int]) -> Look:
    """Read at most `LOOKED_AT` of the images at `indices`, evenly spaced, as crops of a side or (h, w)."""
    step = max(1, -(-len(indices) // LOOKED_AT))
    chosen, look, started = list(indices)[::step], Look(), time.perf_counter()
    for _ in iterate_crops(source, chosen, resolution, look.rejected, look.enlarged):
        pass
    look.images = len(chosen)
    look.seconds = (time.perf_counter() - started) / max(1, look.images)
    return look
