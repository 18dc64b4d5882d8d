"""The numbers of a set against numpy, the check of its mean and std, labels, codes; the command and its page."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_vae import cli
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents.dataset import LatentDataset, evenly, read_labels, samples_per_shard
from ldm_vae.latents.format import read_manifest, write_manifest
from ldm_vae.latents.stats import Disagreement, Shape, measure_set, open_set, text_table


@pytest.fixture
def copy(latents: Path, tmp_path: Path) -> Path:
    return shutil.copytree(latents, tmp_path / "set")


def values_of(path: Path) -> np.ndarray:
    """Normalised latents (n, c, h, w) of a set of means."""
    dataset = LatentDataset(path)
    return dataset.normalizer.normalize(dataset[range(len(dataset))]["latent"]).double().numpy()


def test_samples_are_spread_over_shards_and_set():
    assert evenly(10, 5).tolist() == [1, 3, 5, 7, 9]
    assert evenly(3, 10).tolist() == [0, 1, 2]
    assert evenly(0, 4).tolist() == []
    counts = np.array([4, 0, 4, 2])
    assert samples_per_shard(counts, 100) == list(range(10))
    assert samples_per_shard(counts, 5) == [1, 3, 5, 7, 9]
    assert samples_per_shard(np.full(10, 3), 4, shards=2) == [6, 8, 21, 23]  # shards 2 and 7
    assert samples_per_shard(np.zeros(3, np.int64), 4) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shape_of_the_distribution_is_that_of_the_values(encode, tmp_path, dtype):
    encode(tmp_path / "set", "store=mean", f"dtype={dtype}")
    report = measure_set(open_set(str(tmp_path / "set"))).report
    values = values_of(tmp_path / "set")
    rows = values.transpose(1, 0, 2, 3).reshape(3, -1)
    assert np.allclose(report["correlation"]["matrix"], np.corrcoef(rows), atol=1e-6)
    off_diagonal = np.corrcoef(rows)[np.triu_indices(3, 1)]
    assert report["correlation"]["largest"] == pytest.approx(off_diagonal[np.abs(off_diagonal).argmax()], abs=1e-6)
    for number, (channel, row) in enumerate(zip(report["channels"], rows)):
        centred = row - row.mean()
        assert channel["skewness"] == pytest.approx((centred**3).mean() / row.std() ** 3, abs=1e-5)
        assert channel["excess_kurtosis"] == pytest.approx((centred**4).mean() / row.var() ** 2 - 3, abs=1e-5)
        assert (channel["minimum"], channel["maximum"]) == pytest.approx((row.min(), row.max()), rel=1e-6)
        pairs = [values[:, number, 1:] * values[:, number, :-1], values[:, number, :, 1:] * values[:, number, :, :-1]]
        product = np.concatenate([pair.ravel() for pair in pairs]).mean()
        expected = (product - row.mean() ** 2) / row.var()
        assert channel["neighbour_correlation"] == pytest.approx(expected, abs=1e-5)
        density = np.array(report["histograms"]["density"][number])
        assert density.sum() * 0.1 == pytest.approx(1, abs=1e-3)
        assert channel["noise_share"] is channel["nats"] is channel["std_of_means"] is None


def test_tails_are_counted_and_maps_are_over_samples():
    latents = torch.zeros(4, 1, 2, 2)
    latents[0, 0, 0, 0], latents[1, 0, 0, 0], latents[2, 0, 1, 1] = 5.0, -4.5, 4.0
    shape = Shape((1, 2, 2), has_moments=False)
    shape.add(latents[:3], None)
    shape.add(latents[3:], None)
    assert shape.channels()[0]["tail_share"] == 2 / 16
    mean, std = shape.maps()
    np.testing.assert_allclose(mean[0], latents.mean(0)[0])
    np.testing.assert_allclose(std[0], latents.std(0, correction=0)[0], rtol=1e-6)
    assert shape.correlation()["largest"] is None


def test_moments_split_into_signal_and_noise(latents):
    dataset = LatentDataset(latents, posterior="moments")
    mean, logvar = dataset[range(24)]["moments"].double().numpy().reshape(24, 2, 3, 4, 4).transpose(1, 2, 0, 3, 4)
    report = measure_set(open_set(str(latents))).report
    for channel, found in enumerate(report["channels"]):
        variance = np.exp(logvar[channel]).mean()
        assert found["std_of_means"] == pytest.approx(mean[channel].std(), rel=1e-9)
        assert found["noise_share"] == pytest.approx(variance / (mean[channel].var() + variance), rel=1e-9)
        assert found["posterior_deviation"] == pytest.approx(np.exp(0.5 * logvar[channel]).mean(), rel=1e-6)
        nats = 0.5 * (mean[channel] ** 2 + np.exp(logvar[channel]) - 1 - logvar[channel]).mean()
        assert found["nats"] == pytest.approx(nats, rel=1e-5)
        assert found["std"] == dataset.manifest.statistics["std"][channel]
    assert report["recomputed"]["std"] == pytest.approx(dataset.manifest.statistics["std"], rel=1e-12)
    assert report["recomputed"]["shards_read"] == 6


def test_a_subset_says_so(latents):
    report = measure_set(open_set(str(latents)), samples=5).report
    assert report["measured_samples"] == 5
    assert report["recomputed"]["shards_read"] == 2
    assert "of 5 of 24 samples, evenly spread" in text_table(report)


def test_statistics_that_are_not_those_of_the_shards_are_named(copy, capsys):
    manifest = read_manifest(copy)
    std = list(manifest.statistics["std"])
    wrong = dataclasses.replace(manifest, statistics=manifest.statistics | {"std": [*std[:2], std[2] * (1 + 1e-6)]})
    write_manifest(manifest.where, wrong)
    assert cli.main(["latents", "stats", str(copy)]) == 1
    out, error = capsys.readouterr()
    assert out.count("\n") == 1  # the first line
    assert error.count("\n") == 1
    assert f"channel 2 has std {std[2] * (1 + 1e-6)} in manifest.json and {std[2]}"[:60] in error
    assert "; `ldm-vae latents repair` rebuilds it" in error


@pytest.mark.parametrize("value", [8.0, float("nan"), float("inf")])
def test_values_that_are_not_those_of_the_index_are_named(copy, value):
    path = copy / "shard-000003.safetensors"
    data = bytearray(path.read_bytes())
    place = len(data) - 2 * (6 * 16 - 20)  # of the last sample's moments, the 21st value: channel 1
    data[place : place + 2] = np.float16(value).tobytes()
    path.write_bytes(data)
    with pytest.raises(
        Disagreement, match=r"set: shard 3: channel 1 has mean \S+ in the index and \S+ in its values; "
    ):
        measure_set(open_set(str(copy)))


def test_labels_are_counted_in_all_shards(encode, latents, tmp_path, bucket):
    manifest = read_manifest(latents)
    dataset = LatentDataset(latents)
    assert read_labels(manifest).tolist() == [dataset[i]["label"] for i in range(24)]
    labels = measure_set(open_set(str(latents)), samples=1).report["labels"]
    assert labels["counts"] == {"a": 12, "b": 12}
    assert labels["imbalance"] == 1
    encode(f"{bucket}/set")
    remote = measure_set(open_set(f"{bucket}/set")).report
    assert remote["labels"] == labels
    assert remote["channels"] == measure_set(open_set(str(latents))).report["channels"]


def test_uneven_classes_are_named(copy):
    manifest = read_manifest(copy)
    write_manifest(manifest.where, dataclasses.replace(manifest, label_names=("a", "b", "c")))
    report = measure_set(open_set(str(copy))).report
    assert report["labels"]["smallest"] == {"name": "c", "samples": 0}
    assert report["labels"]["imbalance"] is None
    assert "3, from 0 samples (c) to 12 (a): some are empty" in text_table(report)


def test_a_missing_shard_is_named(copy):
    (copy / "shard-000002.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-000002.safetensors: its labels cannot be read"):
        measure_set(open_set(str(copy)))


def test_a_channel_without_spread_is_refused_by_number(copy, capsys):
    manifest = read_manifest(copy)
    write_manifest(manifest.where, dataclasses.replace(manifest, statistics={"mean": [0] * 3, "std": [1, 0, 1]}))
    assert cli.main(["latents", "stats", str(copy)]) == 1  # it is not what the shards have either
    assert "channel 0 has mean 0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def codes(encode, tmp_path_factory) -> Path:
    pytest.importorskip("vector_quantize_pytorch")
    from ldm_vae.autoencoder.quantized import AutoencoderQuantized

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("codes")
    AutoencoderQuantized(
        latent_channels=3, codebook_size=20, encoder_channels=(8, 16), encoder_blocks=(1, 1),
        decoder_channels=(16, 8, 8, 8), decoder_blocks=(1, 0, 0, 0),
    ).save_pretrained(path / "vq")  # fmt: skip
    encode(path / "set", f"autoencoder={path / 'vq'}", "store=indices")
    return path / "set"


def test_the_use_of_codes(codes):
    dataset = LatentDataset(codes)
    counts = np.bincount(dataset[range(24)]["indices"].flatten(), minlength=20)
    share = counts[counts > 0] / counts.sum()
    found = measure_set(open_set(str(codes))).report["codes"]
    assert found["entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-9)
    assert found["perplexity"] == pytest.approx(2 ** found["entropy_bits"], rel=1e-9)
    assert found["dead_share"] == (counts == 0).mean()
    assert found["most_common_share"] == counts.max() / counts.sum() == found["shares"][0]
    assert found["bits_per_pixel"] == pytest.approx(found["entropy_bits"] / 64)
    assert found["positions"] == 24 * 16


@pytest.mark.parametrize("kind", ["latents", "codes"])
def test_the_command_shows_a_table_and_a_page(kind, request, tmp_path, capsys):
    path, output = request.getfixturevalue(kind), tmp_path / "stats"
    assert cli.main(["latents", "stats", str(path), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    first, *lines, last = shown.splitlines()
    assert first.startswith("latents stats: 24 of 24 samples of ")
    assert last.startswith(f"{output}/index.html: statistics of 24 samples; next: python -m webbrowser ")
    assert max(map(len, lines[1:])) <= 110
    if kind == "latents":
        assert len({len(line) for line in lines[2:6]}) == 1  # columns stand below each other
        assert "agree with the sums of 6 shards" in shown
        assert ": 24 latents of 3x4x4 (moments, float16)" in lines[0]
        assert all(title in shown for title in ("noise: ", "mean σ: ", "next ρ: ", "KL nats: "))
    else:
        assert "of 20 codes" in shown
        assert ": 24 token maps of 3x4x4" in lines[0]
        assert "noise" not in shown
    assert "classes" in shown
    page = (output / "index.html").read_text()
    assert page.count("<svg") == page.count('role="img"') == (5 if kind == "latents" else 2)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    report = json.loads((output / "stats.json").read_text())
    assert report["samples"] == 24
    assert cli.main(["latents", "stats", str(path), "--output", str(output)]) == 0  # again
    capsys.readouterr()
    assert cli.main(["latents", "stats", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == report["labels"]


def test_the_page_is_not_put_into_the_set(latents, capsys):
    before = sorted(latents.iterdir())
    assert cli.main(["latents", "stats", str(latents), "--output", str(latents)]) == EXIT_USER_ERROR
    assert "holds latents or is a file; give another folder" in capsys.readouterr().err
    assert sorted(latents.iterdir()) == before
