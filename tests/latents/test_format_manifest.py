from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from ldm_vae.config import to_dict
from ldm_vae.errors import UserError
from ldm_vae.latents.format import MANIFEST, check_same, read_manifest, read_origin, write_manifest
from ldm_vae.storage import open_folder


@pytest.fixture
def copy(latents: Path, tmp_path: Path) -> Path:
    shutil.copytree(latents, tmp_path / "set")
    return tmp_path / "set"


def edit(directory: Path, **changes) -> None:
    path = directory / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_is_exact(latents, tmp_path):
    manifest = read_manifest(latents)
    for part in manifest.index:
        shutil.copy(latents / part.file, tmp_path)
    write_manifest(open_folder(tmp_path), manifest)
    assert read_manifest(tmp_path) == manifest
    assert (tmp_path / MANIFEST).read_bytes() == (latents / MANIFEST).read_bytes()


def test_manifest_says_where_the_latents_come_from(latents):
    manifest = read_manifest(latents)
    assert manifest.autoencoder["class"] == "AutoencoderWavelet"
    assert manifest.autoencoder["fingerprint"].startswith("sha256:")
    assert manifest.preprocessing["height"] == 32
    assert manifest.label_names == ("a", "b")
    assert manifest.datasets[0]["count"] == manifest.count == 24
    assert manifest.datasets[0]["plan"] == read_origin(open_folder(latents)).digest
    assert manifest.latent_shape == (3, 4, 4)
    records = [manifest.shard_index[number] for number in (0, 1)]
    assert [(record.first_index, record.last_index) for record in records] == [(0, 3), (4, 7)]


@pytest.mark.parametrize(("version", "advice"), [(3, "update ldm_vae"), (1, "use the release that wrote it")])
def test_another_format_is_refused_with_advice(copy, version, advice):
    edit(copy, format_version=version)
    with pytest.raises(UserError, match=rf"format version {version}, this program reads 2; {advice}"):
        read_manifest(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_names": ["b", "a"]}, "damaged or edited"),
        ({"dtype": "float32"}, "damaged or edited"),
        ({"rejected": 1}, "damaged or edited"),
        ({"shards": 5}, "damaged or edited"),
        ({"index": []}, "damaged or edited"),
        ({"surprise": True}, "damaged"),
        ({"latent_shape": None}, "damaged"),
    ],
)
def test_any_change_is_found(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(UserError, match=message):
        read_manifest(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"format_version": "1"}'])
def test_garbage_is_refused(copy, content):
    (copy / MANIFEST).write_text(content)
    with pytest.raises(UserError):
        read_manifest(copy)


def test_damaged_statistics_are_found(copy):
    statistics = json.loads((copy / MANIFEST).read_text())["statistics"]
    edit(copy, statistics=statistics | {"std": [0.125, *statistics["std"][1:]]})
    with pytest.raises(UserError, match="damaged or edited, its digest does not fit its content; `ldm-vae latents rep"):
        read_manifest(copy)


def test_index_names_cannot_leave_the_folder(copy):
    manifest = read_manifest(copy)
    stolen = dataclasses.replace(manifest.index[0], file="../" + manifest.index[0].file)
    write_manifest(open_folder(copy), dataclasses.replace(manifest, index=(stolen,)))
    with pytest.raises(UserError, match="not the name of an index file"):
        read_manifest(copy).shard_index  # noqa: B018


def test_a_manifest_that_does_not_fit_its_index_is_refused(copy):
    manifest = read_manifest(copy)
    write_manifest(open_folder(copy), dataclasses.replace(manifest, count=23))
    with pytest.raises(UserError, match=r"count is 23 in manifest.json and 24 in the index"):
        read_manifest(copy).shard_index  # noqa: B018


def test_unfinished_and_foreign_folders_are_told_apart(copy, tmp_path):
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        read_manifest(tmp_path)
    (copy / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"manifest.json is missing; `ldm-vae latents repair` rebuilds it"):
        read_manifest(copy)
    next(copy.glob("index-*")).unlink()
    with pytest.raises(UserError, match="not finished; run the same"):
        read_manifest(copy)


def test_another_autoencoder_is_refused(latents):
    manifest = read_manifest(latents)
    manifest.check_autoencoder(manifest.autoencoder["encoder_fingerprint"], "unet")
    with pytest.raises(UserError, match=r"unet: its encoder has the fingerprint sha256:0{12}\.\.\., .*made by sha256:"):
        manifest.check_autoencoder("sha256:" + "0" * 64, "unet")


def test_a_differing_origin_names_field_and_both_values(latents):
    found = to_dict(read_origin(open_folder(latents)))
    check_same(found, found, "set", "advice")
    polished = found | {"autoencoder": found["autoencoder"] | {"fingerprint": "sha256:" + "0" * 64}}
    check_same(polished, found, "set", "advice")  # only the decoder differs
    expected = found | {"dtype": "float32", "preprocessing": found["preprocessing"] | {"height": 64}}
    with pytest.raises(UserError) as caught:
        check_same(expected, found, "set", "give another output")
    assert "dtype=float16 instead of float32" in str(caught.value)
    assert "images of 32 pixels in height instead of 64" in str(caught.value)
    assert str(caught.value).endswith("give another output")
