"""Text for people: numbers and sizes in sentences, the progress bar, tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Table:
    """Cells as text; `notes` stand below."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())

    def markdown(self) -> list[str]:
        """The lines of the table, without its notes."""
        return markdown_table(self.headings, self.rows)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; a `|` in a cell is escaped."""
    return [
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * len(headings),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]
