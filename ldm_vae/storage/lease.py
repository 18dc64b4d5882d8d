"""The lock of a remote folder: an object that its holder renews, and that others may take once it is renewed no more.

It is created on the condition that it does not exist, where the store can do this (S3, GCS, Azure), and read back.
The lock of another process is refused, unless that process was on this machine and is dead, or its last renewal lies
STALE_SECONDS back by the clock of the store, which a probe is written for: no two clocks are compared. When two
processes take over the same stale lock at once, reading it again after SETTLE_SECONDS shows which of them has it. A
holder that was suspended for too long notices at its next renewal or write. What it wrote in between does no harm where
the contents of files follow from their names, as those of latent shards do.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from ldm_vae.errors import UserError
from ldm_vae.storage.base import locked_by
from ldm_vae.storage.connection import AccessDenied, Connection

logger = logging.getLogger(__name__)

RENEW_SECONDS = 60.0
STALE_SECONDS = 300.0
SETTLE_SECONDS = 2.0
ATTEMPTS = 5
MAXIMUM_BYTES = 4096


@dataclass(frozen=True)
class Claim:
    """The content of the object.

    Attributes:
        host, pid: the process that has the lock.
        machine: equal for two processes only if the one can see whether the other lives.
        token: another one for each time the lock is taken.
        renewed: when, by the clock of the holder; for readers.
        started: when the process began, by the machine's own count; "" where unknown. Numbers of processes come again.
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
        """True where this machine knows that the process has ended."""
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
"""What every claim has."""
UNKNOWN = Claim("unknown", 0, "", "", "")


class Lease:
    """One lock, taken once at most.

    Args:
        connection: the folder.
        name: of the object, and so of the lock.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection, self.name, self.path = connection, name, connection.path(name)
        self.claim = Claim(socket.gethostname(), os.getpid(), _machine(), uuid.uuid4().hex, "", _start_of(os.getpid()))
        self.lost_to: str | None = None
        self._renewed_at = 0.0
        self._ended = threading.Event()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Take the lock, renew it in the background, give it back. Raises: FolderLocked when another one has it."""
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
        """Who has it now."""
        found = self._read()
        try:
            return None if found is None or found.is_dead or self._is_stale() else str(found)
        except AccessDenied:  # no right to write a probe
            return str(found)

    def check(self) -> None:
        """Before each write. Raises: UserError when the lock is lost."""
        if os.getpid() != self.claim.pid:
            return
        if self.lost_to is None and time.time() - self._renewed_at > STALE_SECONDS:  # this process was stopped
            self._renew(retry=True)
        if self.lost_to is not None:
            raise UserError(
                f"{self.connection.location}: the lock {self.name} went to {self.lost_to}, as this process did not "
                "renew it in time; wait for the other one, then run the same command again"
            )

    def _take(self) -> None:
        for _ in range(ATTEMPTS):
            found = self._read()
            if found is None:
                self._create()
                found = self._read()
            if found is None:  # another one took it and gave it back
                continue
            if found.token == self.claim.token:
                self._renewed_at = time.time()
                return
            if not (found.is_dead or self._is_stale()):
                raise locked_by(self.connection.location, str(found), self.name)
            logger.warning("%s: taking the lock %s over from %s", self.connection.location, self.name, found)
            self._remove(found)
            self._create()
            time.sleep(SETTLE_SECONDS)
        raise locked_by(self.connection.location, str(self._read() or UNKNOWN), self.name)

    def _create(self) -> None:
        """Write the object if there is none."""

        def create(filesystem: Any) -> None:
            if not self.connection.is_object_store:
                filesystem.makedirs(self.connection.root, exist_ok=True)
            filesystem.pipe_file(self.path, self._bytes(), mode="create")

        try:
            self.connection.request(create)
        except FileExistsError:  # another's; or our own, where an answer was lost and the request repeated
            pass
        except FileNotFoundError as error:
            raise self.connection.no_folder(error) from error

    def _read(self, *, retry: bool = True) -> Claim | None:
        """The claim that is there; `UNKNOWN` where it cannot be understood."""
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
        """By the clock of the store: the times of the lock and of a probe written now."""
        probe = self.connection.path(f".{self.name}-{self.claim.token}")

        def age_seconds(filesystem: Any) -> float:
            filesystem.pipe_file(probe, b"?")
            try:
                return (filesystem.modified(probe) - filesystem.modified(self.path)).total_seconds()
            finally:
                filesystem.rm_file(probe)

        try:
            return self.connection.request(age_seconds) > STALE_SECONDS
        except FileNotFoundError:  # given back meanwhile
            return True

    def _remove(self, claim: Claim, *, retry: bool = True) -> None:
        """Remove the object if it still is this claim."""
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
    """The running kernel and its process numbers: containers of one host may share its name, but not these."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _start_of(pid: int) -> str:
    """When a living process of this machine began, in ticks since its boot; "" where that is not known."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]  # the name before it may hold spaces and brackets
    except (OSError, IndexError):
        return ""
