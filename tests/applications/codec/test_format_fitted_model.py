"""The file of an entropy model comes back the same, or is refused in one sentence."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.applications.codec.format import load_model
from ldm_vae.errors import UserError
from tests.applications.codec.conftest import random_model

IDENTITY = "sha256:" + "a" * 64


@pytest.mark.parametrize("kind", ["static", "context"])
def test_a_model_comes_back(tmp_path, kind):
    model = random_model(IDENTITY, 2, kind)
    model.save(tmp_path / "model.safetensors")
    found = load_model(tmp_path / "model.safetensors")
    assert found.fingerprint == model.fingerprint
    assert (found.kind, found.autoencoder, found.ratios, found.scales) == (kind, IDENTITY, model.ratios, model.scales)
    assert all((found.weights[key] == weights).all() for key, weights in model.weights.items())


@pytest.mark.promise(6)
def test_damage_is_found(tmp_path, record_property):
    path = tmp_path / "model.safetensors"
    random_model(IDENTITY, 1, "static").save(path)
    whole, fingerprint = path.read_bytes(), load_model(path).fingerprint
    tried, named = 0, 0
    for bit in range(0, 8 * len(whole), 23):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            assert load_model(path).fingerprint == fingerprint  # a space in JSON, say
        except UserError as error:
            named += str(error).startswith(str(path))
        else:
            named += 1
        tried += 1
    assert named == tried
    for length in range(0, len(whole), 17):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            load_model(path)
    record_property("figure", f"an entropy model: each of {tried} flipped bits is found or changes nothing")


def test_what_is_no_model_is_refused(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(UserError, match="no such file; give a file that `ldm-vae codec fit` wrote"):
        load_model(tmp_path / "none")
    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"cannot be read \(.*fit it again"):
        load_model(tmp_path / "other.safetensors")
    newer = random_model(IDENTITY, 1, "static")
    newer.save(tmp_path / "newer.safetensors")
    text = (tmp_path / "newer.safetensors").read_bytes().replace(b'format_version\\":1', b'format_version\\":7')
    (tmp_path / "newer.safetensors").write_bytes(text)
    with pytest.raises(UserError, match="has format version 7, this program reads 1; update ldm_vae"):
        load_model(tmp_path / "newer.safetensors")
