"""A folder on a local or mounted disk: plain files, and locks that end with their process."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from ldm_vae import files
from ldm_vae.errors import DISK_FULL, UserError
from ldm_vae.storage.base import check_name, local_path, locked_by

ATTEMPTS, PAUSE_SECONDS = 5, 0.05
VISIBLE_SECONDS = 30.0
"""So long a network filesystem may hide a file that another machine made."""

_locking: weakref.WeakSet[LocalFolder] = weakref.WeakSet()
"""The folders in which this process holds a lock."""


def _close_locks() -> None:
    """Run in a new fork. It shares the lock while it has the file open, and may outlive a killed holder."""
    for folder in _locking:
        folder.close_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


class LocalFolder:
    """See `Folder`."""

    def __init__(self, location: str | Path) -> None:
        self.location, self.path = str(location), local_path(location)
        self._locks: dict[str, FileIO] = {}

    def __str__(self) -> str:
        return self.location

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalFolder, (self.location,)  # locks do not pass to another process

    def read(self, name: str, length: int | None = None) -> bytes:
        with self._explained("read"), open(self._file(name), "rb") as file:
            return file.read(-1 if length is None else length)

    def write(self, name: str, data: bytes) -> None:
        with self._explained("written"):
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
    def lock(self, name: str) -> Iterator[None]:
        """The lock is the kernel's (flock) and ends with the process; the file `name` names its holder.

        The file is removed with the lock. If it disappears earlier, or is another one, nothing is published in the
        folder any more (see `files.guard`): the mount is gone, or the folder was removed and another job began there.
        """

        with self._explained("written"):
            self.path.mkdir(parents=True, exist_ok=True)
            file = self._take(name)
        with file:
            process = os.getpid()
            self._hold(name, file)
            try:
                file.truncate(0)
                file.write(f"process {process} on host {socket.gethostname()}".encode())
                yield
            finally:
                self._release(name)
                if os.getpid() == process and is_at(file, self._file(name)):  # not in a fork
                    self._file(name).unlink()

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """See `Folder`. Network filesystems may show the file late."""
        with self._explained("opened"), self._appeared(name) as file:
            self._hold(name, file)
            try:
                yield
            finally:
                self._release(name)

    def _appeared(self, name: str) -> FileIO:
        end = time.monotonic() + VISIBLE_SECONDS
        while True:
            try:
                return open(self._file(name), "rb", buffering=0)
            except FileNotFoundError:
                if time.monotonic() > end:
                    raise UserError(
                        self.location,
                        f"is another folder here than for the main process ({name} is not in it)",
                        "give a folder that all machines share",
                    ) from None
            time.sleep(PAUSE_SECONDS)

    def _hold(self, name: str, file: FileIO) -> None:
        self._locks[name] = file
        _locking.add(self)
        files.guard(self.path, name, self._check_locks)

    def _release(self, name: str) -> None:
        files.guard(self.path, name, None)
        self._locks.pop(name, None)

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
        """The open file `name`, locked. Tries more than once, because `holder` takes the lock briefly to test whether
        it is free."""
        import fcntl

        for attempt in count(1):
            file = open(self._file(name), "a+b", buffering=0)  # noqa: SIM115 - closed by the caller
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    holder = _named(file)
                if attempt >= ATTEMPTS:
                    raise locked_by(self.location, holder, name) from None
                time.sleep(PAUSE_SECONDS)
                continue
            except OSError as error:
                file.close()
                raise UserError(
                    f"{self.location}: this filesystem has no locks ({error.strerror}), so two jobs could write to one "
                    "folder; mount it with locks (Lustre: -o flock), or give a folder elsewhere"
                ) from error
            if is_at(file, self._file(name)):
                return file
            file.close()  # its holder has removed it, and others may have locked a new one
        raise AssertionError("the last attempt returns or raises")

    def close_locks(self) -> None:
        """Close the lock files in a fork of the holder; the holder keeps its locks."""
        for name, file in list(self._locks.items()):
            file.close()
            self._release(name)

    def _check_locks(self) -> None:
        """Raises: UserError if the file of a lock is no longer in the folder."""
        for name, file in self._locks.items():
            if not is_at(file, self._file(name)):
                raise UserError(
                    self.location,
                    f"was removed, replaced or unmounted while in use ({name} is not the one of this job)",
                    "restore the folder and run the same command again, or give another folder",
                )

    def _file(self, name: str) -> Path:
        return self.path / check_name(name)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn system errors into UserErrors, except full disks and missing files, which the caller handles."""
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
    """Whether the path still leads to this open file."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _named(file: FileIO) -> str:
    """The holder named in a lock file."""
    file.seek(0)
    return file.read(200).decode(errors="replace").strip() or "another process"
