from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from ldm_vae.config import to_dict
from ldm_vae.errors import UserError
from ldm_vae.latents.manifest import MANIFEST, check_same_origin, read_manifest, write_manifest


@pytest.fixture
def copy(latents: Path, tmp_path: Path) -> Path:
    shutil.copytree(latents, tmp_path / "set")
    return tmp_path / "set"


def edit(directory: Path, **changes) -> None:
    path = directory / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_is_exact(latents, tmp_path):
    manifest = read_manifest(latents)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert (tmp_path / MANIFEST).read_bytes() == (latents / MANIFEST).read_bytes()


def test_manifest_says_where_the_latents_come_from(latents):
    manifest = read_manifest(latents)
    assert manifest.autoencoder["class"] == "AutoencoderWavelet"
    assert manifest.autoencoder["fingerprint"].startswith("sha256:")
    assert manifest.preprocessing["height"] == 32
    assert manifest.dataset["label_names"] == ["a", "b"]
    assert manifest.dataset["count"] == manifest.count == 24
    assert manifest.latent_shape == (3, 4, 4)
    assert [(shard.first_index, shard.last_index) for shard in manifest.shards][:2] == [(0, 3), (4, 7)]


def test_a_newer_format_is_refused_with_advice(copy):
    edit(copy, format_version=2)
    with pytest.raises(UserError, match=r"format version 2.*update ldm_vae"):
        read_manifest(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"statistics": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "count": 24}},
        {"rejected": 1},
        {"shards": []},
        {"surprise": True},
        {"latent_shape": None},
    ],
)
def test_any_change_is_found(copy, changes):
    edit(copy, **changes)
    with pytest.raises(UserError, match="damaged"):
        read_manifest(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"format_version": "1"}'])
def test_garbage_is_refused(copy, content):
    (copy / MANIFEST).write_text(content)
    with pytest.raises(UserError):
        read_manifest(copy)


def test_shard_names_cannot_leave_the_folder(copy):
    manifest = read_manifest(copy)
    stolen = dataclasses.replace(manifest.shards[0], file="../shard-000000.safetensors")
    write_manifest(copy, dataclasses.replace(manifest, shards=(stolen,)))
    with pytest.raises(UserError, match="no name of a shard"):
        read_manifest(copy)


def test_unfinished_and_foreign_folders_are_told_apart(copy, tmp_path):
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        read_manifest(tmp_path)
    (copy / MANIFEST).unlink()
    with pytest.raises(UserError, match="not finished; run the same"):
        read_manifest(copy)


def test_another_autoencoder_is_refused(latents):
    manifest = read_manifest(latents)
    manifest.check_autoencoder(manifest.autoencoder["encoder_fingerprint"], "unet")
    with pytest.raises(UserError, match=r"unet: its encoder_fingerprint is sha256:0{12}\.\.\., .*made by sha256:"):
        manifest.check_autoencoder("sha256:" + "0" * 64, "unet")


def test_a_differing_origin_names_field_and_both_values(latents):
    found = to_dict(read_manifest(latents))
    check_same_origin(found, found, "set", "advice")
    expected = found | {"dtype": "float32", "preprocessing": found["preprocessing"] | {"height": 64}}
    with pytest.raises(UserError) as caught:
        check_same_origin(expected, found, "set", "give another output")
    assert "dtype is float16 there and float32 here" in str(caught.value)
    assert "preprocessing.height is 32 there and 64 here" in str(caught.value)
    assert str(caught.value).endswith("give another output")
