from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import dataset as script

SMALL = [
    "--size",
    "64",
    "--images",
    "9",
    "--preset",
    "pico",
    "--peer-preset",
    "tiny",
    "--rounds",
    "1",
    "--workers",
    "0",
]


@pytest.mark.slow
def test_ours_and_the_script_encode_and_everything_is_told(tmp_path: Path) -> None:
    output = tmp_path / "output"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "dataset", str(output), *SMALL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((output / "results.json").read_text())
    assert {name: len(values) for name, values in found["seconds"].items()} == {
        "ours, bf16": 1,
        "ours, fp32": 1,
        "script, fp32": 1,
    }
    assert all(0 < values[0] <= 1 for values in found["busy"].values())
    words = (output / "results.md").read_text()
    assert "time that the model is busy, ours, bf16" in words
    assert "hours a million images" in words


def test_the_script_saves_the_moments_of_each_file(tmp_path: Path) -> None:
    size_bytes = script.write_images(tmp_path / "images", 2, 64)
    files = sorted((tmp_path / "images").iterdir())
    assert size_bytes == sum(path.stat().st_size for path in files) / 2
    script.write_autoencoder(tmp_path / "kl", "sd", "tiny")
    assert script.Script(tmp_path / "kl", 64).run(files, tmp_path / "arrays") > 0
    arrays = [np.load(path) for path in sorted((tmp_path / "arrays").iterdir())]
    assert [array.shape for array in arrays] == [(8, 8, 8)] * 2
    assert not np.array_equal(*arrays)


def test_ours_is_the_command_s_own_job(tmp_path: Path) -> None:
    script.write_images(tmp_path / "images", 3, 64)
    script.write_autoencoder(tmp_path / "ours", "wavelet", "pico")
    record = script.encode(tmp_path / "ours", tmp_path, "fp32", argparse.Namespace(size=64, workers=0))
    assert record["images"] == 3
    assert record["images_per_second"] > 0 < record["model_busy"] <= 1
    assert (tmp_path / "latents" / "manifest.json").exists()


def test_a_slow_run_is_called_missed() -> None:
    found = {
        "size": 64, "images": 9, "peer_images": 1, "preset": "pico", "peer_preset": "tiny", "workers": 1, "rounds": 2,
        "bytes_per_image": 2000.0, "threads": 2, "busy": {"ours, bf16": [0.95, 0.93], "ours, fp32": [0.8, 0.9]},
        "seconds": {"ours, bf16": [0.1, 0.1], "ours, fp32": [0.2, 0.2], "script, fp32": [3.0, 3.0]},
    }  # fmt: skip
    lines = script.text(found).splitlines()
    missed = [line.split(" | ")[0] for line in lines if line.endswith("**missed** |")]
    assert missed == ["| time that the model is busy, ours, fp32", "| the script's time over ours, ours, fp32"]
    assert any(line.startswith("| ours, bf16 | 10 | 5 | 27.8 |") for line in lines)
