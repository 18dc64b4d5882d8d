from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from ldm_vae import cli
from ldm_vae.errors import UserError
from ldm_vae.latents.format import (
    ShardIndex,
    manifest_statistics,
    read_manifest,
    shard_name,
    sidecar_name,
    write_index,
    write_manifest,
)
from ldm_vae.latents.inspect import describe, lines
from ldm_vae.latents.writer import QUARANTINE
from ldm_vae.storage import open_folder
from tests.latents.damaged_sets import RichSet, make


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, settings: list[str]) -> RichSet:
    return make(tmp_path_factory.mktemp("rich"), image_folder, settings)


def test_everything_about_a_set_is_in_a_screenful(rich):
    text = "\n".join(lines(describe(rich.path)))
    manifest = read_manifest(rich.path)
    assert text.count("\n") < 40
    for expected in (
        "moments 6x4x4 in float16, with mirror images (latents 3x4x4)",
        "18 in 6 shards",
        "384 bytes a sample",
        "AutoencoderWavelet",
        f"encoder_fingerprint {manifest.autoencoder['encoder_fingerprint'][:19]}...",
        "batch 2, shard_size 4, precision fp32",
        "height: 32",
        f"0: 14 images of folder (all), from shard 0, dataset {manifest.datasets[0]['fingerprint'][:12]}...",
        "1: 6 images of folder (all), from shard 4",
        "ids begin with more/",
        "3: a, b, c",
        f"channel 0: mean {manifest.statistics['mean'][0]:+.4f}, std {manifest.statistics['std'][0]:.4f}",
        "left out       2 images: unknown_format 2",
    ):
        assert expected in text, (expected, text)


def test_json_holds_the_manifest_and_the_sizes(rich, capsys):
    assert cli.main(["latents", "info", str(rich.path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    manifest = read_manifest(rich.path)
    assert values | manifest.to_dict() == values
    assert values["size_bytes"] == sum(path.stat().st_size for path in rich.path.glob("shard-*.safetensors"))
    assert values["sample_bytes"] == 384
    assert values["unfinished"] is None


def test_no_shard_is_read(rich, tmp_path):
    for path in rich.path.iterdir():
        if not path.name.startswith("shard-"):
            shutil.copy(path, tmp_path)
    assert describe(tmp_path) == describe(rich.path) | {"location": str(tmp_path)}


def test_an_unfinished_set_says_how_far_it_is(latents, tmp_path, capsys):
    for name in ("plan.json", shard_name(0), sidecar_name(0), shard_name(1)):
        shutil.copy(latents / name, tmp_path)
    assert cli.main(["latents", "info", str(tmp_path)]) == 0
    assert "1 of 6 shards; the same `ldm-vae encode` command continues" in capsys.readouterr().out


def test_an_unfinished_segment_is_shown(rich, latents, tmp_path):
    copy = shutil.copytree(latents, tmp_path / "set")
    plan = json.loads((rich.path / "plan-000001.json").read_text())
    (copy / "plan-000001.json").write_text(json.dumps(plan | {"first_shard": 6}))
    assert "segment 1, 0 of 2 shards; the same `ldm-vae latents append`" in lines(describe(copy))[-1]


def test_s3(rich, bucket):
    remote = open_folder(f"{bucket}/set")
    for path in rich.path.iterdir():
        if not path.name.startswith("shard-"):
            remote.write(path.name, path.read_bytes())
    assert describe(f"{bucket}/set")["count"] == 18


def test_100_million_samples_take_a_moment(latents, tmp_path):
    shards, manifest = 400_000, read_manifest(latents)
    columns = {name: np.repeat(values[:1], shards, axis=0) for name, values in manifest.shard_index.columns.items()}
    columns["count"][:] = 256
    index, folder = ShardIndex(columns), open_folder(tmp_path)
    parts, statistics = write_index(folder, index), manifest_statistics(index, manifest.layout, None)
    changes = {"index": parts, "shards": shards, "count": index.count, "statistics": statistics}
    write_manifest(folder, dataclasses.replace(manifest, **changes, where=folder))
    started = time.monotonic()
    assert "102,400,000 in 400,000 shards" in "\n".join(lines(describe(tmp_path)))
    print(f"{time.monotonic() - started:.3f} s")
    assert time.monotonic() - started < 5


def test_what_is_wrong_is_said(rich, tmp_path):
    with pytest.raises(UserError, match="is empty; give the folder that `ldm-vae encode` wrote"):
        describe(tmp_path)
    copy = shutil.copytree(rich.path, tmp_path / "set")
    (copy / QUARANTINE).write_text("{")
    with pytest.raises(UserError, match=r"quarantine\.jsonl: cannot be read"):
        describe(copy)
