"""Waiting for a state instead of a time: a slow machine takes longer, and nothing else changes."""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST_SECONDS = 240


def wait_until(condition: Callable[[], object]) -> None:
    """Look every few milliseconds whether it holds. Fails after four minutes."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {LONGEST_SECONDS} s"
        time.sleep(0.005)
