"""A folder that is not a set is named, with the sets inside it."""

from __future__ import annotations

import pytest

from ldm_vae import cli
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents.format import open_set_folder, refuse_inside


@pytest.fixture(scope="module")
def sizes(encode, tmp_path_factory):
    path = tmp_path_factory.mktemp("sizes") / "sets"
    encode(path, "resolution=32,32x48")
    return path


@pytest.mark.parametrize("tool", ["info", "verify", "stats", "decode", "export"])
def test_of_several_sizes_one_is_to_be_given(sizes, tool, autoencoder_directory, tmp_path, capsys):
    more = {
        "decode": ["--autoencoder", str(autoencoder_directory), "--output", str(tmp_path / "sheet.png")],
        "export": [str(tmp_path / "out"), "--to", "parquet"],
    }
    assert cli.main(["latents", tool, str(sizes), *more.get(tool, [])]) == EXIT_USER_ERROR
    assert f"is not a set, but holds 32, 32x48; give one of them, as {sizes}/32" in capsys.readouterr().err
    open_set_folder(sizes / "32")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nothing: no such folder"):
        open_set_folder(tmp_path / "nothing")


def test_nothing_is_written_into_a_set(latents, tmp_path):
    refuse_inside(tmp_path / "sheet.png", "--output")
    with pytest.raises(UserError, match=r"--output: .* holds latents; give a path outside of it"):
        refuse_inside(latents / "sheet.png", "--output")
