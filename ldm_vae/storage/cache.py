"""Copies of remote files on this machine, kept under their checksums and shared by all processes.

Owns where they are, that they are whole, that one process at a time fetches each, and which ones are removed when room
is needed: the least recently used. `remote` downloads them.

The access time of a copy says when it was last used, and is set here: many filesystems do not. The locks are the
kernel's (flock) and end with their process; without them a copy may be fetched twice, which costs time only.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ldm_vae import files
from ldm_vae.errors import DISK_FULL, UserError
from ldm_vae.storage.local import is_at

logger = logging.getLogger(__name__)

KEEP_FREE_SHARE = 0.05
"""Of the disk, where no limit is set."""
LISTING_SHARE = 1 / 256
"""The folder is listed again after this share of the limit was fetched here: it may hold 100,000 copies."""
STALE_SECONDS = 86400.0
"""No download takes that long: temporary files and locks of this age are of killed processes."""
PATIENCE_SECONDS = 120.0
"""For the download of another process, which may be stopped; data loaders wait no more than 300 s for a worker."""
PAUSE_SECONDS = 0.02
UNLOCKED_SECONDS = 60.0
"""Where there are no locks, copies used in this time stay: a process may be about to open them."""
MOST_REMEMBERED = 1 << 16

COPY = re.compile(r"[0-9a-f]{32}")
LEFTOVER = re.compile(r"\.tmp-[0-9a-f]{8}-[0-9a-f]{32}|\.[0-9a-f]{32}\.lock")


@dataclass(frozen=True)
class Copy:
    """A file of the folder. `used_seconds`: since 1970."""

    path: Path
    size_bytes: int
    used_seconds: float


def cache_folder() -> Path:
    """Where copies of remote files are kept: `$LDM_VAE_CACHE` or `~/.cache/ldm_vae/shards`."""
    return Path(os.environ.get("LDM_VAE_CACHE") or "~/.cache/ldm_vae/shards").expanduser()


def cache_limit_bytes() -> int | None:
    """`$LDM_VAE_CACHE_GB` in bytes, None where it is not set. Raises: UserError: not a number."""
    text = os.environ.get("LDM_VAE_CACHE_GB")
    if not text:
        return None
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise UserError(f"LDM_VAE_CACHE_GB={text}: is not a number of gigabytes; give one, as 200, or leave it out")
    return int(gigabytes * 1e9)


@functools.cache
def open_cache(folder: Path, limit_bytes: int | None) -> Cache:
    """One for each folder and limit in this process."""
    return Cache(folder, limit_bytes)


class Cache:
    """A folder of copies. Other files in it are left alone.

    Holds at most `limit_bytes` and what is being downloaded; None: what leaves KEEP_FREE_SHARE of the disk free. A
    process that has a removed copy mapped reads on, and the disk space is free once it lets go.
    """

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._whole: set[tuple[str, int, int, int]] = set()
        self._unlisted_bytes: float = math.inf  # fetched since the folder was listed
        self._pin: BinaryIO | None = None

    def get(self, digest: str, download: Callable[[Path], object]) -> Path:
        """The copy whose xxh3_128 is `digest` (32 hex digits), made by `download(temporary_path)` where needed.

        Its content is compared at its first use in this process. It stays at least until the next call in this
        process, so there is time to open it.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
            Exception: whatever `download` raises, which is to compare the checksum.
        """
        if self._pin:
            self._pin.close()
        copy = self.folder / digest
        pin = self._open_whole(copy)
        while pin is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone(digest) as waited:
                if not waited:
                    pin = self._open_whole(copy) or self._fetch(copy, download)
            pin = pin or self._open_whole(copy)  # what the other process fetched, if it could
        self._pin = pin
        with suppress(OSError):  # of another user, or read-only
            os.utime(copy, ns=(time.time_ns(), os.fstat(pin.fileno()).st_mtime_ns))
        return copy

    def _open_whole(self, copy: Path) -> BinaryIO | None:
        """The copy, with a shared lock that keeps it from being removed; None where it is missing or damaged."""
        while True:
            try:
                file = open(copy, "rb")  # noqa: SIM115 - closed by the caller
            except OSError:
                return None
            take_lock(file, shared=True, patience_seconds=1.0)
            try:
                is_whole, is_there = self._is_whole(file, copy), is_at(file, copy)
            except OSError:  # the disk is damaged
                is_whole, is_there = False, True
            if is_whole and is_there:
                return file
            file.close()
            if is_there:
                return None

    def _is_whole(self, file: BinaryIO, copy: Path) -> bool:
        status = os.fstat(file.fileno())
        identity = (copy.name, status.st_ino, status.st_size, status.st_mtime_ns)
        if identity not in self._whole:
            if files.checksum(copy) != f"xxh3_128:{copy.name}":
                return False
            self._remember(identity)
        return True

    def _remember(self, identity: tuple[str, int, int, int]) -> None:
        if len(self._whole) >= MOST_REMEMBERED:
            self._whole.clear()
        self._whole.add(identity)

    def _fetch(self, copy: Path, download: Callable[[Path], object]) -> BinaryIO:
        """Without fsync: what a crash leaves is compared before it is used."""
        if copy.exists():
            logger.warning("%s: this copy is damaged; fetching it again", copy)
        temporary = self.folder / f".tmp-{uuid.uuid4().hex[:8]}-{copy.name}"
        try:
            while True:
                try:
                    download(temporary)
                    break
                except OSError as error:
                    written = temporary.stat().st_size if temporary.exists() else 0
                    temporary.unlink(missing_ok=True)
                    if error.errno not in DISK_FULL or not remove_oldest(self._list(), max(written, 1)):
                        raise
            pin = open(temporary, "rb")  # noqa: SIM115 - closed by the caller
            take_lock(pin, shared=True)
            os.replace(temporary, copy)
        finally:
            temporary.unlink(missing_ok=True)
        status = os.fstat(pin.fileno())
        self._remember((copy.name, status.st_ino, status.st_size, status.st_mtime_ns))
        self._make_room(copy, status.st_size)
        return pin

    def _make_room(self, fetched: Path, fetched_bytes: int) -> None:
        self._unlisted_bytes += fetched_bytes
        disk = shutil.disk_usage(self.folder)
        if self.limit_bytes is None:
            missing, list_after_bytes = KEEP_FREE_SHARE * disk.total - disk.free, math.inf
        else:
            missing, list_after_bytes = 0.0, LISTING_SHARE * self.limit_bytes
        if missing <= 0 and self._unlisted_bytes < list_after_bytes:
            return
        copies = self._list()
        self._unlisted_bytes = 0
        if self.limit_bytes is not None:
            missing = sum(copy.size_bytes for copy in copies) - self.limit_bytes
        elif missing > 0:
            missing += LISTING_SHARE * disk.total  # else the next one would list again
        remove_oldest([copy for copy in copies if copy.path != fetched], missing)

    def _list(self) -> list[Copy]:
        """The finished copies. What killed processes left behind is removed."""
        copies = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed meanwhile
                    if COPY.fullmatch(entry.name):
                        status = entry.stat()
                        copies.append(Copy(Path(entry.path), status.st_size, status.st_atime))
                    elif LEFTOVER.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > STALE_SECONDS:
                        with suppress(OSError):  # of another user
                            os.unlink(entry.path)
        return copies

    @contextmanager
    def _alone(self, digest: str) -> Iterator[bool]:
        """No other process fetches this copy. Yields whether one had to be waited for: then it may be there.

        After PATIENCE_SECONDS, and where there are no locks, others may.
        """
        path, end, waited = self.folder / f".{digest}.lock", time.monotonic() + PATIENCE_SECONDS, False
        while True:
            try:
                file = open(path, "a+b")  # noqa: SIM115 - closed below
            except OSError:  # the download will say why
                yield False
                return
            with file:
                taken = take_lock(file)
                if taken is False:
                    waited, taken = True, take_lock(file, patience_seconds=end - time.monotonic())
                if not taken:
                    yield False
                    return
                if is_at(file, path):
                    try:
                        yield waited
                    finally:
                        with suppress(OSError):
                            path.unlink()
                        drop_lock(file)
                    return
                waited = True  # its holder has removed it, and others may have locked a new one


def take_lock(file: BinaryIO, *, shared: bool = False, patience_seconds: float = 0.0) -> bool | None:
    """Whether the lock is ours now, until the file is closed; None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    end = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(PAUSE_SECONDS)
        except OSError:
            return None


def drop_lock(file: BinaryIO) -> None:
    """Also for processes that were forked meanwhile: they have the file open too."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def remove_oldest(copies: list[Copy], at_least_bytes: float) -> int:
    """Remove copies, those used longest ago first, except those that a process is about to open. Returns bytes."""
    removed = 0
    for copy in sorted(copies, key=lambda copy: copy.used_seconds):
        if removed >= at_least_bytes:
            break
        with suppress(OSError):  # of another user
            removed += copy.size_bytes if _remove(copy) else 0
    return removed


def _remove(copy: Copy) -> bool:
    try:
        with open(copy.path, "r+b") as file:  # some network filesystems lock only what may be written
            is_free = take_lock(file)
            if is_free is None:
                is_free = not 0 <= time.time() - copy.used_seconds < UNLOCKED_SECONDS
            if is_free and is_at(file, copy.path):  # else it was removed meanwhile, and perhaps fetched again
                copy.path.unlink()
            return is_free
    except FileNotFoundError:  # by another process
        return True
