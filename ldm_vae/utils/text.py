"""Text for people: numbers, sizes and times in sentences, tables in Markdown."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that move the cursor, color a terminal or turn the direction of the text; tabs and new lines are not."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def without_control(text: str) -> str:
    """The same text with control characters as `\\x1b`: names of files and classes come from strangers."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def csv_cell(value: object) -> object:
    """A value for a table that people open in a spreadsheet: text that would be taken as a formula begins with `'`."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def markdown_name(name: str) -> str:
    """A name from outside as plain text in Markdown: no control characters, no markup, no new lines."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", without_control(name).replace("\n", " "))


def python_text(name: str) -> str:
    """A name from outside as a literal of Python, in double quotes where it can be."""
    return f'"{name}"' if name.isprintable() and not set(name) & set('"\\') else repr(name)


def pluralize(number: int, thing: str) -> str:
    """`1 sample`, `2,000 samples`, `3 batches`, `4 classes`."""
    if number == 1:
        return f"{number:,} {thing}"
    return f"{number:,} {thing}{'es' if thing.endswith(('s', 'ch')) else 's'}"


LONGEST_NAME_BYTES = 200
"""Largest size of a file name without its ending. File systems allow 255 bytes, with the mark of a temporary file."""


def short_name(name: str, longest_bytes: int = LONGEST_NAME_BYTES) -> str:
    """A name that a file can have: a longer one is cut between two characters and gets a hash, so that it is unique.

    >>> short_name("a" * 300, 20)
    'aaaaaaaaaaa-a5de59a0'
    """
    data = name.encode("utf-8", "surrogateescape")
    if len(data) <= longest_bytes:
        return name
    mark = hashlib.blake2b(data, digest_size=4).hexdigest()
    return f"{data[: longest_bytes - len(mark) - 1].decode('utf-8', 'ignore')}-{mark}"


def duration_text(seconds: float) -> str:
    """A time in its two largest units: `0.4 s`, `42 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, smaller, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def rate_text(per_second: float, thing: str) -> str:
    """`13.5 images/s`; below one a second `2.4 s/image`; of bytes `12.3 MB/s`."""
    if thing == "byte":
        return f"{size_text(round(per_second))}/s"
    if per_second >= 1:
        return f"{per_second:.1f} {pluralize(2, thing).split(' ', 1)[1]}/s"
    return f"{1 / max(1e-9, per_second):.1f} s/{thing}"


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
