"""A folder on a local disk, or on one that is mounted: plain files, and locks that end with their process."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ldm_vae import files
from ldm_vae.errors import UserError
from ldm_vae.storage import DISK_FULL, check_name, held_by, local_path

LOCK_ATTEMPTS, LOCK_PAUSE_SECONDS = 5, 0.05


class LocalFolder:
    """See `Folder`."""

    def __init__(self, location: str | Path) -> None:
        self.location, self.path = str(location), local_path(location)

    def __str__(self) -> str:
        return self.location

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
    def hold(self, name: str) -> Iterator[None]:
        """The lock is the kernel's (flock) and ends with the process; the file `name` stays, and names the holder."""
        import fcntl  # here: reading works on systems that do not have it

        with self._explained("written"):
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self._file(name), "a+")  # noqa: SIM115 - closed below
        with file:
            self._lock(file, name)
            process = os.getpid()
            file.truncate(0)
            file.write(f"process {process} on host {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                if os.getpid() == process:  # workers made by fork share the lock, and may live a little longer
                    fcntl.flock(file, fcntl.LOCK_UN)

    def holder(self, name: str) -> str | None:
        import fcntl

        try:
            with self._explained("read"), open(self._file(name)) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return file.read().strip() or "another process"
        except FileNotFoundError:
            pass
        return None

    def _lock(self, file: TextIO, name: str) -> None:
        """More than one attempt: `holder` takes the lock for a moment to see whether it is free."""
        import fcntl

        for attempt in range(LOCK_ATTEMPTS):
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if attempt < LOCK_ATTEMPTS - 1:
                    time.sleep(LOCK_PAUSE_SECONDS)
        file.seek(0)
        raise held_by(self.location, file.read().strip() or "another process", name)

    def _file(self, name: str) -> Path:
        return self.path / check_name(name)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """System errors in words, but for missing files and full disks, which are the caller's business."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            reason = error.strerror or type(error).__name__
            raise UserError(f"{self.location}: cannot be {what} ({reason}); give another folder") from error


def _is_visible(entry: os.DirEntry[str], prefix: str) -> bool:
    return entry.name.startswith(prefix) and not entry.name.startswith(".") and entry.is_file()
