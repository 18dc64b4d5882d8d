from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ldm_vae.errors import UserError
from ldm_vae.latents.format import STORED_DTYPES, Header, Layout, Rejection, read_sidecar, read_sidecar_header
from ldm_vae.latents.shard import Shard, open_shard, row_checksums, write_shard
from ldm_vae.storage import open_folder

LAYOUT = Layout("moments", "float16", (3, 4, 6), flipped=True)
NAME = "shard-000000.safetensors"


def shard(count: int = 5, layout: Layout = LAYOUT) -> Shard:
    torch.manual_seed(0)
    rows = torch.randint(0, 60000, (count, *layout.sample_shape))
    if layout.content != "indices":
        rows = torch.randn(rows.shape).to(STORED_DTYPES[layout.dtype])
    else:
        rows = torch.from_numpy(rows.numpy().astype(layout.dtype))
    return Shard(
        first_index=40,
        last_index=40 + count,
        tensors={name: rows if name == layout.content else rows.roll(1, -1) for name in layout.names},
        labels=list(range(count)),
        indices=list(range(40, 40 + count)),
        ids=[f"image-{i}" for i in range(count)],
        rejected=[Rejection(40 + count, "broken", "undecodable", "it is broken")],
    )


def write(path: Path, number: int = 0, written: Shard | None = None, layout: Layout = LAYOUT) -> Header:
    return write_shard(open_folder(path), number, written or shard(layout=layout), layout, "origin")


@pytest.mark.parametrize(
    ("content", "dtype"),
    [("moments", "float16"), ("moments", "bfloat16"), ("mean", "float32"), ("indices", "uint16"), ("indices", "int32")],
)
@pytest.mark.parametrize("flipped", [False, True])
def test_round_trip(tmp_path, content, dtype, flipped):
    layout = Layout(content, dtype, (3, 4, 6), flipped)
    written = shard(layout=layout)
    header = write(tmp_path, 7, written, layout)
    sidecar = read_sidecar(open_folder(tmp_path), 7)
    assert sidecar.header.record == header.record == read_sidecar_header(open_folder(tmp_path), 7).record
    np.testing.assert_array_equal(sidecar.header.sums, header.sums)
    assert [(sample.index, sample.id) for sample in sidecar.samples] == list(zip(written.indices, written.ids))
    assert sidecar.rejected == written.rejected
    opened = open_shard(open_folder(tmp_path), 7, header.record, layout, verify=True)
    for name in layout.names:
        read = torch.from_numpy(opened[name].copy()).view(STORED_DTYPES[dtype])
        assert torch.equal(read, written.tensors[name])
    assert (f"{content}_flipped" in opened) == flipped
    assert opened["label"].tolist() == written.labels
    assert opened["index"].tolist() == written.indices
    assert row_checksums(opened) == [sample.checksum for sample in sidecar.samples]


def test_safetensors_itself_reads_it_and_finds_one_metadata_key(tmp_path):
    write(tmp_path)
    with safe_open(tmp_path / NAME, "pt") as file:
        assert set(file.keys()) == {"moments", "moments_flipped", "label", "index"}
        assert torch.equal(file.get_tensor("moments"), shard().tensors["moments"])
        assert list(file.metadata()) == ["ldm_vae"]
        assert json.loads(file.metadata()["ldm_vae"]) == {"format_version": 2, "origin": "origin", "shard": 0}


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    for name in (NAME, "shard-000000.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_shard_of_rejected_images_only_is_a_shard(tmp_path):
    header = write(tmp_path, 0, shard(0))
    opened = open_shard(open_folder(tmp_path), 0, header.record, LAYOUT, verify=True)
    assert opened["moments"].shape == (0, 6, 4, 6)
    assert read_sidecar(open_folder(tmp_path), 0).rejected[0].id == "broken"


def test_every_flipped_bit_and_cut_is_found(tmp_path):
    record = write(tmp_path).record
    path = tmp_path / NAME
    whole = path.read_bytes()

    def refused(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            open_shard(open_folder(tmp_path), 0, record, LAYOUT, verify=True)
        except UserError as error:
            return f"{NAME}: damaged" in str(error) and "repair" in str(error)
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


def test_every_flipped_bit_of_a_sidecar_is_found(tmp_path):
    header = write(tmp_path)
    path = tmp_path / "shard-000000.jsonl"
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert read_sidecar(open_folder(tmp_path), 0).header.record != header.record, place


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
    record = write(tmp_path).record
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(UserError, match="shard-000000"):
        open_shard(open_folder(tmp_path), 0, record, LAYOUT, verify=False)


def test_a_cut_file_is_refused_before_it_is_mapped(tmp_path):
    record = write(tmp_path).record
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="cut off"):
        open_shard(open_folder(tmp_path), 0, record, LAYOUT, verify=False)


@pytest.mark.parametrize(
    "layout",
    [
        Layout("moments", "float16", (4, 4, 6), flipped=True),
        Layout("moments", "float32", (3, 4, 6), flipped=True),
        Layout("moments", "float16", (3, 4, 6), flipped=False),
        Layout("mean", "float16", (3, 4, 6), flipped=True),
    ],
)
def test_a_shard_of_another_layout_is_refused(tmp_path, layout):
    record = write(tmp_path).record
    with pytest.raises(UserError, match="the manifest says"):
        open_shard(open_folder(tmp_path), 0, record, layout, verify=False)
