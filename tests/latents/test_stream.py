from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_vae import config as configuration
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.encode import EncodeConfig
from ldm_vae.latents.images import open_images
from ldm_vae.latents.manifest import read_manifest


@pytest.fixture(scope="module")
def parquet(image_folder: Path, tmp_path_factory) -> Path:
    import datasets

    paths = sorted(image_folder.rglob("*.png"))
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [int(path.parent.name == "b") for path in paths],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    path = tmp_path_factory.mktemp("parquet") / "images.parquet"
    datasets.Dataset.from_dict(rows, features).to_parquet(path)
    return path


def data(parquet: Path, streaming: bool) -> list[str]:
    return [
        *("data.source=datasets", "data.path=null", f"data.datasets.name={parquet}"),
        *("data.datasets.label_column=label", f"data.datasets.streaming={str(streaming).lower()}"),
    ]


@pytest.mark.parametrize("part", ["all", "train"])
def test_a_stream_gives_the_latents_of_random_access(encode, parquet, tmp_path, part):
    split = [f"part={part}", "data.held_out=0.3"]
    encode(tmp_path / "stream", *data(parquet, True), *split, "workers=2")
    encode(tmp_path / "whole", *data(parquet, False), *split)
    stream, whole = (LatentDataset(tmp_path / name) for name in ("stream", "whole"))
    assert stream.manifest.dataset["count"] == len(stream) == len(whole)
    assert stream.manifest.statistics == whole.manifest.statistics
    for i in range(len(whole)):
        assert torch.equal(stream[i]["latent"], whole[i]["latent"])
        assert (stream[i]["label"], stream[i]["index"], stream.id(i)) == (whole[i]["label"], i, whole.id(i))


def test_an_interrupted_stream_is_continued(encode, parquet, tmp_path):
    encode(tmp_path / "set", *data(parquet, True))
    before = read_manifest(tmp_path / "set")
    for name in ("manifest.json", "shard-000001.json", "shard-000005.safetensors"):
        (tmp_path / "set" / name).unlink()
    encode(tmp_path / "set", *data(parquet, True))
    assert read_manifest(tmp_path / "set") == before


@pytest.mark.parametrize("streaming", [True, False])
def test_processes_share_every_image_exactly_once(settings, parquet, streaming):
    config = configuration.load(EncodeConfig, None, [*settings, "output=x", *data(parquet, streaming)])
    images = open_images(config.data, "all")
    finished = frozenset({2})
    shares = [
        [(unit, [index for index, _ in items]) for unit, items in images.groups(finished, rank, 3, 5, 2)]
        for rank in range(3)
    ]
    places = sorted(index for share in shares for _, indices in share for index in indices)
    assert places == [i for i in range(24) if i // 5 != 2]
    for share in shares:
        assert all({index // 5 for index in indices} == {unit} and len(indices) <= 2 for unit, indices in share)
        assert [unit for unit, _ in share] == sorted(unit for unit, _ in share)
