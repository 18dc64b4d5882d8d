"""Numbers and sizes as sentences have them."""

from __future__ import annotations


def pluralize(number: int, thing: str) -> str:
    """`1 sample`, `2,000 samples`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def size_text(size_bytes: int) -> str:
    """In the unit that leaves one to three digits before the point."""
    size, units = float(size_bytes), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.4g} {units[0]}"
