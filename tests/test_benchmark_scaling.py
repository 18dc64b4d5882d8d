from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling as script
from ldm_vae.errors import UserError


def test_the_exponent_of_a_power() -> None:
    square = {str(side): 0.1 * side**2 for side in (16, 32, 64)}
    assert script.exponent(square) == pytest.approx(2)
    assert script.exponent(square, power=2) == pytest.approx(1)


def test_the_rate_of_a_training_leaves_its_start_out(tmp_path: Path) -> None:
    rates = [1.0, 4.0, 6.0, 5.0]
    lines = [json.dumps({"step": i, "time/images_per_second": rate}) for i, rate in enumerate(rates)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": 3, "held_out/psnr": 20.0})]))
    assert script.rate_of(tmp_path / "metrics.jsonl") == 5.0


def test_peak_memory_is_that_of_the_program_and_its_failure_is_told() -> None:
    program = "import sys, time; block = bytes([1]) * (int(sys.argv[1]) << 20); time.sleep(1)"
    small, large = (script.peak_of([sys.executable, "-c", program, str(size)]) for size in (1, 64))
    assert large - small > 60
    with pytest.raises(UserError, match="failed with 3"):
        script.peak_of([sys.executable, "-c", "import sys; sys.exit(3)"])


def test_cost_is_measured_over_size_and_batch() -> None:
    arguments = argparse.Namespace(sizes=[16, 128], batches=[1, 2], rounds=1, preset="pico")  # 64 times the work
    found = script.measure_passes(arguments)
    assert found["size"].keys() == {"16", "128"}
    assert found["batch"].keys() == {"1", "2"}
    assert found["size"]["128"] > found["size"]["16"]


def test_what_was_measured_is_judged() -> None:
    found: dict[str, Any] = {
        "preset": "pico", "shared_images": 8, "size": 64, "steps": 4, "rounds": 1, "tiled": 512,
        "processes": {"encoding": {"1": [10.0], "2": [19.0]}, "training": {"1": [10.0], "2": [15.0]}},
        "passes": {"size": {"64": 1.0, "128": 4.0}, "batch": {"1": 1.0, "2": 4.0}},
        "sets": [
            {"images": 8, "seconds": 1.0, "megabytes": 500.0}, {"images": 80, "seconds": 10.0, "megabytes": 510.0},
        ],
        "tiled_decoding": {"megabytes": 1000.0, "seconds": 1.0},
    }  # fmt: skip
    lines = script.text(found).splitlines()
    missed = [line for line in lines if line.endswith("**missed** |")]
    assert [line.split(" | ")[0] for line in missed] == [
        "| 2 processes over 1, training", "| 1 over the exponent of cost over images of a batch",
    ]  # fmt: skip


@pytest.mark.slow
def test_everything_is_measured_in_processes_of_its_own(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    script.add_arguments(parser)
    words = "--sizes 16 32 --batches 1 2 --images 8 --size 64 --shared-images 64 --steps 8 --tiled 512 --rounds 1"
    found = script.measure(parser.parse_args([*words.split(), "--preset", "pico"]), print)
    assert all(rates[0] > 0 for job in found["processes"].values() for rates in job.values())
    assert [one["images"] for one in found["sets"]] == [8, 80]
    assert found["tiled_decoding"]["megabytes"] > 100
    assert "# Scaling" in script.text(found)
