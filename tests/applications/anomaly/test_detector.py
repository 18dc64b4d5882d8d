"""The detector's folder: equal after reading, refused when damaged, newer, of other networks or no detector at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_vae.applications.anomaly.detector import DESCRIPTION, TENSORS, check_detector_folder, load_detector
from ldm_vae.errors import UserError
from ldm_vae.files import MANIFEST, write_checksums


@pytest.fixture
def copy(detector_folder: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    shutil.copytree(detector_folder, tmp_path / "detector")
    return tmp_path / "detector"


def test_a_detector_is_small_and_reads_back(detector_folder):
    detector = load_detector(detector_folder)
    assert len(detector.normal) == 18
    assert detector.statistics.positions.mean.shape == (4,)
    assert detector.statistics.pooled.mean.shape == (8,)
    count = detector.description["counts"]["held_out"]
    assert all(values.shape == (count,) for values in detector.normal.values())
    assert len(detector.seen) == count + detector.description["counts"]["learnt_from"] == 40
    recorded = {name: score["threshold"] for name, score in detector.description["scores"].items()}
    assert recorded == pytest.approx(detector.thresholds())
    assert sum(path.stat().st_size for path in detector_folder.iterdir()) < 40_000


@pytest.mark.parametrize("name", [DESCRIPTION, TENSORS, MANIFEST, "run.json"])
def test_no_changed_byte_and_no_missing_end_goes_unseen(copy, name):
    data = (copy / name).read_bytes()
    for place in np.linspace(0, len(data) - 1, 12).astype(int):
        (copy / name).write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"restore it from a copy|update ldm_vae|restore the folder"):
            load_detector(copy)
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="restore it from a copy"):
        load_detector(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=r"restore it from a copy|holds no detector.json"):
        load_detector(copy)


def described(folder: Path, **changes: object) -> None:
    """Change the description and seal it again, as nobody does by accident."""
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(description | changes))
    (folder / MANIFEST).unlink()
    write_checksums(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "has format version 3, this program reads 2; update ldm_vae"),
        ({"format_version": 1}, "has format version 1, this program reads 2; make it again"),
        ({"format_version": 0}, "format version 0"),
        ({"scores": {"l1": {}, "fid": {}}}, "KeyError"),
        ({"by": "fid"}, "'fid' is not a score"),
        ({"decoder_variance": -1.0}, "decoder_variance is -1.0"),
        ({"false_positive_rate": 0.01}, "needs 99 held-out normal images"),
        ({"false_positive_rate": 7}, "false_positive_rate is 7"),
        ({"resolution": "large"}, "ValueError"),
        ({"scores": None}, "TypeError"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(copy, changes, message):
    described(copy, **changes)
    with pytest.raises(UserError, match=message):
        load_detector(copy)


def test_tensors_that_do_not_fit_are_refused(copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / TENSORS)
    for name, spoilt, message in (
        ("positions/precision", torch.eye(5), "parts of different sizes"),
        ("normal/l1", torch.full((16,), torch.nan), r"differ in number|not finite"),
        ("pooled/mean", torch.zeros(9), "parts of different sizes"),
        ("normal/kl", torch.zeros(3), "differ in number"),
    ):
        save_file(tensors | {name: spoilt}, copy / TENSORS)
        (copy / MANIFEST).unlink()
        write_checksums(copy)
        with pytest.raises(UserError, match=message):
            load_detector(copy)


def test_it_works_with_its_own_networks_only(detector_folder, saved, autoencoder_directory, random_backbone):
    detector, autoencoder = load_detector(detector_folder), str(saved / "autoencoder")
    backbone = str(random_backbone)
    assert detector.networks(autoencoder, "cpu", str(saved), backbone).score_names == list(detector.normal)
    with pytest.raises(UserError, match="pipeline: missing"):
        detector.networks(autoencoder, "cpu", None, backbone)
    with pytest.raises(UserError, match="of another autoencoder"):
        detector.networks(str(autoencoder_directory), "cpu", str(saved), backbone)
    detector.description["identity"]["autoencoder"] = "sha256:0"
    with pytest.raises(UserError, match=r"was fitted with another autoencoder than .* \(sha256:0, here sha256:"):
        detector.networks(autoencoder, "cpu", str(saved), backbone)


def test_what_has_no_effect_is_refused(detector_folder, saved, random_backbone):
    detector = load_detector(detector_folder)
    detector.description["identity"] |= {"flow_network": None, "perceptual_network": None}
    with pytest.raises(UserError, match="pipeline: has no effect"):
        detector.networks(str(saved / "autoencoder"), "cpu", str(saved), None)
    with pytest.raises(UserError, match="perceptual_weights: has no effect"):
        detector.networks(str(saved / "autoencoder"), "cpu", None, str(random_backbone))


def test_nothing_else_is_taken_for_a_detector_or_overwritten(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_detector(tmp_path / "none")
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="is a folder of images; give the folder that"):
        load_detector(tmp_path)
    for output in (tmp_path, tmp_path / "holiday.jpg"):
        with pytest.raises(UserError, match="holds something else"):
            check_detector_folder(output)
