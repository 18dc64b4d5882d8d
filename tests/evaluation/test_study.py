"""The folder of a measurement: what cannot be written is noticed before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm_vae import cli
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.paths import check_writable
from tests.disks import Disk
from tests.disks import disk as disk  # a fixture
from tests.latents.conftest import autoencoder_directory as autoencoder_directory  # a fixture


def test_an_output_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "some" / "where")
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"where: cannot be written \(Not a directory\); give another output folder"):
        check_writable(tmp_path / "file" / "some" / "where")


def test_a_read_only_output_is_refused(disk: Disk) -> None:
    disk.make_read_only()
    for folder in (disk.path, disk.path / "health"):
        with pytest.raises(UserError, match=rf"{folder.name}: cannot be written \(Read-only file system\)"):
            check_writable(folder)


@pytest.mark.parametrize("command", ["diagnose", "evaluate"])
def test_it_is_noticed_before_the_images_are_looked_for(
    command: str, autoencoder_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    words = [f"autoencoder={autoencoder_directory}", "data.source=folder", f"data.path={tmp_path}", "device=cpu"]
    assert cli.main([command, *words, f"output={tmp_path / 'file' / 'health'}"]) == EXIT_USER_ERROR
    assert "health: cannot be written (Not a directory); give another output folder" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "record"), [("diagnose", "health.json"), ("evaluate", "results.json")])
def test_a_damaged_record_is_named(
    command: str, record: str, autoencoder_directory: Path, image_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    words = [command, f"autoencoder={autoencoder_directory}", f"data={image_folder}", "resolution=64", "part=all"]
    words += ["device=cpu", f"output={tmp_path / 'out'}"]
    assert cli.main(words) == 0
    path = tmp_path / "out" / record
    whole = path.read_bytes()
    flipped = whole[:50] + bytes([whole[50] ^ 0x80]) + whole[51:]
    for damaged in (b"", whole[:-20], flipped, b"[]", b"{}", b"[" * 100_000):
        path.write_bytes(damaged)
        capsys.readouterr()
        assert cli.main(words) == EXIT_USER_ERROR
        assert f"{record}: " in capsys.readouterr().err
    path.write_bytes(whole)
    assert cli.main(words) == 0
