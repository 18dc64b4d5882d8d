"""Small disks for the tests, which can be full, read-only or gone. Tests that use them are skipped where nothing may be
mounted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Disk:
    """A filesystem in memory at `path`, of 1 MiB in pages of 4 KiB."""

    def __init__(self, path: Path) -> None:
        self.path, self._kept = path, path.with_name("kept")
        for folder in (path, self._kept):
            folder.mkdir()
        self._is_there = False
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", self._kept], capture_output=True
        ).returncode:
            pytest.skip("may not mount a filesystem here")
        self.bring_back()

    def resize(self, size: str) -> None:
        self._mount("-o", f"remount,size={size}", self._kept)

    def make_read_only(self) -> None:
        self._mount("-o", "remount,ro,bind", self.path)

    def make_writable(self) -> None:
        self._mount("-o", "remount,rw,bind", self.path)

    def vanish(self) -> None:
        """As a network disk does, or one that is pulled out: the empty folder below it is seen."""
        subprocess.run(["umount", "-l", self.path], check=True)
        self._is_there = False

    def bring_back(self) -> None:
        self._mount("--bind", self._kept, self.path)
        self._is_there = True

    def remove(self) -> None:
        if self._is_there:
            self.vanish()
        subprocess.run(["umount", "-l", self._kept], check=True)

    def _mount(self, *words: str | Path) -> None:
        subprocess.run(["mount", *words], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    made.remove()
