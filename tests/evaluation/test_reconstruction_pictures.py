from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae import cli
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.data import transforms
from ldm_vae.data.folder import find_pictures
from ldm_vae.errors import UserError
from ldm_vae.evaluation.reconstruction import reconstruct_pictures


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    build_autoencoder(AutoencoderConfig("sd", "tiny")).save_pretrained(path)
    return str(path)


def save_picture(path: Path, width: int, height: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def test_files_and_folders_keep_names_and_sizes(autoencoder: str, tmp_path: Path) -> None:
    single = save_picture(tmp_path / "one.png", 37, 21)
    save_picture(tmp_path / "folder" / "deep" / "two.png", 16, 40)
    out = tmp_path / "out"
    assert cli.main(["reconstruct", autoencoder, str(single), str(tmp_path / "folder"), "--out", str(out)]) == 0
    assert Image.open(out / "one.png").size == (37, 21)
    assert Image.open(out / "deep" / "two.png").size == (16, 40)
    beside = np.asarray(Image.open(out / "one_beside.png"))
    np.testing.assert_array_equal(beside[:, :37], np.asarray(Image.open(single)))
    np.testing.assert_array_equal(beside[:, 45:], np.asarray(Image.open(out / "one.png")))
    record = json.loads((out / "run.json").read_text())
    assert record["images"] == 2
    assert record["finished"] is True


def test_the_picture_is_the_autoencoder_s_reconstruction(autoencoder: str, tmp_path: Path) -> None:
    path = save_picture(tmp_path / "one.png", 24, 16)
    reconstruct_pictures(autoencoder, [str(path)], str(tmp_path / "out"), device="cpu")
    image = transforms.from_uint8(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None])
    expected = transforms.to_pil(load_autoencoder(autoencoder).reconstruct(image))[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "one.png")), np.asarray(expected))


def test_a_sample_follows_the_seed(autoencoder: str, tmp_path: Path) -> None:
    path = save_picture(tmp_path / "one.png", 16, 16)
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        reconstruct_pictures(autoencoder, [str(path)], str(tmp_path / name), sample=True, seed=seed)
        made.append(np.asarray(Image.open(tmp_path / name / "one.png")))
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != made[2]).any()


def test_size_crops_the_center(autoencoder: str, tmp_path: Path) -> None:
    path = save_picture(tmp_path / "one.png", 50, 40)
    reconstruct_pictures(autoencoder, [str(path)], str(tmp_path / "out"), size=24)
    assert Image.open(tmp_path / "out" / "one.png").size == (24, 24)


def test_broken_pictures_are_named_and_left_out(
    autoencoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = save_picture(tmp_path / "good.png", 16, 16)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no")
    assert cli.main(["reconstruct", autoencoder, str(good), str(bad), "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "bad.png: left out" in output
    assert "1 reconstruction, 1 left out" in output
    with pytest.raises(UserError, match="no image could be decoded"):
        reconstruct_pictures(autoencoder, [str(bad)], str(tmp_path / "other"))


def test_equal_names_do_not_replace_each_other(tmp_path: Path) -> None:
    files = [
        save_picture(tmp_path / name, 8, 8)
        for name in ("x/a.png", "y/a.png", "z/a.webp", "x/a_beside.png", "x/b_beside.png", "x/b.png")
    ]
    names = [name for name, _ in find_pictures([str(file) for file in files])]
    outputs = [*names, *(f"{name}_beside" for name in names)]
    assert names[0] == "a"
    assert len(set(outputs)) == len(outputs)


def test_a_name_that_is_no_utf_8_leads_to_its_file(tmp_path: Path) -> None:
    path = save_picture(tmp_path / os.fsdecode(b"a\xff.png"), 16, 16)
    for given in (tmp_path, path):
        assert find_pictures([str(given)]) == [("a\\xff", path)]


def test_missing_input_and_a_full_output_folder_are_refused(autoencoder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        find_pictures([str(tmp_path / "nothing.png")])
    path = save_picture(tmp_path / "one.png", 16, 16)
    with pytest.raises(UserError, match="is not empty"):
        reconstruct_pictures(autoencoder, [str(path)], str(tmp_path))
    reconstruct_pictures(autoencoder, [str(path)], str(tmp_path / "out"))
    reconstruct_pictures(autoencoder, [str(path)], str(tmp_path / "out"), overwrite=True)
