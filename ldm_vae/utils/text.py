"""Console text: numbers and sizes in sentences, and the progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Iterable[Item], task: str, unit: str = "image", total: int | None = None) -> Iterator[Item]:
    """Yield the items with a progress bar on standard error that disappears at the end."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=task, unit=unit, total=total, dynamic_ncols=True, leave=False))


def pluralize(number: int, thing: str) -> str:
    """`1 sample`, `2,000 samples`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def size_text(size_bytes: int) -> str:
    """A size in the unit that leaves one to three digits before the decimal point."""
    size, units = float(size_bytes), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.4g} {units[0]}"
