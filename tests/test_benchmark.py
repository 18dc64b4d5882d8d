"""The dispatcher of the benchmarks, its clock and its limits; each subject has a test of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

from benchmarks import __main__ as benchmark
from benchmarks import roof
from benchmarks.rounds import Ratio, alternating, bar, bars_table, ratio

ATTEMPTS = 8


def test_every_contestant_has_its_turn_first_and_the_warm_up_does_not_count():
    order: list[str] = []
    actions = {name: lambda name=name: order.append(name) for name in "abc"}
    found = alternating(actions, rounds=3)
    assert order == [*"abc", *"abc", *"bca", *"cab"]
    assert all(len(seconds) == 3 for seconds in found.values())


def test_a_turn_repeats_until_its_time_is_over_and_counts_a_single_call():
    calls: list[int] = []

    def action() -> None:
        calls.append(1)
        time.sleep(0.002)

    (seconds,) = alternating({"a": action}, rounds=1, seconds=0.3)["a"]
    assert len(calls) > 2  # the warm-up and more than one
    assert seconds >= 0.002


def test_ratios_are_taken_within_a_round():
    assert ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == Ratio(3.0, 2.5, 3.5)  # not the ratio of medians, 3.0 by chance
    assert ratio([1.0, 100.0, 1.0], [1.0, 10.0, 0.5]).median == 2.0  # medians alone would say 1
    assert str(ratio([3.0], [2.0])) == "1.50 [1.50, 1.50]"
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_a_bar_that_is_missed_says_so():
    lines = bars_table([bar("speed", 2.5, 2.0), bar("share", 50.0, 90.0, " %")])
    assert lines[2:] == ["| speed | 2.5x | 2x | reached |", "| share | 50 % | 90 % | **missed** |"]


def test_the_roof_counts_its_operations(monkeypatch):
    monkeypatch.setattr(roof, "SIDE", 8)
    from ldm_vae.runtime import gigamacs

    action, operations = roof.roof_action(torch.float32, batch=1)
    assert 2e9 * gigamacs(action) == pytest.approx(operations)


def test_an_image_is_taken_apart(tmp_path, monkeypatch):
    """What is longer comes out longer, if not each time: another program may take the processor in the middle."""

    def measured(out: Path) -> list[dict[str, float]]:
        words = [str(out), "--size", "64", "--steps", "2", "--preset", "tiny", "--autoencoder", "pico"]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "generate", *words, "--rounds", "2"])
        assert benchmark.main() == 0
        return json.loads((out / "results.json").read_text())["measured"]

    def is_plausible(one: dict[str, float]) -> bool:
        parts_fit = 0 < one["unet_step_seconds"] * 2 < one["image_seconds"] * 1.5 and 0 < one["decoding_share"] < 1
        return parts_fit and one["pixel_step_seconds"] > one["unet_step_seconds"]

    assert any(all(map(is_plausible, measured(tmp_path / str(attempt)))) for attempt in range(ATTEMPTS))
    assert "| fp32 |" in (tmp_path / "0" / "results.md").read_text()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "generate", str(tmp_path / "0")])
    assert benchmark.main() == 2  # holds results already


@pytest.mark.slow
def test_starting_is_measured_in_processor_time(tmp_path):
    benchmark.run_subject("startup", [str(tmp_path / "out"), "--rounds", "1"])
    seconds = json.loads((tmp_path / "out" / "results.json").read_text())["seconds"]
    assert seconds["ldm-vae --help"][0] < seconds["the bare imports"][0]


def test_an_unknown_subject_is_refused_with_those_there_are():
    words = [sys.executable, "-m", "benchmarks", "speed"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stderr.count("no subject 'speed'; give one of train,")) == (2, 1)


def test_help_lists_the_subjects_and_needs_no_heavy_package():
    program = "import sys; from benchmarks import __main__ as benchmark; print(benchmark.overview())"
    program += "; assert not {'torch', 'numpy'} & sys.modules.keys()"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert all(f"\n  {name} " in found.stdout for name in benchmark.SUBJECTS)
