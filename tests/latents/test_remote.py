"""Sets behind a URL, on a real S3 server on loopback: the same bytes as on a disk, the same reading."""

from __future__ import annotations

import pytest
import torch

from ldm_vae.errors import UserError
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.format import read_manifest
from ldm_vae.storage import open_folder
from ldm_vae.storage.base import Folder
from tests.latents.test_encode import contents


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_VAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def objects(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.sizes() if name not in ("run.json", "encode.lock")}


def test_encoding_into_a_bucket_gives_the_bytes_of_a_disk(encode, latents, bucket, capsys):
    url = f"{bucket}/sets/one"
    assert encode(url) == 0
    assert objects(open_folder(url)) == contents(latents)
    assert encode(url) == 0
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="dtype=float16 instead of float32"):
        encode(url, "dtype=float32")


def test_an_interrupted_job_into_a_bucket_is_continued(encode, latents, bucket):
    folder = open_folder(f"{bucket}/set")
    encode(folder.location)
    for name in ("manifest.json", "shard-000001.jsonl", "shard-000005.safetensors"):
        folder.remove(name)
    with pytest.raises(UserError, match=r"manifest.json is missing"):
        read_manifest(folder)
    encode(folder.location)
    assert objects(folder) == contents(latents)


def test_images_and_latents_both_in_buckets(encode, latents, image_folder, bucket):
    import fsspec

    files, _ = fsspec.core.url_to_fs(bucket)
    files.put(str(image_folder), f"{bucket}/images", recursive=True)
    encode(f"{bucket}/set", f"data.path={bucket}/images", "workers=2")
    assert objects(open_folder(f"{bucket}/set")) == contents(latents)


def test_a_set_in_a_bucket_is_read_through_a_cache(encode, latents, bucket, cache):
    encode(f"{bucket}/set")
    remote, local = LatentDataset(f"{bucket}/set"), LatentDataset(latents)
    assert not cache.exists()
    assert torch.equal(remote[5]["latent"], local[5]["latent"])
    assert len(list(cache.rglob("*"))) == 1  # the shard that was touched
    loader = torch.utils.data.DataLoader(remote, batch_size=8, num_workers=2)
    expected = torch.stack([local[i]["latent"] for i in range(24)])
    assert torch.equal(torch.cat([batch["latent"] for batch in loader]), expected)
    assert remote.id(7) == local.id(7)
