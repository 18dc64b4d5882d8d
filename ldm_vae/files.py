"""Files that are complete or absent: write beside, fsync, rename, fsync the folder. Also the checksum used everywhere.

xxh3_128 finds accidents at memory speed; it is no protection against somebody who wants to deceive.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_vae.errors import UserError
from ldm_vae.privacy import redacted
from ldm_vae.storage import DISK_FULL


def fsync_path(path: Path) -> None:
    """Force a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary_path)` make a file, then publish it as `path`. A crash leaves the old file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        write(temporary)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_png(path: Path, picture: Any) -> None:
    """Publish a PIL image atomically, whatever the file is called."""
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def write_text(path: Path, text: str) -> None:
    """Publish a text atomically, without what is not written down: see `privacy`."""
    write_bytes(path, redacted(text).encode())


def canonical_json(value: Any) -> str:
    """Compact JSON with sorted keys: equal values give equal bytes. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def readable_json(value: Any) -> str:
    """Indented, with a final newline. NaN and infinity are refused."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, published atomically."""
    write_text(path, readable_json(value))


def publish_directory(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place; all in it is fsynced first. An older one is moved aside, then removed.

    Files get the folder's permissions: safetensors makes files that only their owner can read.
    """
    permissions = temporary.stat().st_mode & 0o666
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            path.chmod(permissions)
        fsync_path(path)
    fsync_path(temporary)
    trash = _moved_aside(final) if final.exists() else None
    os.rename(temporary, final)
    fsync_path(final.parent)
    if trash is not None:
        shutil.rmtree(trash, ignore_errors=True)


def temporary_directory(final: Path) -> Path:
    """A new empty folder beside `final` (same filesystem), to be filled and given to `publish_directory`."""
    folder = final.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{final.name}")
    folder.mkdir(parents=True)
    return folder


def remove_directory(path: Path) -> None:
    """Remove a folder so that no part of it is ever seen under its name: it is renamed first."""
    shutil.rmtree(_moved_aside(path), ignore_errors=True)


def _moved_aside(path: Path) -> Path:
    trash = path.with_name(f".trash-{uuid.uuid4().hex[:8]}-{path.name}")
    os.rename(path, trash)
    return trash


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what writers of `name` (a pattern) left in `folder` when they were killed. None may be at work there."""
    for path in [*folder.glob(f".tmp-*-{name}"), *folder.glob(f".trash-*-{name}")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def vanished() -> FileNotFoundError:
    """To be raised when a folder has gone with its mount: what is written would lie on the disk below it."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


@contextmanager
def system_errors_explained(where: str | Path, advice: str) -> Iterator[None]:
    """What the system refuses inside, a full disk for one, as one sentence that begins with `where`. Raises: UserError.

    Also what safetensors reports, which tells the number of the error in its text only.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number is None:
            raise
        reason = "no space left on the device" if number in DISK_FULL else os.strerror(number)
        raise UserError(f"{where}: cannot be written ({reason}); {advice}") from error


def checksum_bytes(data: bytes | memoryview) -> str:
    """`xxh3_128:HEX` of bytes in memory."""
    import xxhash

    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}"


def checksum(path: Path) -> str:
    """`xxh3_128:HEX` of a file's bytes."""
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return f"xxh3_128:{digest.hexdigest()}"
