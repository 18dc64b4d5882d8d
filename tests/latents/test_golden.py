"""A frozen set of two shards, read by the words of docs/reference/latent-shards.md alone, and by the package.

The set was made once, by `ldm-vae encode` from six random images of 24x16 pixels, of which one was broken; it must stay
readable by every later release of this format version.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import xxhash

from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.format import read_manifest, read_origin, read_sidecar
from ldm_vae.latents.verify import verify
from ldm_vae.latents.writer import Output
from ldm_vae.storage import open_folder

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"F16": np.float16, "F64": np.float64, "I64": np.int64, "U8": np.uint8}


def tensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, tensor in header.items():
        begin, end = (8 + length + offset for offset in tensor["data_offsets"])
        found[name] = np.frombuffer(data[begin:end], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return found


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def checksum(data: bytes) -> str:
    return "xxh3_128:" + xxhash.xxh3_128_hexdigest(data)


def read(folder: Path) -> tuple[dict, list[dict[str, np.ndarray]], list[dict]]:
    """(manifest, tensors of each shard, lines of all sidecars), everything that the specification says checked."""
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = manifest.pop("digest")
    assert hashlib.sha256(canonical(manifest)).hexdigest() == digest
    plan = json.loads((folder / "plan.json").read_text())
    assert hashlib.sha256(canonical(plan)).hexdigest() == manifest["datasets"][0]["plan"]
    shards, lines = [], []
    for part in manifest["index"]:
        assert checksum((folder / part["file"]).read_bytes()) == part["checksum"]
        assert part["file"].split("-")[2].removesuffix(".safetensors") == part["checksum"][9:25]
        index = tensors(folder / part["file"])
        for row in range(part["shards"]):
            name = f"shard-{len(shards):06d}"
            data = (folder / f"{name}.safetensors").read_bytes()
            assert (len(data), checksum(data)[9:]) == (index["size_bytes"][row], index["checksum"][row].tobytes().hex())
            first, _, body = (folder / f"{name}.jsonl").read_bytes().partition(b"\n")
            header = json.loads(first)
            assert checksum(first)[9:] == index["sidecar_checksum"][row].tobytes().hex()
            assert checksum(body) == header["body"]
            assert header["origin"] == manifest["datasets"][0]["plan"]
            for column in ("count", "rejected", "first_index", "last_index", "size_bytes"):
                assert header[column] == index[column][row]
            np.testing.assert_array_equal(header["sums"], index["sums"][row])
            shards.append(tensors(folder / f"{name}.safetensors"))
            lines += [json.loads(line) for line in body.splitlines()]
    return manifest, shards, lines


def test_the_specification_alone_reads_the_golden_set():
    manifest, shards, lines = read(GOLDEN)
    assert [line["index"] for line in lines] == list(range(6))
    samples = [line for line in lines if "reason" not in line]
    assert [line["id"] for line in lines if "reason" in line] == ["dog/4.png"]
    assert (manifest["count"], manifest["rejected"], manifest["shards"]) == (len(samples), 1, 2)
    rows = [(shard, row) for shard in shards for row in range(len(shard["index"]))]
    for line, (shard, row) in zip(samples, rows):
        assert shard["index"][row] == line["index"]
        assert manifest["label_names"][shard["label"][row]] == line["id"].split("/")[0]
        data = b"".join(shard[name][row].tobytes() for name in sorted(shard))
        assert xxhash.xxh3_64_hexdigest(data) == line["checksum"]
    both = np.concatenate([shard[name] for shard in shards for name in ("moments", "moments_flipped")]).astype(float)
    mean, variance = both[:, :2], np.exp(both[:, 2:])
    np.testing.assert_allclose(manifest["statistics"]["mean"], mean.mean((0, 2, 3)), rtol=1e-12)
    std = np.sqrt(mean.var((0, 2, 3)) + variance.mean((0, 2, 3)))
    np.testing.assert_allclose(manifest["statistics"]["std"], std, rtol=1e-12)


def test_its_numbers_are_those_of_the_day_it_was_made():
    _, shards, _ = read(GOLDEN)
    assert shards[0]["moments"].shape == (3, 4, 3, 2)
    np.testing.assert_array_equal(shards[0]["moments"][0, 0, 0], [-0.01702880859375, -0.007904052734375])
    np.testing.assert_array_equal(shards[1]["moments_flipped"][1, 3, 2], [-2.009765625, -2.0])


def test_the_package_reads_the_same():
    manifest, shards, _ = read(GOLDEN)
    dataset = LatentDataset(GOLDEN, posterior="moments", flip=False)
    moments = np.concatenate([shard["moments"] for shard in shards])
    np.testing.assert_array_equal(np.stack([dataset[i]["moments"].numpy() for i in range(5)]), moments)
    assert [dataset.id(i) for i in range(5)] == ["cat/0.png", "cat/1.png", "cat/2.png", "dog/3.png", "dog/5.png"]
    assert dataset.manifest.statistics == manifest["statistics"]
    assert read_sidecar(open_folder(GOLDEN), 1).rejected[0].reason == "unknown_format"


def test_the_package_finds_nothing_wrong():
    assert not verify(GOLDEN).findings


def test_the_package_writes_the_same_from_the_shards(tmp_path):
    """What it understood of the set: no field is lost, none is added."""
    shutil.copytree(GOLDEN, tmp_path / "set")
    for name in ("manifest.json", "quarantine.jsonl", read_manifest(GOLDEN).index[0].file):
        (tmp_path / "set" / name).unlink()
    folder = open_folder(tmp_path / "set")
    output = Output(folder, read_origin(folder))
    output.publish(output.complete(2))
    for path in GOLDEN.iterdir():
        assert (tmp_path / "set" / path.name).read_bytes() == path.read_bytes(), path.name
