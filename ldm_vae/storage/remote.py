"""A folder at an fsspec URL such as `s3://bucket/folder`: its files, its lock, and the requests to the store.

A write to an object store is one request that succeeds or changes nothing. On other filesystems (sftp, smb, ...) the
file is written under a temporary name and renamed. An interrupted multipart upload (above 100 MB) stays invisible, but
is billed until a lifecycle rule of the bucket removes it.

`RemoteFolder` is what `open_folder` returns, `Lease` its lock, `Connection` makes the requests of both.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from ldm_vae.errors import DISK_FULL, UserError
from ldm_vae.redaction import check_no_password
from ldm_vae.storage.base import check_name, locked_by
from ldm_vae.storage.cache import cache_folder, cache_limit_bytes, open_cache

logger = logging.getLogger(__name__)

CHECKSUM = re.compile(r"^xxh3_128:([0-9a-f]{32})$")

PAUSES_SECONDS = (1.0, 4.0, 16.0)
"""Pauses between attempts. The packages also retry within each attempt: an outage of about a minute is survived."""
LONGEST_SECONDS = 90.0
"""No new attempt after this time: a data loader waits at most 300 s for a worker."""
BLOCK_BYTES = 16 << 20

UNREACHABLE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH)
TRANSIENT = (*UNREACHABLE, errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.EPIPE)
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "memory")
DENIED_OBJECT = ("AccessDenied", "AllAccessDisabled", "InvalidObjectState", "403")
PACKAGES = {"s3": 'pip install "ldm_vae[s3]"', "s3a": 'pip install "ldm_vae[s3]"'}

RENEW_SECONDS = 60.0
STALE_SECONDS = 300.0
SETTLE_SECONDS = 2.0
ATTEMPTS = 5
MAXIMUM_BYTES = 4096

T = TypeVar("T")


class RemoteFolder:
    """See `Folder`."""

    def __init__(self, location: str) -> None:
        self.location, self.connection = location, Connection(location)
        self._leases: list[Lease] = []

    def __str__(self) -> str:
        return self.location

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.location,)  # another process does not have the locks of this one

    def read(self, name: str, length: int | None = None) -> bytes:
        return self.connection.read(check_name(name), length)

    def write(self, name: str, data: bytes) -> None:
        for lease in self._leases:
            lease.check()
        path = self._path(name)
        try:
            if self.connection.is_object_store:
                self.connection.request(lambda filesystem: filesystem.pipe_file(path, data))
            else:
                self.connection.request(lambda filesystem: self._write_and_rename(filesystem, name, data))
        except FileNotFoundError as error:
            raise self.connection.no_folder(error) from error

    def exists(self, name: str) -> bool:
        path = self._path(name)
        try:
            return self.connection.request(lambda filesystem: filesystem.info(path)["type"]) == "file"
        except FileNotFoundError:
            return False

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {name: size for name, size in self._files() if name.startswith(prefix) and not name.startswith(".")}

    def remove(self, name: str) -> None:
        path = self._path(name)
        with suppress(FileNotFoundError):
            self.connection.request(lambda filesystem: filesystem.rm_file(path))

    def checksum(self, name: str) -> str:
        import xxhash

        digest = xxhash.xxh3_128()
        for block in self.connection.blocks(check_name(name)):
            digest.update(block)
        return f"xxh3_128:{digest.hexdigest()}"

    def local(self, name: str, checksum: str) -> Path:
        """A copy kept under its checksum (see `cache`), at least until the next call, or while it is mapped."""
        match = CHECKSUM.match(checksum)
        if not match:
            raise UserError(f"{self.location}/{name}: {checksum!r} is not a checksum; repair the manifest")
        cache = open_cache(cache_folder(), cache_limit_bytes())
        try:
            return cache.get(match[1], lambda temporary: self._download(name, checksum, temporary))
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            advice = "free some space, or set LDM_VAE_CACHE to another folder"
            reason = "no space left" if error.errno in DISK_FULL else error.strerror
            raise UserError(f"{cache.folder}: cannot keep a copy of {name} ({reason}); {advice}") from error

    def clean(self) -> None:
        for name, _ in self._files():
            if name.startswith(".tmp-"):
                self.remove(name)

    def free_bytes(self) -> int | None:
        return None

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Nothing is checked: that would cost a request for each write, and an object store cannot be unmounted."""
        yield

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """The lock is the object `name`, renewed while this process lives (see `Lease`).

        If it is lost, the next `write` of this object raises UserError.
        """
        lease = Lease(self.connection, check_name(name))
        with lease.lock():
            self._leases.append(lease)
            try:
                yield
            finally:
                self._leases.remove(lease)

    def holder(self, name: str) -> str | None:
        return Lease(self.connection, check_name(name)).holder()

    def _path(self, name: str) -> str:
        return self.connection.path(check_name(name))

    def _files(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of all files directly inside, including hidden ones."""
        root = self.connection.root
        try:
            entries = self.connection.request(lambda filesystem: filesystem.ls(root, detail=True))
        except FileNotFoundError:
            return
        for entry in entries:
            if entry["type"] != "file" or entry["name"].endswith("/"):  # some tools mark folders with empty objects
                continue
            if entry["name"].strip("/") == root.strip("/"):
                raise UserError(f"{self.location}: is a file; give a folder")
            yield entry["name"].rsplit("/", 1)[-1], entry["size"]

    def _write_and_rename(self, filesystem: Any, name: str, data: bytes) -> None:
        temporary = self.connection.path(f".tmp-{uuid.uuid4().hex[:8]}-{name}")
        filesystem.makedirs(self.connection.root, exist_ok=True)
        try:
            filesystem.pipe_file(temporary, data)
            filesystem.mv(temporary, self.connection.path(name))
        except Exception:
            if filesystem.exists(temporary):
                filesystem.rm_file(temporary)
            raise

    def _download(self, name: str, checksum: str, path: Path) -> None:
        import xxhash

        digest = xxhash.xxh3_128()
        with open(path, "wb") as file:
            for block in self.connection.blocks(check_name(name)):
                digest.update(block)
                file.write(block)
        if f"xxh3_128:{digest.hexdigest()}" != checksum:
            advice = "run `ldm-vae latents verify`, then `repair`"
            raise UserError(f"{self.location}/{name}: is damaged (xxh3_128:{digest.hexdigest()}); {advice}")


# The lock.


@dataclass(frozen=True)
class Claim:
    """The content of the lock object.

    Attributes:
        host, pid: the process that has the lock.
        machine: equal for two processes only if each can check whether the other is alive.
        token: new each time the lock is taken.
        renewed: time of the last renewal by the holder's clock; for human readers only.
        started: start time of the process in ticks of its machine; "" if unknown. Process numbers are reused.
    """

    host: str
    pid: int
    machine: str
    token: str
    renewed: str
    started: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"

    @property
    def is_dead(self) -> bool:
        """True if this machine can tell that the process has ended."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        now = _start_of(self.pid)
        return "" not in (now, self.started) and now != self.started


KINDS = {"host": str, "pid": int, "machine": str, "token": str, "renewed": str}
"""The fields of every claim."""
UNKNOWN = Claim("unknown", 0, "", "", "")


class Lease:
    """The exclusive lock of a remote folder: an object that its holder renews.

    It is created only if it does not exist, if the store supports that (S3, GCS, Azure), and read back. The lock of
    another process is respected unless that process ran on this machine and is dead, or its last renewal is
    STALE_SECONDS old by the clock of the store. The store's clock is read by writing a probe, so no two clocks are
    compared. If two processes take over a stale lock at once, reading it again after SETTLE_SECONDS shows which one
    has it. A holder that was suspended for too long notices at its next renewal or write. Files that it wrote in
    between do no harm if their content follows from their name, as with latent shards.

    Args:
        connection: the folder.
        name: name of the object and of the lock.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection, self.name, self.path = connection, name, connection.path(name)
        self.claim = Claim(socket.gethostname(), os.getpid(), _machine(), uuid.uuid4().hex, "", _start_of(os.getpid()))
        self.lost_to: str | None = None
        self._renewed_at = 0.0
        self._ended = threading.Event()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Take the lock, renew it in the background, release it. Raises: FolderLocked if another process holds it."""
        self._take()
        thread = threading.Thread(target=self._keep_renewing, name=f"renew {self.name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            if os.getpid() == self.claim.pid:  # not in a forked child
                self._ended.set()
                thread.join()
                self._give_back()

    def holder(self) -> str | None:
        """The current holder, or None."""
        found = self._read()
        try:
            return None if found is None or found.is_dead or self._is_stale() else str(found)
        except AccessDenied:  # no permission to write a probe
            return str(found)

    def check(self) -> None:
        """Call before each write. Raises: UserError if the lock is lost."""
        if os.getpid() != self.claim.pid:
            return
        if self.lost_to is None and time.time() - self._renewed_at > STALE_SECONDS:  # this process was stopped
            self._renew(retry=True)
        if self.lost_to is not None:
            raise UserError(
                f"{self.connection.location}: {self.lost_to} took over the lock {self.name}, because this process did "
                "not renew it in time; wait for the other one, then run the same command again"
            )

    def _take(self) -> None:
        for _ in range(ATTEMPTS):
            found = self._read()
            if found is None:
                self._create()
                found = self._read()
            if found is None:  # another process took and released it
                continue
            if found.token == self.claim.token:
                self._renewed_at = time.time()
                return
            if not (found.is_dead or self._is_stale()):
                raise locked_by(self.connection.location, str(found), self.name)
            logger.warning("%s: taking over the lock %s from %s", self.connection.location, self.name, found)
            self._remove(found)
            self._create()
            time.sleep(SETTLE_SECONDS)
        raise locked_by(self.connection.location, str(self._read() or UNKNOWN), self.name)

    def _create(self) -> None:
        """Write the object if it does not exist."""

        def create(filesystem: Any) -> None:
            if not self.connection.is_object_store:
                filesystem.makedirs(self.connection.root, exist_ok=True)
            filesystem.pipe_file(self.path, self._bytes(), mode="create")

        try:
            self.connection.request(create)
        except FileExistsError:  # by another process, or by this one if a response was lost
            pass
        except FileNotFoundError as error:
            raise self.connection.no_folder(error) from error

    def _read(self, *, retry: bool = True) -> Claim | None:
        """The current claim; `UNKNOWN` if it cannot be parsed."""
        try:
            data = self.connection.request(lambda filesystem: filesystem.cat_file(self.path), retry=retry)
        except FileNotFoundError:
            return None
        try:
            values = json.loads(data[:MAXIMUM_BYTES])
            known = {name: kind(values[name]) for name, kind in KINDS.items()}
            return Claim(**known, started=str(values.get("started", "")))
        except (ValueError, TypeError, KeyError):
            return UNKNOWN

    def _is_stale(self) -> bool:
        """Whether the lock is stale, by the store's times of the lock and of a probe written now."""
        probe = self.connection.path(f".{self.name}-{self.claim.token}")

        def age_seconds(filesystem: Any) -> float:
            filesystem.pipe_file(probe, b"?")
            try:
                return (filesystem.modified(probe) - filesystem.modified(self.path)).total_seconds()
            finally:
                filesystem.rm_file(probe)

        try:
            return self.connection.request(age_seconds) > STALE_SECONDS
        except FileNotFoundError:  # released meanwhile
            return True

    def _remove(self, claim: Claim, *, retry: bool = True) -> None:
        """Remove the object if it still holds this claim."""
        found = self._read(retry=retry)
        if found is not None and found.token == claim.token:
            with suppress(FileNotFoundError):
                self.connection.request(lambda filesystem: filesystem.rm_file(self.path), retry=retry)

    def _renew(self, *, retry: bool = False) -> None:
        found = self._read(retry=retry)
        if found is None or found.token != self.claim.token:
            self.lost_to = str(found) if found else "no process (its file is gone)"
            return
        self.connection.request(lambda filesystem: filesystem.pipe_file(self.path, self._bytes()), retry=retry)
        self._renewed_at = time.time()

    def _keep_renewing(self) -> None:
        while self.lost_to is None and not self._ended.wait(RENEW_SECONDS):
            try:
                self._renew()
            except UserError as error:  # the next renewal may succeed
                logger.warning("the lock %s was not renewed: %s", self.name, error)

    def _give_back(self) -> None:
        try:
            self._remove(self.claim, retry=False)
        except UserError as error:
            logger.warning("the lock %s was not removed and ends in %.0f s: %s", self.name, STALE_SECONDS, error)

    def _bytes(self) -> bytes:
        renewed = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return json.dumps(asdict(self.claim) | {"renewed": renewed}).encode()


def _machine() -> str:
    """An id of the kernel and process namespace: containers on one host may share its name, but not these."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _start_of(pid: int) -> str:
    """Start of a living process on this machine, in ticks since boot; "" if unknown."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]  # the name before it may contain spaces and parentheses
    except (OSError, IndexError):
        return ""


# Requests: opening the filesystem, retries, and the meaning of errors.


class AccessDenied(UserError):
    """Access to one file or folder is denied, although the credentials are valid."""


@dataclass(frozen=True)
class Connection:
    """Requests to an fsspec URL.

    The object holds no open connection: fsspec keeps one filesystem per process (and thread, if needed), so it can be
    pickled and used after a fork. Listings are never cached, so that readers see what other processes write.

    Raises:
        UserError: the protocol is unknown, its package is not installed, or the URL contains a password.
    """

    location: str

    def __post_init__(self) -> None:
        check_no_password(self.location, "address")
        self.request(lambda filesystem: None)

    @property
    def protocol(self) -> str:
        return self.location.split("://")[0]

    @property
    def is_object_store(self) -> bool:
        """True if a write is one request that succeeds or changes nothing, and folders need not be created."""
        return self.protocol in OBJECT_STORES

    @property
    def root(self) -> str:
        """The filesystem's path of this location."""
        return self._open()[1]

    def path(self, name: str) -> str:
        """The filesystem's path of a file below this location."""
        return f"{self.root}/{name}"

    def request(self, action: Callable[[Any], T], *, retry: bool = True) -> T:
        """Run `action(filesystem)`; with `retry`, again after pauses while the store cannot be reached.

        Raises:
            FileNotFoundError, FileExistsError: from the filesystem.
            OSError: with ENOSPC or EDQUOT.
            UserError: any other error; `AccessDenied` if it concerns only this file or folder.
        """
        start = time.monotonic()
        for pause in (*PAUSES_SECONDS, None) if retry else (None,):
            try:
                return action(self._open()[0])
            except (FileNotFoundError, FileExistsError, UserError) as error:
                if _code(error) == "NoSuchBucket":
                    raise self.no_folder(error) from error
                raise
            except PermissionError as error:
                advice = "use credentials with read and write access"
                kind = AccessDenied if _concerns_one_object(error) else UserError
                raise kind(f"{self.location}: access denied ({_reason(error)}); {advice}") from error
            except Exception as error:  # every package has its own classes
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise
                if pause is None or not _is_transient(error) or time.monotonic() - start > LONGEST_SECONDS:
                    advice = "check the network, the credentials and the endpoint (for S3: AWS_ENDPOINT_URL)"
                    raise UserError(f"{self.location}: {_reason(error)}; {advice}") from error
                logger.warning("%s: %s; trying again in %.0f s", self.location, _reason(error), pause)
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def read(self, name: str, length: int | None = None) -> bytes:
        """The first `length` bytes of a file in one request, or all. Raises: as `request`."""
        path = self.path(name)
        return self.request(lambda filesystem: _read_range(filesystem, path, 0, length))

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file's bytes in order, in requests of 16 MiB. Raises: as `request`."""
        path = self.path(name)
        size = self.request(lambda filesystem: filesystem.info(path)["size"])
        for start in range(0, size, BLOCK_BYTES):
            end = min(start + BLOCK_BYTES, size)
            yield self.request(lambda filesystem: _read_range(filesystem, path, start, end))  # noqa: B023

    def no_folder(self, error: Exception) -> UserError:
        """The error for a bucket or parent folder that does not exist."""
        return UserError(f"{self.location}: no such bucket or folder ({_reason(error)}); create it, or give another")

    def _open(self) -> tuple[Any, str]:
        """(filesystem, its path of this location)."""
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(self.location, use_listings_cache=False)
        except ImportError as error:
            cure = PACKAGES.get(self.protocol, f"install what fsspec needs for it ({error})")
            raise UserError(f"{self.location}: the package for {self.protocol}:// is missing; {cure}") from error
        except ValueError as error:
            advice = "give a path, or a URL such as s3://bucket/folder"
            raise UserError(f"{self.location}: {_reason(error)}; {advice}") from error
        return filesystem, path.rstrip("/")


def _read_range(filesystem: Any, path: str, start: int, end: int | None) -> bytes:
    try:
        return filesystem.cat_file(path, start=start, end=end)
    except OSError as error:
        if error.errno == errno.EINVAL and filesystem.info(path)["size"] == 0:
            return b""  # S3 refuses every range of an empty object
        raise


def _concerns_one_object(error: PermissionError) -> bool:
    """False for expired or invalid credentials, which s3fs also reports as PermissionError."""
    return _code(error) in (None, *DENIED_OBJECT)


def _code(error: Exception) -> str | None:
    """The error code of an S3 response."""
    return getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")


def _is_transient(error: Exception) -> bool:
    """Whether to try again. Unknown errors count: one attempt too many costs less than a failed job."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in TRANSIENT
    if isinstance(error, (ValueError, TypeError, NotImplementedError, IsADirectoryError, NotADirectoryError)):
        return False
    return not type(error).__name__.endswith(("CredentialsError", "ValidationError", "NotFound"))


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
