from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.data.folder import FolderSource
from ldm_vae.data.samples import channels_first
from ldm_vae.data.split import in_part
from ldm_vae.data.transforms import from_uint8, resize_center_crop
from ldm_vae.errors import UserError
from ldm_vae.latents import dataset as dataset_module
from ldm_vae.latents.dataset import LatentDataset


@pytest.fixture(scope="module")
def flipped(encode, tmp_path_factory) -> Path:
    """A set with mirror images, stored without rounding."""
    path = tmp_path_factory.mktemp("flipped") / "set"
    encode(path, "flip=true", "dtype=float32")
    return path


@pytest.fixture(scope="module")
def images(image_folder) -> torch.Tensor:
    source = FolderSource(image_folder)
    return from_uint8(torch.stack([channels_first(resize_center_crop(source.read(i), 32)) for i in range(len(source))]))


def test_samples_are_those_of_the_autoencoder(latents, flipped, images, autoencoder_directory, image_folder):
    source, autoencoder = FolderSource(image_folder), load_autoencoder(autoencoder_directory)
    expected, _ = autoencoder.encode_moments(images)
    for path, tolerance in ((flipped, 1e-5), (latents, 2e-3)):
        dataset = LatentDataset(path, posterior="mean", flip=False)
        assert len(dataset) == len(source) == 24
        for i in range(24):
            assert dataset.id(i) == source.id(i)
            assert (dataset[i]["label"], dataset[i]["index"]) == (source.label(i), i)
            torch.testing.assert_close(dataset[i]["latent"], expected[i], atol=tolerance, rtol=tolerance)
    assert dataset[-1]["index"] == 23
    with pytest.raises(IndexError):
        dataset[24]


def test_every_stored_version_of_an_image_is_a_mean_of_the_autoencoder(latents, flipped, images, autoencoder_directory):
    autoencoder = load_autoencoder(autoencoder_directory)
    plain, mirrored = (autoencoder.encode_moments(x)[0] for x in (images, images.flip(-1)))
    for path, expected, tolerance in ((flipped, (plain, mirrored), 1e-5), (latents, (plain,), 2e-3)):
        found = torch.stack([LatentDataset(path).versions(i) for i in range(24)])
        torch.testing.assert_close(found, torch.stack(expected, 1), atol=tolerance, rtol=tolerance)


def test_posterior_samples_have_the_stored_moments(flipped, images, autoencoder_directory):
    dataset = LatentDataset(flipped)
    autoencoder = load_autoencoder(autoencoder_directory)
    samples = torch.stack([dataset.sample(5, position)["latent"] for position in range(2000)])
    sides = [autoencoder.encode_moments(x[5:6]) for x in (images, images.flip(-1))]
    mean = sum(mean[0] for mean, _ in sides) / 2
    second = sum((mean.square() + logvar.exp())[0] for mean, logvar in sides) / 2
    torch.testing.assert_close(samples.mean(0), mean, atol=0.06, rtol=0)
    torch.testing.assert_close(samples.std(0), (second - mean.square()).sqrt(), atol=0.06, rtol=0)


def test_normalised_samples_of_the_set_have_mean_zero_and_std_one(latents):
    dataset = LatentDataset(latents)
    samples = torch.stack([dataset.sample(i % 24, i)["latent"] for i in range(24 * 40)])
    x = dataset.normalizer.normalize(samples)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=0.03, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=0.03, rtol=0)


def test_noise_is_a_function_of_seed_and_position(latents):
    def latent(seed: int, position: int) -> torch.Tensor:
        return LatentDataset(latents, seed).sample(3, position)["latent"]

    assert torch.equal(latent(0, 7), latent(0, 7))
    assert not torch.equal(latent(0, 7), latent(0, 8))
    assert not torch.equal(latent(0, 7), latent(1, 7))


def test_epochs_resample_and_workers_that_live_on_see_them(latents):
    dataset = LatentDataset(latents)
    alone = [dataset[i]["latent"] for i in range(24)]
    loader = DataLoader(dataset, batch_size=8, num_workers=2, persistent_workers=True)
    assert torch.equal(torch.cat([batch["latent"] for batch in loader]), torch.stack(alone))
    dataset.set_epoch(1)
    resampled = torch.cat([batch["latent"] for batch in loader])
    assert not torch.equal(resampled, torch.stack(alone))
    assert torch.equal(resampled[9], dataset[9]["latent"])


