"""A real full disk: a small filesystem in memory. Skipped where nothing may be mounted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_vae.errors import UserError
from tests.latents.test_encode import contents


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a filesystem here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


@pytest.mark.parametrize("size", ["8k", "16k", "32k", "48k", "60k", "64k"])
def test_a_full_disk_is_named_and_the_same_command_completes_the_set(encode, latents, disk, size):
    """The 17 files of this set need a page of 4 KiB each: the space ends at the plan, at a shard, at the index."""
    resize(disk, size)
    with pytest.raises(UserError, match=r"no space left on the device; finished shards are intact"):
        encode(disk / "set")
    assert not list((disk / "set").glob(".tmp-*"))
    assert not (disk / "set" / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (disk / "set").glob("shard-*.jsonl")}
    resize(disk, "1m")
    assert encode(disk / "set") == 0
    assert contents(disk / "set") == contents(latents)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


def test_too_little_space_is_said_before_the_first_shard(encode, disk, capsys):
    with pytest.raises(UserError, match="no space left"):
        encode(disk / "set", "resolution=512", "dtype=float32")
    assert "the set still needs 0.00236 GB and 0.00" in capsys.readouterr().out
