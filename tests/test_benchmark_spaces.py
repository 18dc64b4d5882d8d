from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as benchmark
from benchmarks import spaces as script


def test_multiplications_include_attention() -> None:
    query, weight = torch.randn(1, 2, 64, 32), torch.randn(32, 16)
    assert script.gigamacs(lambda: query @ weight) == pytest.approx(2 * 64 * 32 * 16 / 1e9)
    attention = script.gigamacs(lambda: F.scaled_dot_product_attention(query, query, query))
    assert attention == pytest.approx(2 * 2 * 64 * 64 * 32 / 1e9)


def test_pixels_have_64_times_the_tokens_and_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "REPETITIONS", 1)
    found = {name: script.measure_space(name, 128, "tiny") for name in script.SPACES}
    assert {name: row["tokens"] for name, row in found.items()} == {
        "latents": 16,
        "pixels": 1024,
        "pixels, coarse": 16,
    }
    assert 50 < found["pixels"]["gigamacs"] / found["latents"]["gigamacs"] < 70
    again = (script.measure_space("latents", 128, "tiny") for _ in range(8))  # others may take the processor
    rows = chain([found["latents"]], again)
    assert any(found["pixels"]["sampling_seconds"] > row["sampling_seconds"] for row in rows)
    coder = script.measure_autoencoder(64, "pico")
    assert coder["decoding_gigamacs"] > coder["encoding_gigamacs"] > 0 < coder["decoding_seconds"]


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own() -> None:
    """Weights, gradients and two moments at least; in this process freed memory would be used again."""
    found = script.in_fresh_process("latents", 64, "tiny")
    weights = 4 * found["parameters"] / 2**20
    assert found["sampling_megabytes"] > weights
    assert found["training_megabytes"] > 4 * weights
    assert found["training_megabytes"] > found["sampling_megabytes"]


def test_what_was_measured_is_written_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "parameters": 10, "tokens": 16, "gigamacs": 1.0, "sampling_seconds": 0.5, "sampling_megabytes": 10.0,
        "training_seconds": 2.0, "training_megabytes": 100.0, "threads": 1,
    }  # fmt: skip
    coder = {f"{what}_{unit}": 3.0 for what in ("encoding", "decoding") for unit in ("gigamacs", "seconds")}
    many = {"pixels": 64.0, "latents": 1.0, "pixels, coarse": 1.5}

    def pretend(what: str, size: int, preset: str) -> dict[str, Any]:
        return coder if what == "autoencoder" else row | {"gigamacs": many[what] * size}

    monkeypatch.setattr(script, "in_fresh_process", pretend)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "spaces", str(tmp_path / "out"), "--sizes", "128", "64"])
    assert benchmark.main() == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [each["size"] for each in found["spaces"]] == [64] * 3 + [128] * 3
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| 64x64 | latents | 16 | 64.00 | 2.000 s | 0.500 s | 100 MB | 10 MB | 18.0 s |" in text
    assert "| 64x64 | pixels | 16 | 4096.00 (64.0x) | 2.000 s (1.0x) |" in text
    assert "100 MB (1.0x) | 10 MB | 15.0 s |" in text
    assert (tmp_path / "out" / "spaces.svg").read_text().count("pixels, coarse") == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["command"]
    assert benchmark.main() == 2  # holds results already


@pytest.mark.slow
def test_the_script_measures_in_fresh_processes(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "benchmarks",
        "spaces",
        tmp_path / "out",
        "--sizes",
        "64",
        "--preset",
        "tiny",
        "--autoencoder",
        "pico",
    ]
    subprocess.run(words, check=True, timeout=300)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["spaces"]) == 3


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks", "spaces", tmp_path / "out", "--sizes", "100"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stderr.count("multiples of 64")) == (2, 1)
    assert not (tmp_path / "out").exists()
