"""A directions file: what is written is read, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_vae.applications.directions.fitting import Direction, Directions, load_directions, save_directions
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.errors import UserError
from ldm_vae.files import write_checksums
from tests.latents.conftest import autoencoder_directory as autoencoder_directory  # a fixture


@pytest.fixture
def folder(tmp_path: Path, autoencoder_directory: Path) -> Path:
    told = {"measure": "R2", "value": 0.5}
    directions = [
        Direction("brightness/difference", np.array([1.0, 0.5, -2.0]), "brightness", told),
        Direction("brightness/probe", np.array([1.0, 0.0, 0.0]), "brightness", told),
        Direction("pca/1", np.array([0.0, 0.0, 1.0]), None, told),
    ]
    fingerprint = load_autoencoder(autoencoder_directory).encoder_fingerprint()
    save_directions(Directions(directions, fingerprint, {"count": 20}, {"x": "is the same"}), tmp_path)
    return tmp_path


def change(folder: Path, **values: object) -> None:
    """A description that somebody wrote on purpose, sealed."""
    path = folder / "directions" / "directions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    write_checksums(path.parent)


def test_a_round_trip(folder: Path) -> None:
    found = load_directions(folder)
    assert [d.name for d in found.directions] == ["brightness/difference", "brightness/probe", "pca/1"]
    np.testing.assert_equal(found.directions[0].vector, [1.0, 0.5, -2.0])
    assert (found.images, found.left_out) == ({"count": 20}, {"x": "is the same"})
    assert load_directions(folder / "directions").directions[2].attribute is None


def test_a_direction_is_found_by_its_name_or_attribute(folder: Path) -> None:
    found = load_directions(folder)
    assert found.find("brightness").name == "brightness/difference"
    assert found.find("brightness/probe").name == "brightness/probe"
    assert found.find("pca").name == "pca/1"
    with pytest.raises(UserError, match="'brightnes/probe' is unknown; did you mean 'brightness/probe'"):
        found.find("brightnes/probe")
    with pytest.raises(UserError, match="there are: brightness/difference"):
        found.find("zzz")


def test_another_autoencoder_is_refused_and_another_decoder_is_not(folder: Path, autoencoder_directory: Path) -> None:
    autoencoder, found = load_autoencoder(autoencoder_directory), load_directions(folder)
    found.check_autoencoder(autoencoder, "autoencoder")
    with torch.no_grad():
        next(autoencoder.decoder.parameters()).add_(1)
    found.check_autoencoder(autoencoder, "autoencoder")
    with torch.no_grad():
        next(autoencoder.encoder.parameters()).add_(1)
    with pytest.raises(
        UserError, match=r"autoencoder: its encoder has the fingerprint .*, but the directions were fitted to"
    ):
        found.check_autoencoder(autoencoder, "autoencoder")


def test_damage_and_newer_formats_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_directions(tmp_path / "none")
    tensors = folder / "directions" / "directions.safetensors"
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-1] + b"x")
    with pytest.raises(UserError, match=r"directions\.safetensors is damaged"):
        load_directions(folder)
    tensors.write_bytes(data)
    change(folder, format_version=2)
    with pytest.raises(UserError, match="has format version 2, this program reads 1; update ldm_vae"):
        load_directions(folder)


@pytest.mark.parametrize(
    "values", [{"directions": []}, {"directions": [{"name": "a"}]}, {"images": 3}, {"left_out": None}]
)
def test_descriptions_that_do_not_fit_are_refused(folder: Path, values: dict[str, object]) -> None:
    change(folder, **values)
    with pytest.raises(UserError, match=r"cannot be read \(.*restore it from a copy, or fit again"):
        load_directions(folder)
