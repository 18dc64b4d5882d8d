"""Files that are complete or absent: write beside, fsync, rename, fsync the folder. Also the checksum used everywhere.

xxh3_128 finds accidents at memory speed; it is no protection against somebody who wants to deceive.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


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
    """Rename a finished folder into place; its files are fsynced first. An older one is moved aside, then removed.

    Files get the folder's permissions: safetensors makes files that only their owner can read.
    """
    permissions = temporary.stat().st_mode & 0o666
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            path.chmod(permissions)
            fsync_path(path)
    fsync_path(temporary)
    trash = final.with_name(f".trash-{uuid.uuid4().hex[:8]}-{final.name}")
    if final.exists():
        os.rename(final, trash)
    os.rename(temporary, final)
    fsync_path(final.parent)
    shutil.rmtree(trash, ignore_errors=True)


def temporary_directory(final: Path) -> Path:
    """A new empty folder beside `final` (same filesystem), to be filled and given to `publish_directory`."""
    folder = final.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{final.name}")
    folder.mkdir(parents=True)
    return folder


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