def test_parts_follow_the_split_of_the_images(latents):
    whole = LatentDataset(latents)
    parts = {
        part: LatentDataset(latents, part=part, held_out=0.3) for part in ("train", "held_out", "validation", "test")
    }
    for part, dataset in parts.items():
        ids = [dataset.id(i) for i in range(len(dataset))]
        assert ids == [whole.id(i) for i in range(24) if in_part(whole.id(i), part, 0.3)]
    held_out = parts["held_out"]
    assert 0 < len(held_out) < 24
    assert len(parts["validation"]) + len(parts["test"]) == len(held_out)
    row = held_out[0]["index"]
    assert torch.equal(held_out[0]["latent"], whole[row]["latent"])
    with pytest.raises(UserError, match="none of 24 samples"):
        LatentDataset(latents, part="held_out", held_out=0.0)


def test_damage_is_found_at_the_first_touch(latents, tmp_path):
    shutil.copytree(latents, tmp_path / "set")
    path = tmp_path / "set" / "shard-000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    dataset = LatentDataset(tmp_path / "set")
    dataset[0]
    with pytest.raises(UserError, match=r"shard-000002.safetensors: damaged"):
        dataset[9]
    assert LatentDataset(tmp_path / "set", verify=False)[9]["index"] == 9
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        LatentDataset(tmp_path / "set")[9]


@pytest.mark.parametrize("posterior", ["sample", "mean", "moments"])
@pytest.mark.parametrize("name", ["latents", "flipped"])
def test_a_list_of_indices_gives_the_collated_samples(request, name, posterior):
    dataset = LatentDataset(request.getfixturevalue(name), posterior=posterior)
    indices = [5, 0, 23, 5, -1]
    expected = default_collate([dataset[i] for i in indices])
    found = dataset[indices]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value)
        assert found[key].dtype == value.dtype
    for same in (np.array(indices), torch.tensor(indices), tuple(indices)):
        assert torch.equal(dataset[same]["index"], expected["index"])
    assert dataset[3:10:3]["index"].tolist() == [3, 6, 9]
    loader = DataLoader(dataset, batch_size=None, sampler=[indices, [1, 2]])
    assert torch.equal(next(iter(loader))["label"], expected["label"])
    assert dataset[np.int64(5)]["index"] == 5


def test_more_shards_than_may_be_open_are_opened_again(latents, monkeypatch):
    expected = [LatentDataset(latents)[i]["latent"] for i in range(24)]
    monkeypatch.setattr(dataset_module, "MOST_OPEN_SHARDS", 2)
    dataset = LatentDataset(latents)
    for i in (0, 5, 9, 13, 0, 23, 9):
        assert torch.equal(dataset[i]["latent"], expected[i])
        assert len(dataset._open) <= 2


def test_samples_of_each_shard_are_counted(latents):
    assert LatentDataset(latents).shard_counts.tolist() == [4] * 6
    part = LatentDataset(latents, part="train", held_out=0.3)
    assert part.shard_counts.sum() == len(part) < 24
    assert [part.locate(i)[0] for i in range(len(part))] == np.repeat(np.arange(6), part.shard_counts).tolist()


def test_open_shards_hold_no_file_descriptors(latents):
    """A process may often have 1,024 files open, and a set has many more shards."""
    dataset = LatentDataset(latents)
    dataset[0]
    before = len(os.listdir("/proc/self/fd"))
    for i in range(24):
        dataset[i]
    assert len(dataset._open) == 6
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_given_is_a_copy_and_the_shard_stays_as_it_is(latents):
    dataset = LatentDataset(latents, posterior="moments")
    before = dataset[0]["moments"].clone()
    dataset[0]["moments"].zero_()
    dataset[[0]]["moments"].zero_()
    assert torch.equal(dataset[0]["moments"], before)
    with pytest.raises(ValueError, match="read-only"):
        dataset._shard(0)["moments"][0] = 0
