from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ldm_vae.errors import UserError
from ldm_vae.latents.shard import (
    STORED_DTYPES,
    Rejection,
    Shard,
    finished_sidecar,
    open_shard,
    read_sidecar,
    write_shard,
)

SHAPE = (3, 4, 6)


def shard(count: int = 5, dtype: str = "float16", flipped: bool = True) -> Shard:
    torch.manual_seed(0)
    moments = torch.randn(count, 6, 4, 6).to(STORED_DTYPES[dtype])
    return Shard(
        first_index=40,
        last_index=40 + count,
        moments=moments,
        moments_flipped=moments.flip(-1) if flipped else None,
        labels=list(range(count)),
        indices=list(range(40, 40 + count)),
        ids=[f"image-{i}" for i in range(count)],
        rejected=[Rejection(40 + count, "broken", "undecodable", "it is broken")],
    )


@pytest.mark.parametrize("dtype", STORED_DTYPES)
@pytest.mark.parametrize("flipped", [False, True])
def test_round_trip(tmp_path, dtype, flipped):
    written = shard(dtype=dtype, flipped=flipped)
    sidecar = write_shard(tmp_path, 7, written, "origin")
    assert read_sidecar(tmp_path / "shard-000007.json") == sidecar
    opened = open_shard(tmp_path / sidecar.record.file, sidecar.record, SHAPE, dtype, flipped=flipped, verify=True)
    read = torch.from_numpy(np.array(opened.moments)).view(STORED_DTYPES[dtype])
    assert torch.equal(read, written.moments)
    assert (opened.moments_flipped is not None) == flipped
    assert opened.label.tolist() == written.labels
    assert opened.index.tolist() == written.indices


def test_safetensors_itself_reads_it_and_finds_one_metadata_key(tmp_path):
    write_shard(tmp_path, 0, shard(), "origin")
    with safe_open(tmp_path / "shard-000000.safetensors", "pt") as file:
        assert set(file.keys()) == {"moments", "moments_flipped", "label", "index"}
        assert torch.equal(file.get_tensor("moments"), shard().moments)
        assert list(file.metadata()) == ["ldm_vae"]
        assert json.loads(file.metadata()["ldm_vae"]) == {"format_version": 1, "origin": "origin", "shard": 0}


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name, 0, shard(), "origin")
    for name in ("shard-000000.safetensors", "shard-000000.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_shard_of_rejected_images_only_is_a_shard(tmp_path):
    sidecar = write_shard(tmp_path, 0, shard(0), "origin")
    opened = open_shard(tmp_path / sidecar.record.file, sidecar.record, SHAPE, "float16", flipped=True, verify=True)
    assert opened.moments.shape == (0, 6, 4, 6)
    assert sidecar.rejected[0].id == "broken"


def test_every_flipped_bit_and_cut_is_found(tmp_path):
    sidecar = write_shard(tmp_path, 0, shard(), "origin")
    path = tmp_path / sidecar.record.file
    whole = path.read_bytes()

    def refused(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            open_shard(path, sidecar.record, SHAPE, "float16", flipped=True, verify=True)
        except UserError as error:
            return "shard-000000.safetensors: damaged" in str(error) and "again" in str(error)
        return False

    choose = random.Random(0)
    for _ in range(60):
        place = choose.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << choose.randrange(8)
        assert refused(bytes(damaged)), place
    assert refused(whole[:-1])
    assert refused(whole + b"\0")
    assert refused(b"")
    assert not refused(whole)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (13).to_bytes(8, "little") + b'{"label": {}}',
    ],
)
def test_headers_are_judged_without_a_checksum_too(tmp_path, data):
    sidecar = write_shard(tmp_path, 0, shard(), "origin")
    path = tmp_path / sidecar.record.file
    path.write_bytes(data)
    with pytest.raises(UserError, match="shard-000000"):
        open_shard(path, sidecar.record, SHAPE, "float16", flipped=True, verify=False)


def test_a_cut_file_is_refused_before_it_is_mapped(tmp_path):
    sidecar = write_shard(tmp_path, 0, shard(), "origin")
    path = tmp_path / sidecar.record.file
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="cut off"):
        open_shard(path, sidecar.record, SHAPE, "float16", flipped=True, verify=False)


def test_a_shard_of_another_shape_or_precision_is_refused(tmp_path):
    sidecar = write_shard(tmp_path, 0, shard(), "origin")
    path = tmp_path / sidecar.record.file
    for shape, dtype, flipped in [((4, 4, 6), "float16", True), (SHAPE, "float32", True), (SHAPE, "float16", False)]:
        with pytest.raises(UserError, match="the manifest says"):
            open_shard(path, sidecar.record, shape, dtype, flipped=flipped, verify=False)


def test_only_a_whole_shard_of_this_plan_is_finished(tmp_path: Path):
    sidecar = write_shard(tmp_path, 0, shard(), "origin")
    path = tmp_path / sidecar.record.file
    assert finished_sidecar(tmp_path, 0, "origin") == sidecar
    assert finished_sidecar(tmp_path, 0, "another") is None
    assert finished_sidecar(tmp_path, 1, "origin") is None
    path.write_bytes(path.read_bytes()[:-1])
    assert finished_sidecar(tmp_path, 0, "origin") is None
    path.unlink()
    assert finished_sidecar(tmp_path, 0, "origin") is None
