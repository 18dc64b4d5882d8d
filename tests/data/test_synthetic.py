"""The synthetic set: determinism, balance, known truth, equal scenes at every size, exact defect masks, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_vae import cli
from ldm_vae.data.synthetic import render
from ldm_vae.data.synthetic.render import DEFECTS, LABELS
from ldm_vae.data.synthetic.source import PAINTERS, SyntheticConfig, SyntheticSource, paint_scene


def source(**settings: float) -> SyntheticSource:
    return SyntheticSource(SyntheticConfig(**{"count": 40, "seed": 3, "resolution": 64} | settings))  # type: ignore[arg-type]


def test_images_depend_on_seed_and_index_only() -> None:
    some, more, other = source(count=12), source(count=40), source(seed=4)
    for i in (0, 7, 11):
        assert some.read(i).dtype == np.uint8
        assert some.read(i).shape == (64, 64, 3)
        assert np.array_equal(some.read(i), more.read(i))
        assert not np.array_equal(some.read(i), other.read(i))
    assert len({more.read(i).tobytes() for i in range(40)}) == 40


def test_labels_are_balanced_and_not_periodic() -> None:
    labels = [source().label(i) for i in range(40)]
    assert np.bincount(labels, minlength=len(LABELS)).tolist() == [4] * 10
    assert labels[:10] != labels[10:20]
    assert set(PAINTERS) == set(LABELS) == set(source().label_names)
    assert labels == [source().scene(i).label for i in range(40)]


def test_ids_are_stable_and_an_index_outside_is_refused() -> None:
    assert source().id(12) == source(seed=9, resolution=128).id(12) == "synthetic-000012"
    for i in (-1, 40):
        with pytest.raises(IndexError, match="give 0 to 39"):
            source().read(i)


def test_fingerprint_names_the_settings() -> None:
    variants = [source(), source(seed=4), source(resolution=32), source(count=41), source(defects=0.5)]
    assert len({s.fingerprint() for s in variants}) == len(variants)
    assert source().fingerprint() == source().fingerprint()


def test_a_scene_looks_the_same_at_every_resolution() -> None:
    """A picture of 256 averaged down to 64 is the one of 64, up to what happens at edges of one pixel's width."""
    large, small, others = source(resolution=256), source(), 0.0
    for i in range(20):
        means = large.read(i).reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(means - small.read(i)).mean() < 2.5
        others += np.abs(means - small.read((i + 1) % 20)).mean() / 20
        assert large.attributes(i) == small.attributes(i)
    assert others > 20


