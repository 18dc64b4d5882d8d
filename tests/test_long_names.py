"""Pictures whose names are as long as file systems allow: every command that names its results after them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_vae import cli
from ldm_vae.data.folder import find_pictures
from ldm_vae.utils.text import short_name
from tests.data.encoded import encode, picture
from tests.latents.conftest import autoencoder_directory as autoencoder_directory  # a fixture

NAMES = ["a" * 250, "a" * 249 + "b", "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 83]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, two of which begin alike."""
    (tmp_path / "in").mkdir()
    for name in NAMES:
        (tmp_path / "in" / f"{name}.png").write_bytes(encode(picture(64, 64), "PNG"))
    return tmp_path / "in"


def test_their_names_are_cut_and_differ(folder: Path) -> None:
    names = [name for name, _ in find_pictures(folder)]
    assert sorted(names) == sorted(map(short_name, NAMES))
    assert len(set(names)) == 3
    assert all(len(name.encode()) <= 200 for name in names)


def test_names_that_fit_stay() -> None:
    assert short_name("\N{CJK UNIFIED IDEOGRAPH-6F22}" * 66) == "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 66


@pytest.mark.parametrize(("command", "count"), [("reconstruct", 6), ("compress", 3), ("interpolate", 4)])
def test_commands_name_their_results(
    command: str, count: int, folder: Path, autoencoder_directory: Path, tmp_path: Path
) -> None:
    words = [str(path) for path in sorted(folder.iterdir())]
    if command == "interpolate":
        words = [*words[:2], "resolution=64", "frames=3"]
    where = [str(autoencoder_directory)] if command == "reconstruct" else [f"autoencoder={autoencoder_directory}"]
    assert cli.main([command, *where, *words, f"output={tmp_path / 'out'}"]) == 0
    assert len([path for path in (tmp_path / "out").rglob("*") if path.suffix in (".png", ".ldmz")]) >= count


def test_compressed_files_come_back(folder: Path, autoencoder_directory: Path, tmp_path: Path) -> None:
    autoencoder = f"autoencoder={autoencoder_directory}"
    assert cli.main(["compress", str(folder), autoencoder, f"output={tmp_path / 'small'}"]) == 0
    files = [str(path) for path in (tmp_path / "small").iterdir()]
    assert len(files) == 3
    assert cli.main(["decompress", *files, autoencoder, f"output={tmp_path / 'back'}"]) == 0
    assert {path.stem for path in (tmp_path / "back").iterdir()} == set(map(short_name, NAMES))
