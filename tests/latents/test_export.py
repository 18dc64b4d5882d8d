"""Exported sets, read back by the libraries that they are made for: the same numbers to the bit."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_vae import cli
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents import export as exporting
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.export import Export, ExportConfig, export_latents
from ldm_vae.latents.format import Layout, read_manifest

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "latent-exchange.md"


def export_set(source, output: str, *settings, **more) -> Export:
    return export_latents(ExportConfig(str(source), output, *settings, **more))


@pytest.fixture(scope="session")
def flipped(encode, tmp_path_factory):
    """Moments of 24 images and of their mirror images, in 3 shards of 10."""
    path = tmp_path_factory.mktemp("flipped") / "set"
    assert encode(path, "flip=true", "shard_size=10") == 0
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it loads, here until the test ends, and asks no server."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def stored(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a set, bfloat16 as float32."""
    from safetensors.torch import load_file

    parts = [load_file(file) for file in sorted(path.glob("shard-*.safetensors"))]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in whole.items()}


def load(folder: Path) -> Any:
    from datasets import load_dataset

    return load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train")


def column(rows: Any, name: str) -> np.ndarray:
    """In its own precision, which the formats of `datasets` widen."""
    return np.concatenate([chunk.to_numpy() for chunk in rows.with_format("arrow")[:][name].chunks])


def tar_samples(folder: Path) -> list[dict[str, Any]]:
    wds = pytest.importorskip("webdataset")
    files = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(wds.WebDataset(files, shardshuffle=False).decode())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def test_parquet_keeps_every_bit_and_its_features(flipped, tmp_path):
    from datasets import Array3D, ClassLabel, Value, load_dataset

    export_set(flipped, str(tmp_path / "out"), "parquet", rows=9)
    data = [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    assert sorted(contents(tmp_path / "out")) == ["README.md", "export.json", "manifest.json", *data]
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (flipped / "manifest.json").read_bytes()
    rows, expected = load(tmp_path / "out"), stored(flipped)
    assert rows.features == {
        "id": Value("string"), "index": Value("int64"), "label": ClassLabel(names=["a", "b"]),
        "moments": Array3D((6, 4, 4), "float16"), "moments_flipped": Array3D((6, 4, 4), "float16"),
    }  # fmt: skip
    for name in ("moments", "moments_flipped", "index", "label"):
        assert same(column(rows, name), expected[name]), name
    dataset = LatentDataset(flipped)
    assert rows["id"][:] == [dataset.id(i) for i in range(24)]
    whole = load_dataset(str(tmp_path / "out"), split="train")  # by the front matter of the card
    assert (whole.features, len(whole)) == (rows.features, 24)
    assert same(column(whole, "moments"), expected["moments"])


def test_webdataset_keeps_every_bit(flipped, tmp_path):
    export_set(flipped, str(tmp_path / "out"), "webdataset", rows=9)
    assert sorted(contents(tmp_path / "out")) == [
        "000000.tar", "000001.tar", "000002.tar", "README.md", "export.json", "manifest.json",
    ]  # fmt: skip
    samples, expected, dataset = tar_samples(tmp_path / "out"), stored(flipped), LatentDataset(flipped)
    assert len(samples) == 24
    for i, sample in enumerate(samples):
        for name in ("moments", "moments_flipped"):
            assert same(sample[f"{name}.npy"], expected[name][i])
        label = int(expected["label"][i])
        facts = {"id": dataset.id(i), "index": int(expected["index"][i]), "label": label, "label_name": "ab"[label]}
        assert (sample["cls"], sample["json"], sample["__key__"]) == (label, facts, f"{i:012d}")


@pytest.mark.parametrize("to", ["parquet", "webdataset"])
def test_bytes_are_a_function_of_the_set(flipped, tmp_path, to):
    for name in ("one", "two"):
        export_set(flipped, str(tmp_path / name), to, rows=9)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_bfloat16_becomes_the_same_numbers_in_float32(encode, tmp_path):
    encode(tmp_path / "set", "dtype=bfloat16")
    expected = stored(tmp_path / "set")["moments"]
    export_set(tmp_path / "set", str(tmp_path / "parquet"), "parquet")
    export_set(tmp_path / "set", str(tmp_path / "tar"), "webdataset")
    assert same(column(load(tmp_path / "parquet"), "moments"), expected)
    assert same(np.stack([sample["moments.npy"] for sample in tar_samples(tmp_path / "tar")]), expected)


def test_codes(encode, tmp_path):
    from datasets import Array2D

    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(preset="pico", kind="fsq", latent_channels=3, fsq_levels=[8, 5, 5]))
    model.save_pretrained(tmp_path / "model")
    encode(tmp_path / "set", f"autoencoder={tmp_path / 'model'}", "store=indices")
    expected = stored(tmp_path / "set")["indices"]
    export_set(tmp_path / "set", str(tmp_path / "parquet"), "parquet")
    rows = load(tmp_path / "parquet")
    assert rows.features["indices"] == Array2D((4, 4), "uint16")
    assert same(column(rows, "indices"), expected)
    export_set(tmp_path / "set", str(tmp_path / "tar"), "webdataset")
    assert same(np.stack([sample["indices.npy"] for sample in tar_samples(tmp_path / "tar")]), expected)


