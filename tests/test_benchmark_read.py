from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks import latent_readers, read
from benchmarks.latent_readers import LIMIT, OURS, READERS
from ldm_vae.errors import UserError
from tools import record_results


@pytest.fixture(scope="module")
def moments() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((192, 8, 64, 64), np.float32).astype(np.float16)


def test_every_reader_is_measured_in_every_cell_and_the_result_can_be_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_readers, "SHARD", 64)
    words = [str(tmp_path / "result"), "--rounds", "2", "--samples", "192", "--seconds", "0.005"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/__main__.py", "read", *words])
    words += ["--files", str(tmp_path)]
    benchmark.run_subject("read", words)
    text = (tmp_path / "result" / "results.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]  # no sample is left behind
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert found["missing"] == {}
    measured = {(one["content"], one["size"], one["order"], one["reader"]): one for one in found["measured"]}
    names = {"moments": set(READERS) - {LIMIT}, "latents": set(READERS)}
    for size, order in (("single", "sequential"), ("single", "random"), ("batch", "sequential"), ("batch", "random")):
        assert {name for *cell, name in measured if cell == ["moments", size, order]} >= names["moments"]
        if order == "random":
            assert {name for *cell, name in measured if cell == ["latents", size, order]} == names["latents"]
    assert all(one["samples_per_second"] > 0 and len(one["rounds"]) == 2 for one in found["measured"])
    assert measured["moments", "batch", "random", LIMIT]["fraction_of_limit"] == [1, 1, 1]
    assert all(name in text for name in READERS)
    assert text.count("| over webdataset, tar of `.npy`, ") == 2
    assert "| posterior samples over the arithmetic" in text

    page = tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n")
    monkeypatch.setattr(record_results, "BENCHMARKS", page)
    monkeypatch.setattr(sys, "argv", ["record_results.py", "Reading latents", str(tmp_path / "result")])
    record_results.main()
    assert "## Reading latents\n\nStored moments: samples per second" in page.read_text()
    assert "- command: `python -m benchmarks read result --rounds 2 --samples" in page.read_text()
    with pytest.raises(UserError, match="holds results already"):
        benchmark.run_subject("read", words)


def test_a_package_that_is_not_there_is_a_row_that_says_so(tmp_path, monkeypatch, moments):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    name = "webdataset, tar of `.npy`"
    chosen = {key: READERS[key] for key in (OURS, name, "plain `np.memmap`", LIMIT)}
    monkeypatch.setattr(latent_readers, "READERS", chosen)
    readers, missing = latent_readers.open_readers(tmp_path, moments)
    assert missing == {name: "webdataset is not installed"}
    found = read.summary(read.measure_all(readers, 2, 0.001), missing)
    found |= {"samples": 192, "rounds": 2, "seconds": 0.001}
    assert f"| {name} | webdataset is not installed |" in read.text(found)


def test_fractions_and_ratios_are_of_the_same_round():
    sizes = {"single": (30.0, 15.0), "batch": (60.0, 30.0)}
    rates = {
        cell: {OURS: [ours, 2 * ours], "other": [other, 2 * other]}
        for cell in read.CELLS
        for ours, other in [sizes[cell.size]]
    }
    for cell in read.CELLS:
        if (cell.content, cell.size) != ("moments", "single"):
            rates[cell][LIMIT] = [120.0, 240.0]
    measured = read.summary(rates, {})["measured"]
    single = next(one for one in measured if (one["size"], one["reader"]) == ("single", "other"))
    assert single["fraction_of_limit"] == [0.125] * 3
    assert single["ours_over_this"] == [2.0] * 3
    assert single["samples_per_second"] == 22.5
    assert single["gigabytes_per_second"] == pytest.approx(22.5 * 65536e-9)


def test_a_reader_that_gives_other_samples_is_found(moments):
    def mixed_up(size: str, order: str) -> Iterator[torch.Tensor]:
        batches = torch.from_numpy(moments).split(64)
        return iter([batches[0], batches[2], batches[1]])

    def cut_short(size: str, order: str) -> Iterator[torch.Tensor]:
        return iter(torch.from_numpy(moments[:128]).split(64))

    with pytest.raises(AssertionError, match="wrong from 64 on"):
        latent_readers.check("mixed up", mixed_up, moments)
    with pytest.raises(AssertionError, match="128 samples"):
        latent_readers.check("cut short", cut_short, moments)


def test_posterior_samples_of_a_user_have_the_stored_moments():
    moments = torch.stack([torch.full((64, 64), value) for value in (3.0, -1.0, 0.0, 2.0)]).half()
    sample = next(read.drawn(iter([moments])))
    torch.testing.assert_close(sample.mean((1, 2)), torch.tensor([3.0, -1.0]), atol=0.2, rtol=0)
    torch.testing.assert_close(sample.std((1, 2)), torch.tensor([1.0, 2.718]), atol=0.2, rtol=0)


def test_a_rate_counts_the_samples_of_batches_in_wall_time():
    def slow() -> Iterator[torch.Tensor]:
        while True:
            time.sleep(0.002)
            yield torch.zeros(1)

    assert 0 < read.rate_of(slow(), 64, 0.01) <= 64 / 0.002


@pytest.mark.parametrize(
    ("samples", "rounds", "message"), [(100, 5, "whole batches"), (0, 5, "whole"), (64, 1, "spread")]
)
def test_settings_that_measure_nothing_are_refused(tmp_path, samples, rounds, message):
    with pytest.raises(UserError, match=message):
        benchmark.run_subject("read", [str(tmp_path), "--samples", str(samples), "--rounds", str(rounds)])
