"""Reading a file that somebody else named: only regular files, without waiting for pipes and devices."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ldm_vae.data.decoding import ImageRejected


def read_regular_file(path: str | Path, length: int | None = None) -> bytes:
    """The first `length` bytes, or all. Raises: ImageRejected `unreadable`."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageRejected("unreadable", "is no regular file")
            return file.read(-1 if length is None else length)
    except OSError as error:
        raise ImageRejected("unreadable", f"cannot be opened: {error.strerror}") from error