def test_images_without_labels_have_plain_integers(encode, image_folder, tmp_path):
    from datasets import Value

    encode(tmp_path / "set", f"data.path={image_folder / 'a'}")
    export_set(tmp_path / "set", str(tmp_path / "parquet"), "parquet")
    rows = load(tmp_path / "parquet")
    assert rows.features["label"] == Value("int64")
    assert rows["label"][:] == [-1] * 12
    export_set(tmp_path / "set", str(tmp_path / "tar"), "webdataset")
    samples = tar_samples(tmp_path / "tar")
    assert {sample["cls"] for sample in samples} == {-1}
    assert "label_name" not in samples[0]["json"]


def test_means_are_cut_out_and_have_statistics_of_their_own(flipped, tmp_path):
    export_set(flipped, str(tmp_path / "out"), "parquet", "mean")
    rows, expected = load(tmp_path / "out"), stored(flipped)
    found = {name: column(rows, name) for name in ("mean", "mean_flipped")}
    assert same(found["mean"], np.ascontiguousarray(expected["moments"][:, :3]))
    assert same(found["mean_flipped"], np.ascontiguousarray(expected["moments_flipped"][:, :3]))
    both = np.concatenate(list(found.values())).astype(np.float64)
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    np.testing.assert_allclose(facts["statistics"]["mean"], both.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(facts["statistics"]["std"], both.std((0, 2, 3)), rtol=1e-9)
    assert facts["tensors"]["mean"] == {"dtype": "float16", "shape": [3, 4, 4]}
    assert (np.array(facts["statistics"]["std"]) < read_manifest(flipped).statistics["std"]).all()


def test_samples_follow_the_posterior_and_depend_on_the_source_index_only(flipped, latents, tmp_path):
    export_set(flipped, str(tmp_path / "one"), "webdataset", "sample", rows=9)
    export_set(latents, str(tmp_path / "two"), "webdataset", "sample", rows=5)
    one, two, expected = tar_samples(tmp_path / "one"), tar_samples(tmp_path / "two"), stored(flipped)
    noises = []
    for i in range(24):
        assert same(one[i]["sample.npy"], two[i]["sample.npy"])
        for name in ("", "_flipped"):
            mean, logvar = expected["moments" + name][i].astype(np.float64).reshape(2, 3, 4, 4)
            noises.append((one[i][f"sample{name}.npy"] - mean) / np.exp(0.5 * logvar))
    noise = np.stack(noises)
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert not np.allclose(noise[0], noise[1], atol=0.1)


def test_a_shard_of_many_samples_is_read_in_blocks(flipped, tmp_path, monkeypatch):
    export_set(flipped, str(tmp_path / "whole"), "webdataset")
    monkeypatch.setattr(exporting, "BLOCK_BYTES", 4 * read_manifest(flipped).layout.sample_bytes)
    export_set(flipped, str(tmp_path / "blocks"), "webdataset")
    assert contents(tmp_path / "whole") == contents(tmp_path / "blocks")
    export_set(flipped, str(tmp_path / "parquet"), "parquet")
    assert same(column(load(tmp_path / "parquet"), "moments"), stored(flipped)["moments"])


@pytest.mark.parametrize("to", ["parquet", "webdataset"])
def test_a_damaged_shard_stops_it_and_after_repair_it_goes_on(latents, tmp_path, to):
    export_set(latents, str(tmp_path / "expected"), to, rows=4)
    shutil.copytree(latents, tmp_path / "set")
    shard = tmp_path / "set" / "shard-000003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-000003\.safetensors: damaged, its checksum is"):
        export_set(tmp_path / "set", str(tmp_path / "out"), to, rows=4)
    assert not (tmp_path / "out" / "manifest.json").exists()
    first = min(path for path in (tmp_path / "out").iterdir() if path.suffix in (".tar", ".parquet"))
    made = first.stat().st_mtime_ns
    (tmp_path / "out" / ".tmp-left-by-a-killed-process").write_text("x")
    shutil.copy(latents / shard.name, shard)
    export_set(tmp_path / "set", str(tmp_path / "out"), to, rows=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert first.stat().st_mtime_ns == made


def test_a_sidecar_of_another_shard_is_refused(latents, tmp_path):
    shutil.copytree(latents, tmp_path / "set")
    sidecar = tmp_path / "set" / "shard-000002.jsonl"
    head, _, body = sidecar.read_text().partition("\n")
    sidecar.write_text(head.replace('"size_bytes":', '"size_bytes":1') + "\n" + body)
    with pytest.raises(UserError, match="the sidecar of shard 2 does not belong to the shard"):
        export_set(tmp_path / "set", str(tmp_path / "out"), "parquet")


def test_what_cannot_be_exported(encode, latents, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"mine: holds thesis\.tex and not an export"):
        export_set(latents, str(tmp_path / "mine"), "parquet")
    assert contents(tmp_path / "mine") == {"thesis.tex": b"x"}
    export_set(latents, str(tmp_path / "out"), "parquet")
    with pytest.raises(UserError, match="out: holds another export, its content is moments and not mean"):
        export_set(latents, str(tmp_path / "out"), "parquet", "mean")
    with pytest.raises(UserError, match="rows: 0 is not positive"):
        export_set(latents, str(tmp_path / "zero"), "parquet", rows=0)
    encode(tmp_path / "means", "store=mean")
    with pytest.raises(UserError, match="posterior=sample needs stored moments, this set holds mean"):
        export_set(tmp_path / "means", str(tmp_path / "other"), "parquet", "sample")
    export_set(tmp_path / "means", str(tmp_path / "other"), "parquet", "mean")
    assert same(column(load(tmp_path / "other"), "mean"), stored(tmp_path / "means")["mean"])


def test_a_full_disk_is_named_and_the_same_command_goes_on(latents, tmp_path, monkeypatch):
    export_set(latents, str(tmp_path / "expected"), "webdataset", rows=4)
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space left on the device; free some space and run the same command"):
            export_set(latents, str(tmp_path / "out"), "webdataset", rows=4)
    assert 0 < len(list((tmp_path / "out").glob("*.tar"))) < 6
    export_set(latents, str(tmp_path / "out"), "webdataset", rows=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_file_has_about_two_hundred_megabytes(latents):
    manifest = read_manifest(latents)
    export = exporting.plan_export(manifest, ExportConfig(to="parquet"))
    assert export.rows * manifest.layout.sample_bytes == pytest.approx(200e6, rel=1e-3)
    assert exporting.FILE_BYTES // Layout("moments", "float16", (4, 64, 64), False).sample_bytes == 3051


def test_to_an_object_store(latents, bucket, tmp_path):
    from ldm_vae.storage import open_folder

    export_set(latents, str(tmp_path / "out"), "webdataset", rows=9)
    export_set(latents, f"{bucket}/out", "webdataset", rows=9)
    remote = open_folder(f"{bucket}/out")
    assert {name: remote.read(name) for name in remote.sizes()} == contents(tmp_path / "out")


def test_the_command(latents, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = ["latents", "export", str(latents), out, "--to", "parquet", "--posterior", "mean", "--rows", "20"]
    assert cli.main(command) == 0
    assert f"{out}: 24 samples in 2 files; mean in float16" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert f"{out}: exported already" in capsys.readouterr().out
    assert cli.main([*command[:-1], "21"]) == EXIT_USER_ERROR
    assert "holds another export" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["parquet", "webdataset"])
def test_the_readers_of_the_page_read(flipped, tmp_path, to, monkeypatch):
    """Its block for this format runs as it stands, and what it trains on is normalised."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if f'"exported/{to}' in block]
    if to == "webdataset":
        pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    export_set(flipped, f"exported/{to}", to, rows=20)
    names: dict[str, Any] = {}
    exec(code, names)
    expected, normalizer = stored(flipped), read_manifest(flipped).normalizer
    means = torch.from_numpy(expected["moments"][:, :3]).float()
    torch.testing.assert_close(names["x"].float(), normalizer.normalize(means))
    assert names["labels"] == expected["label"].tolist()


def test_the_commands_of_the_page_parse():
    import shlex

    lines = re.findall(r"^ldm-vae latents ((?:export|import) .*)$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        tool, *arguments = shlex.split(line, comments=True)
        assert cli.ArgumentReader(f"latents {tool}").read(arguments).advice == []
