"""Copies of remote files on this machine, kept under their checksums and shared by all processes.

This module decides where copies are kept, verifies them, lets only one process download each, and removes the least
recently used ones when room is needed. `remote` does the downloading.

The access time of a copy is its last use; it is set here, since many filesystems do not update it. The locks are the
kernel's (flock) and end with their process; without them a copy may be downloaded twice, which only costs time.
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
"""Share of the disk that is kept free if no limit is set."""
LISTING_SHARE = 1 / 256
"""Share of the limit that is downloaded before the folder is listed again: it may hold 100,000 copies."""
STALE_SECONDS = 86400.0
"""No download takes this long. Older temporary files and locks were left by killed processes."""
PATIENCE_SECONDS = 120.0
"""Longest wait for the download of another process, which may be stopped; a data loader waits 300 s for a worker."""
PAUSE_SECONDS = 0.02
UNLOCKED_SECONDS = 60.0
"""Without locks, copies used within this time are kept, because a process may be about to open them."""
MOST_REMEMBERED = 1 << 16

COPY = re.compile(r"[0-9a-f]{32}")
LEFTOVER = re.compile(r"\.tmp-[0-9a-f]{8}-[0-9a-f]{32}|\.[0-9a-f]{32}\.lock")


@dataclass(frozen=True)
class Copy:
    """A file in the cache. `used_seconds`: time of the last use, since 1970."""

    path: Path
    size_bytes: int
    used_seconds: float


def cache_folder() -> Path:
    """Where copies of remote files are kept: `$LDM_VAE_CACHE` or `~/.cache/ldm_vae/shards`."""
    return Path(os.environ.get("LDM_VAE_CACHE") or "~/.cache/ldm_vae/shards").expanduser()


def cache_limit_bytes() -> int | None:
    """`$LDM_VAE_CACHE_GB` in bytes, None if it is not set. Raises: UserError if it is not a number."""
    text = os.environ.get("LDM_VAE_CACHE_GB")
    if not text:
        return None
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise UserError(f"LDM_VAE_CACHE_GB={text}: is not a number of gigabytes; give one such as 200, or unset it")
    return int(gigabytes * 1e9)


@functools.cache
def open_cache(folder: Path, limit_bytes: int | None) -> Cache:
    """The cache of a folder and limit; this process has one instance of each."""
    return Cache(folder, limit_bytes)


class Cache:
    """A folder of copies. Other files in it are not touched.

    Holds at most `limit_bytes` plus current downloads; None: as much as leaves KEEP_FREE_SHARE of the disk free. A
    process that has mapped a removed copy can still read it; the disk space is freed when it unmaps the copy.
    """

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._whole: set[tuple[str, int, int, int]] = set()
        self._unlisted_bytes: float = math.inf  # fetched since the folder was listed
        self._pin: BinaryIO | None = None

    def get(self, digest: str, download: Callable[[Path], object]) -> Path:
        """The copy whose xxh3_128 is `digest` (32 hex digits), created by `download(temporary_path)` if needed.

        Its content is verified at its first use in this process. It is kept at least until the next call in this
        process, so that there is time to open it.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
            Exception: any error of `download`, which must verify the checksum.
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
            pin = pin or self._open_whole(copy)  # downloaded by the other process, if it succeeded
        self._pin = pin
        with suppress(OSError):  # of another user, or read-only
            os.utime(copy, ns=(time.time_ns(), os.fstat(pin.fileno()).st_mtime_ns))
        return copy

    def _open_whole(self, copy: Path) -> BinaryIO | None:
        """The copy, with a shared lock that protects it from removal; None if it is missing or damaged."""
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
        """Download without fsync: after a crash, copies are verified before they are used."""
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
        """The finished copies. Files left by killed processes are removed."""
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
        """Keep other processes from downloading this copy. Yields whether it had to wait: the copy may exist then.

        After PATIENCE_SECONDS, or without locks, others may download it too.
        """
        path, end, waited = self.folder / f".{digest}.lock", time.monotonic() + PATIENCE_SECONDS, False
        while True:
            try:
                file = open(path, "a+b")  # noqa: SIM115 - closed below
            except OSError:  # the download reports the reason
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
    """Whether this process got the lock, until the file is closed; None if the filesystem has no locks."""
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
    """Release the lock, also in forked processes, which have the file open too."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def remove_oldest(copies: list[Copy], at_least_bytes: float) -> int:
    """Remove copies, least recently used first, except those that a process is about to open. Returns bytes."""
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