@pytest.mark.parametrize("pixels", [256, 10**9])
def test_bands_leave_no_trace(monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    expected = [source(resolution=200).read(i) for i in range(10)]
    monkeypatch.setattr(render, "BAND_PIXELS", pixels)
    for i, picture in enumerate(expected):
        assert np.array_equal(source(resolution=200).read(i), picture)


def test_attributes_tell_the_truth_about_the_pixels() -> None:
    s = source(count=200)
    centers, sizes = [], []
    for i in range(200):
        truth = s.attributes(i)
        assert all(isinstance(value, float) for value in truth.values())
        scene = s.scene(i)
        if LABELS[scene.label] != "ball":
            continue
        covered = paint_scene(scene, 64).coverage
        rows, columns = np.mgrid[:64, :64] / 64 + 0.5 / 64
        centers.append(
            [
                (covered * columns).sum() / covered.sum() - truth["x"],
                (covered * rows).sum() / covered.sum() - truth["y"],
            ]
        )
        sizes.append(np.sqrt(covered.mean() / np.pi) - truth["size"])
    assert len(sizes) == 20
    assert np.abs(centers).max() < 0.004
    assert np.abs(sizes).max() < 0.004


def test_light_and_hue_are_seen() -> None:
    """The lit side of a ball is the brighter one, and red balls are redder than blue ones."""
    s = source(count=400)
    for i in range(400):
        scene = s.scene(i)
        if LABELS[scene.label] == "ball" and scene.texture == 0:
            picture = s.read(i).astype(float)
            row, column, reach = int(scene.y * 64), int(scene.x * 64), int(0.6 * scene.size * 64)
            left, right = picture[row, column - reach].sum(), picture[row, column + reach].sum()
            assert (right > left) == (scene.light > 0)
            red, _, blue = picture[row, column]
            if abs(scene.hue - 0.08) < 0.08:
                assert red > blue + 40
            if abs(scene.hue - 0.7) < 0.08:
                assert blue > red + 40


def test_every_object_stays_in_the_picture_and_stands_out() -> None:
    s = source(count=200)
    for i in range(200):
        coverage = paint_scene(s.scene(i), 64).coverage
        border = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
        assert border.max() == 0.0
        assert 0.09 < coverage.mean() < 0.5, LABELS[s.label(i)]


def test_defect_masks_are_exact() -> None:
    """Outside the mask nothing has changed, inside nearly everything has; all four kinds occur."""
    faulty, clean = source(defects=1.0, resolution=128), source(resolution=128)
    kinds = set()
    for i in range(40):
        image, mask = faulty.render(i)
        changed = (image != clean.read(i)).any(-1)
        assert mask.dtype == bool
        assert not (changed & ~mask).any()
        assert changed.sum() > 0.85 * mask.sum()
        assert 15 <= mask.sum() < 0.08 * mask.size
        assert np.array_equal(mask, faulty.defect_mask(i))
        kinds.add(DEFECTS[int(faulty.attributes(i)["defect"])])
    assert kinds == set(DEFECTS[1:])


def test_a_defect_lies_in_the_same_place_at_every_resolution() -> None:
    small, large = source(defects=1.0, resolution=64), source(defects=1.0, resolution=256)
    for i in range(0, 40, 5):
        places = [np.argwhere(s.defect_mask(i)).mean(0) / s.config.resolution for s in (small, large)]
        assert np.abs(places[0] - places[1]).max() < 0.015


def test_the_fraction_of_defects_is_kept_and_a_clean_image_has_an_empty_mask() -> None:
    s = source(count=400, defects=0.25)
    faulty = [bool(s.scene(i).defect) for i in range(400)]
    assert 70 < sum(faulty) < 130
    assert not s.defect_mask(faulty.index(False)).any()
    more = source(count=400, defects=0.5)
    assert all(more.scene(i).defect == s.scene(i).defect for i in range(400) if faulty[i])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "synthetic.count: 0 images; give 1 or more"),
        ({"seed": -1}, "synthetic.seed: -1 is negative"),
        ({"resolution": 8}, "synthetic.resolution: 8 pixels; give 32 to 4096"),
        ({"defects": 1.5}, "synthetic.defects: 1.5 is not a fraction"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(**settings)


def test_the_command_writes_what_the_source_renders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "toys"
    arguments = ["synth", str(out), "--count", "12", "--resolution", "48", "--seed", "3", "--defects", "0.5"]
    assert cli.main([*arguments, "--workers", "2"]) == 0
    s = source(count=12, resolution=48, defects=0.5)
    rows = [json.loads(line) for line in (out / "attributes.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [s.id(i) for i in range(12)]
    for i, row in enumerate(rows):
        assert row["label"] == s.label_names[s.label(i)] == Path(row["file"]).parent.name
        assert {name: row[name] for name in s.attributes(i)} == s.attributes(i)
        assert np.array_equal(np.asarray(Image.open(out / row["file"])), s.read(i))
        mask = tmp_path / "toys-masks" / row["file"]
        assert mask.exists() == bool(row["defect"])
        if mask.exists():
            assert np.array_equal(np.asarray(Image.open(mask)), s.defect_mask(i))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toys", "toys-masks"]

    capsys.readouterr()
    assert cli.main(arguments) == 2
    assert "toys: exists and is not empty; give a new folder" in capsys.readouterr().err


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["synth", str(tmp_path / "a"), "--resolution", "7"]) == 2
    assert cli.main(["synth", str(tmp_path / "a"), "--workers", "0"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "ldm-vae synth: resolution: 7 pixels; give 32 to 4096",
        "ldm-vae synth: workers: 0 is not positive",
    ]
    assert not any(tmp_path.iterdir())
