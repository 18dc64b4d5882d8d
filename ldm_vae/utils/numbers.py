"""Numbers as arguments: those of Python, numpy and torch are accepted, everything else is refused."""

from __future__ import annotations

import operator
from typing import Any

from ldm_vae.errors import UserError


def whole_number(value: Any, where: str) -> int:
    """An `int` of a whole number of Python, numpy or torch. Raises: UserError naming `where`, also for bools."""
    if type(value) is int:
        return value
    if not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", "")):
        try:
            return operator.index(value)
        except (TypeError, ValueError):  # a float, or an array of several
            pass
    raise UserError(where, f"{value!r} is not a whole number", "give one such as 1")


def plain_number(value: Any, where: str) -> float:
    """An `int` or `float` of a number of Python, numpy or torch. Raises: UserError naming `where`, also for bools."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if type(value) in (int, float) else float(value)
    if not isinstance(value, bool | str | bytes) and "bool" not in str(getattr(value, "dtype", "")):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise UserError(where, f"{value!r} is not a number", "give one such as 1.5")
