"""What a folder of files is, wherever it is: the protocol, names and addresses."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ldm_vae.errors import FolderLocked, UserError

LOCAL_URL = re.compile(r"^(file|local)://")
REFUSED_NAME = re.compile(r"^\.?$|\.\.|[/\\*?\[\x00-\x1f]")
"""Names that could lead out of the folder, or that a filesystem could take for a pattern."""


class Folder(Protocol):
    """The files directly inside a folder. Picklable; usable in forked and in spawned processes.

    Every method raises UserError where access is denied or the store cannot be reached, after some attempts.

    Attributes:
        location: the folder as the user wrote it.
    """

    location: str

    def read(self, name: str, length: int | None = None) -> bytes:
        """The first `length` bytes of a file, or all. Raises: FileNotFoundError."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Publish a file, complete or not at all. Raises: OSError with ENOSPC or EDQUOT when the disk is full."""
        ...

    def exists(self, name: str) -> bool: ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Name -> bytes of the visible files that begin with `prefix`, from one listing; empty without a folder."""
        ...

    def remove(self, name: str) -> None:
        """A missing file is not an error."""
        ...

    def checksum(self, name: str) -> str:
        """`xxh3_128:HEX` of a file's bytes, read in blocks. Raises: FileNotFoundError."""
        ...

    def local(self, name: str, checksum: str) -> Path:
        """A file on this machine with that content, to be memory-mapped.

        On a disk it is the file itself, not checked. A copy of a remote file is compared at its first use in a process,
        and stays at least until this process asks for the next one.

        Raises:
            FileNotFoundError: it is not there.
            UserError: what was downloaded has another checksum.
        """
        ...

    def clean(self) -> None:
        """Remove what killed writers left behind. The caller has the lock."""
        ...

    def free_bytes(self) -> int | None:
        """Of the device; None where this has no meaning."""
        ...

    def lock(self, name: str) -> AbstractContextManager[None]:
        """An exclusive lock called `name`. Raises: FolderLocked where another process has it."""
        ...

    def holder(self, name: str) -> str | None:
        """Who has the lock now, as `process 4711 on host x`; None when it is free."""
        ...


def is_url(location: str | Path) -> bool:
    """True for what fsspec reaches; `file://` URLs are paths."""
    assert not (isinstance(location, Path) and re.match(r"[a-z0-9]{2,}:/", str(location))), f"{location} was a URL"
    return "://" in str(location) and not LOCAL_URL.match(str(location))


def local_path(location: str | Path) -> Path:
    """The path of a location for which `is_url` is false."""
    return Path(LOCAL_URL.sub("", str(location))).expanduser()


def join(location: str | Path, name: str) -> str | Path:
    """The folder `name` inside another one."""
    check_name(name)
    return location / name if isinstance(location, Path) else f"{location.rstrip('/')}/{name}"


def check_name(name: str) -> str:
    """Raises: UserError: not a plain file name. Names are also read from the files of others."""
    if REFUSED_NAME.search(name):
        raise UserError(f"{name!r}: is not the plain name of a file in its folder; check where the name comes from")
    return name


def locked_by(location: str, holder: str, name: str) -> FolderLocked:
    """The refusal of a lock that another process has."""
    what = f"{holder} is at work here ({name})"
    return FolderLocked(location, what, "wait for it, or give another folder", holder=holder)
