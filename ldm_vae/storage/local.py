"""A folder on a local disk, or on one that is mounted: plain files, and locks that end with their process."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from ldm_vae import files
from ldm_vae.errors import DISK_FULL, UserError
from ldm_vae.storage.base import check_name, held_by, local_path

ATTEMPTS, PAUSE_SECONDS = 5, 0.05
ORPHAN_SECONDS = 30.0
"""A data loader's workers look every 5 s whether their process is still there."""
HOLDER = re.compile(r"process (\d+) on host (.*)")


class LocalFolder:
    """See `Folder`."""

    def __init__(self, location: str | Path) -> None:
        self.location, self.path = str(location), local_path(location)
        self._held: dict[str, FileIO] = {}

    def __str__(self) -> str:
        return self.location

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalFolder, (self.location,)  # another process does not hold what this one holds

    def read(self, name: str, length: int | None = None) -> bytes:
        with self._explained("read"), open(self._file(name), "rb") as file:
            return file.read(-1 if length is None else length)

    def write(self, name: str, data: bytes) -> None:
        with self._explained("written"):
            self._check_held()
            files.write_bytes(self._file(name), data)

    def exists(self, name: str) -> bool:
        with self._explained("read"):
            return self._file(name).is_file()

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        with self._explained("read"):
            try:
                entries = os.scandir(self.path)
            except FileNotFoundError:
                return found
            with entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # removed meanwhile
                        if _is_visible(entry, prefix):
                            found[entry.name] = entry.stat().st_size
        return found

    def remove(self, name: str) -> None:
        with self._explained("written"):
            self._file(name).unlink(missing_ok=True)

    def checksum(self, name: str) -> str:
        with self._explained("read"):
            return files.checksum(self._file(name))

    def local(self, name: str, checksum: str) -> Path:
        path = self._file(name)
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return path

    def clean(self) -> None:
        with self._explained("written"):
            for leftover in self.path.glob(".tmp-*"):
                leftover.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        existing = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        return shutil.disk_usage(existing).free

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """The lock is the kernel's (flock) and ends with the process; the file `name` says who holds it.

        It goes with the lock. Once it is no longer there, `write` of this object raises UserError: where a mount has
        vanished, an empty folder of the disk below it would be filled.
        """
        import fcntl  # here: reading works on systems that do not have it

        with self._explained("written"):
            self.path.mkdir(parents=True, exist_ok=True)
            file = self._take(name)
        with file:
            process = os.getpid()
            self._held[name] = file
            try:
                file.truncate(0)
                file.write(f"process {process} on host {socket.gethostname()}".encode())
                yield
            finally:
                del self._held[name]
                if os.getpid() == process:  # workers made by fork share the lock, and may live a little longer
                    if is_at(file, self._file(name)):
                        self._file(name).unlink()
                    fcntl.flock(file, fcntl.LOCK_UN)

    def holder(self, name: str) -> str | None:
        import fcntl

        try:
            with self._explained("read"), open(self._file(name), "rb", buffering=0) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return _named(file)
        except FileNotFoundError:
            pass
        return None

    def _take(self, name: str) -> FileIO:
        """The open file `name`, locked. More than one attempt: `holder` takes the lock for a moment to see whether it
        is free, and the workers of a holder that was killed share its lock until they notice."""
        import fcntl

        started = time.monotonic()
        for attempt in count(1):
            file = open(self._file(name), "a+b", buffering=0)  # noqa: SIM115 - closed by who gets it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    holder = _named(file)
                if attempt >= ATTEMPTS and not (_is_dead(holder) and time.monotonic() - started < ORPHAN_SECONDS):
                    break
                time.sleep(PAUSE_SECONDS)
                continue
            except OSError as error:
                file.close()
                raise UserError(
                    f"{self.location}: this filesystem has no locks ({error.strerror}), so two jobs could meet in one "
                    "folder; mount it with them (Lustre: -o flock), or give a folder elsewhere"
                ) from error
            if is_at(file, self._file(name)):
                return file
            file.close()  # its holder has removed it, and others may hold a new one
        raise held_by(self.location, holder, name)

    def _check_held(self) -> None:
        """Raises: UserError when a lock that this object holds is no longer in the folder."""
        for name, file in self._held.items():
            if not is_at(file, self._file(name)):
                raise UserError(
                    f"{self.location}: has changed under this process ({name} is gone), was it unmounted or removed? "
                    "bring it back and run the same command again"
                )

    def _file(self, name: str) -> Path:
        return self.path / check_name(name)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """System errors in words, but for full disks and missing files to read, which are the caller's business."""
        try:
            yield
        except OSError as error:
            if error.errno in DISK_FULL or (what == "read" and isinstance(error, FileNotFoundError)):
                raise
            reason = error.strerror or type(error).__name__
            raise UserError(f"{self.location}: cannot be {what} ({reason}); give another folder") from error


def _is_visible(entry: os.DirEntry[str], prefix: str) -> bool:
    return entry.name.startswith(prefix) and not entry.name.startswith(".") and entry.is_file()


def is_at(file: BinaryIO | FileIO, path: Path) -> bool:
    """Whether the path leads to this open file now."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _named(file: FileIO) -> str:
    """The holder that a lock's file names."""
    file.seek(0)
    return file.read(200).decode(errors="replace").strip() or "another process"


def _is_dead(holder: str) -> bool:
    """True where the holder was a process of this host that has ended."""
    match = HOLDER.fullmatch(holder)
    if not match or match[2] != socket.gethostname():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False
