"""Streams are encoded to what the same images give with random access, whatever is counted, shared or interrupted."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch

from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.format import read_manifest

FILES = (5, 9, 10)
"""Images in each file of a collection; a unit has 4."""


@pytest.fixture(scope="module")
def collections(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 24 images of the folder as parquet files, as tar files, and as compressed tar files, which nobody counts."""
    import datasets

    folder = tmp_path_factory.mktemp("collections")
    paths = iter(sorted(image_folder.rglob("*.png")))
    features = datasets.Features({"png": datasets.Image(), "cls": datasets.ClassLabel(names=["a", "b"])})
    for file, count in enumerate(FILES):
        images = [(path.name, path.read_bytes(), int(path.parent.name == "b")) for path in islice(paths, count)]
        rows = {
            "png": [{"bytes": data, "path": name} for name, data, _ in images],
            "cls": [label for _, _, label in images],
        }
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{file}.parquet", batch_size=3)
        for name, mode in ((f"{file}.tar", "w"), (f"compressed-{file}.tar", "w:gz")):
            with tarfile.open(folder / name, mode) as archive:  # type: ignore[call-overload]
                for name, data, label in images:
                    for suffix, content in (("png", data), ("cls", b"%d" % label)):
                        member = tarfile.TarInfo(f"{name.removesuffix('.png')}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    return folder


KINDS = pytest.mark.parametrize("kind", ["[0-9].parquet", "[0-9].tar", "compressed-*.tar"])


def data(pattern: Path | str, streaming: bool = True) -> list[str]:
    return [
        *("data.source=datasets", "data.path=", f"data.datasets.name={pattern}"),
        *("data.datasets.image_column=png", "data.datasets.label_column=cls", "data.datasets.label_names=[a,b]"),
        f"data.datasets.streaming={str(streaming).lower()}",
    ]


@KINDS
@pytest.mark.parametrize("part", ["all", "train"])
def test_a_stream_gives_the_latents_of_random_access(encode, collections, tmp_path, kind, part):
    split = [f"part={part}", "data.held_out=0.3"]
    encode(tmp_path / "stream", *data(collections / kind), *split, "workers=2")
    encode(tmp_path / "alone", *data(collections / kind), *split, "workers=0")
    encode(tmp_path / "whole", *data(collections / "[0-9].parquet", False), *split)
    stream, whole = (LatentDataset(tmp_path / name) for name in ("stream", "whole"))
    assert stream.manifest.datasets[0]["count"] == len(stream) == len(whole)
    assert stream.manifest.statistics == whole.manifest.statistics
    for i in range(len(whole)):
        assert torch.equal(stream[i]["latent"], whole[i]["latent"])
        assert (stream[i]["label"], stream[i]["index"], stream.id(i)) == (whole[i]["label"], i, whole.id(i))
    for path in (tmp_path / "stream").glob("*shard*"):
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes()


@KINDS
def test_an_interrupted_stream_is_continued(encode, collections, tmp_path, kind):
    encode(tmp_path / "set", *data(collections / kind))
    before = read_manifest(tmp_path / "set")
    for name in ("manifest.json", "shard-000001.jsonl", "shard-000005.safetensors"):
        (tmp_path / "set" / name).unlink()
    encode(tmp_path / "set", *data(collections / kind), "workers=2")
    assert read_manifest(tmp_path / "set") == before
    assert json.loads((tmp_path / "set" / "run.json").read_text())["images_encoded"] == 8
