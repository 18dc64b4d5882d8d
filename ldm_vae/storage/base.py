"""The interface of local and remote folders, and checks of file names and URLs."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ldm_vae.errors import FolderLocked, UserError

LOCAL_URL = re.compile(r"^(file|local)://")
REFUSED_NAME = re.compile(r"^\.?$|\.\.|[/\\*?\[\x00-\x1f]")
"""Characters of names that could lead out of the folder, or be read as a pattern by a filesystem."""


class Folder(Protocol):
    """The files directly inside a folder. Picklable; usable in forked and in spawned processes.

    Every method raises UserError if access is denied, or if the store still cannot be reached after several attempts.

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
        """Name -> size in bytes of the visible files that begin with `prefix`; empty if the folder does not exist."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file. A missing file is not an error."""
        ...

    def checksum(self, name: str) -> str:
        """`xxh3_128:HEX` of a file's bytes, read in blocks. Raises: FileNotFoundError."""
        ...

    def local(self, name: str, checksum: str) -> Path:
        """A file on this machine with that content, for memory mapping.

        For a local folder it is the file itself, unchecked. A copy of a remote file is verified at its first use in a
        process, and is kept at least until this process asks for the next one.

        Raises:
            FileNotFoundError: it does not exist.
            UserError: what was downloaded has another checksum.
        """
        ...

    def clean(self) -> None:
        """Remove temporary files of killed writers. The caller must hold the lock."""
        ...

    def free_bytes(self) -> int | None:
        """Free bytes on the device; None for an object store."""
        ...

    def lock(self, name: str) -> AbstractContextManager[None]:
        """An exclusive lock called `name`. Raises: FolderLocked if another process holds it."""
        ...

    def watch(self, name: str) -> AbstractContextManager[None]:
        """For the other processes of a job whose main process holds the lock `name`: they share its protection.

        Raises: UserError if this process does not see the lock: the machines do not share the folder.
        """
        ...

    def holder(self, name: str) -> str | None:
        """The holder of the lock, for example `process 4711 on host x`; None if it is free."""
        ...


def is_url(location: str | Path) -> bool:
    """True for URLs that are opened with fsspec; `file://` URLs are paths."""
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
    """Raises: UserError if `name` is not a plain file name. Names may come from untrusted files."""
    if REFUSED_NAME.search(name):
        raise UserError(f"{name!r}: is not a plain file name; check where the name comes from")
    return name


def locked_by(location: str, holder: str, name: str) -> FolderLocked:
    """The error for a lock that another process holds."""
    what = f"{holder} is using this folder ({name})"
    return FolderLocked(location, what, "wait for it, or give another folder", holder=holder)
