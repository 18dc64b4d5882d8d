"""Compressed pictures that an earlier release wrote must give the same levels, number by number, on every machine."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest

from ldm_vae.applications.codec import compression, format
from ldm_vae.applications.codec.compression import Codec
from ldm_vae.errors import UserError
from ldm_vae.files import checksum_bytes
from tests.test_golden import GOLDEN, unpacked

FOLDER = GOLDEN / "codec-1"
MOST_BYTES = 50_000
LEVELS = {
    "self-fitted": "xxh3_128:be2f1b3e69df4eb61712bb9af5c8bf66",
    "context": "xxh3_128:ed7587371593180508dd5afc60787466",
}
"""Noted down on the day when `make_golden` made the files."""


def levels(codec: Codec, path: Path) -> str:
    """A checksum of all levels in a file."""
    with open(path, "rb") as file:
        header, data = format.read(file, path.stat().st_size, str(path))
    return checksum_bytes(codec.levels_of(header, data, str(path))[1].astype("<i8").tobytes())


@pytest.mark.promise(12)
@pytest.mark.parametrize("name", sorted(LEVELS))
def test_old_files_decode_to_the_same_levels(name, tmp_path, record_property):
    autoencoder = unpacked("autoencoder", tmp_path)
    model = tmp_path / "context.safetensors"
    model.write_bytes(lzma.decompress((FOLDER / "context.safetensors.xz").read_bytes()))
    codec = compression.open_codec(str(autoencoder), None if name == "self-fitted" else str(model))
    path = FOLDER / f"{name}.ldmz"
    assert levels(codec, path) == LEVELS[name]
    picture = codec.decompress_file(path)
    assert picture.shape == (61, 83, 3)
    preview = codec.decompress_file(path, channels=1)
    assert (preview != picture).any()
    assert np.std(picture) > 1
    record_property("figure", f"a compressed picture of format 1 ({name}): the same levels, bit by bit")


@pytest.mark.promise(12)
def test_a_newer_file_is_refused(tmp_path, record_property):
    codec = compression.open_codec(str(unpacked("autoencoder", tmp_path)))
    data = bytearray((FOLDER / "self-fitted.ldmz").read_bytes())
    data[4] = 99
    with pytest.raises(UserError, match="has format version 99, this program reads 1; update ldm_vae"):
        codec.decompress(bytes(data), "it")
    record_property("figure", "a newer compressed picture: refused with advice")


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MOST_BYTES
