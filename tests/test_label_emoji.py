"""Labels of emoji from their Unicode names, and which images are left out."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "tools" / "label_emoji.py"


@pytest.fixture
def script():
    specification = importlib.util.spec_from_file_location("label_emoji", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("GRINNING FACE", "face"),
        ("SMILING CAT FACE WITH OPEN MOUTH", "animal"),
        ("FACE WITH OK GESTURE", "person"),
        ("WOMAN + MICROSCOPE", "person"),
        ("CLOCK FACE FIVE-THIRTY", "clock"),
        ("DRAGON FACE", "animal"),
        ("MAHJONG TILE RED DRAGON", "object"),  # whole names only, where a word alone means something else
        ("HOT DOG", "food"),
        ("DOG + SAFETY VEST", "animal"),
        ("CRICKET BAT AND BALL", "object"),
        ("WAVING HAND SIGN", "hand"),
        ("BLUE HEART", "heart"),
        ("LOWER LEFT FOUNTAIN PEN", "object"),
        ("UNICODE MAY ADD THIS LATER", "object"),
    ],
)
def test_a_label_follows_from_the_name(script, name, label):
    assert script.label(name) == label


def test_a_folder_becomes_a_labelled_data_set_without_near_copies(script, tmp_path, monkeypatch, capsys):
    source, output = tmp_path / "font", tmp_path / "set"
    source.mkdir()
    for name in ("u1f600", "u1f9d1", "u1f9d1_200d_1f52c", "u1f9d6_200d_2640", "u1f44b_1f3fd", "u0023_20e3"):
        Image.new("RGB", (8, 8), "white").save(source / f"emoji_{name}.png")
    (source / "LICENSE").write_text("")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(source), str(output)])
    assert script.main() == 0
    with (output / "labels.csv").open() as file:
        rows = {row["file"]: row["label"] for row in csv.DictReader(file)}
    assert rows == {
        "emoji_u0023_20e3.png": "sign",
        "emoji_u1f600.png": "face",
        "emoji_u1f9d1.png": "person",
        "emoji_u1f9d1_200d_1f52c.png": "person",
    }
    assert {path.name for path in output.iterdir()} == {*rows, "labels.csv"}
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(source), str(tmp_path / "few"), "--only", "face"])
    assert script.main() == 0
    assert sorted(path.name for path in (tmp_path / "few").iterdir()) == ["emoji_u1f600.png", "labels.csv"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(source), str(tmp_path / "none"), "--only", "fase"])
    assert script.main() == 2
    assert "no label fase" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(source), str(output)])
    assert script.main() == 2  # the folder exists
    assert "exists" in capsys.readouterr().err
