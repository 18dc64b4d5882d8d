"""A folder behind an fsspec URL, as `s3://bucket/folder`.

A write to an object store is one request that succeeds or changes nothing. Other filesystems (sftp, smb ...) get the
file under a temporary name, which is then renamed. An interrupted upload of more than 100 MB in parts stays invisible,
but is paid for until a lifecycle rule of the bucket ends it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm_vae.errors import DISK_FULL, UserError
from ldm_vae.storage.base import check_name
from ldm_vae.storage.cache import cache_folder, cache_limit_bytes, open_cache
from ldm_vae.storage.connection import Connection
from ldm_vae.storage.lease import Lease

CHECKSUM = re.compile(r"^xxh3_128:([0-9a-f]{32})$")


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
        """A copy that is kept under its checksum; see `cache`. It stays until the next call, or once it is mapped."""
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
    def lock(self, name: str) -> Iterator[None]:
        """The lock is the object `name`, renewed while this process lives; see `lease`.

        Once it is lost, the next `write` of this object raises UserError.
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
        """(name, bytes) of all files directly inside, hidden ones too."""
        root = self.connection.root
        try:
            entries = self.connection.request(lambda filesystem: filesystem.ls(root, detail=True))
        except FileNotFoundError:
            return
        for entry in entries:
            if entry["type"] != "file" or entry["name"].endswith("/"):  # some tools mark folders by empty objects
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
