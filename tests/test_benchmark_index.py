from __future__ import annotations

import json
import subprocess
import sys


def test_a_simulated_set_opens_and_is_measured(tmp_path):
    words = [sys.executable, "-m", "benchmarks", "index", tmp_path / "results", "--sets", "1000/16"]
    subprocess.run(words, check=True, timeout=240)
    (found,) = json.loads((tmp_path / "results" / "results.json").read_text())["sets"]
    assert (found["samples"], found["shards"], found["index_files"]) == (1000, 63, 1)
    assert found["index_bytes"] > 63 * (5 * 8 + 32 + 3 * 4 * 8)
    assert 0 < found["open_seconds"] < 30
    assert found["memory_megabytes"] > 0
    assert "| 1,000 | 16 | 63 |" in (tmp_path / "results" / "results.md").read_text()
    again = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert (again.returncode, again.stderr.count("holds results already")) == (2, 1)


def test_sizes_that_are_none_are_refused(tmp_path):
    words = [sys.executable, "-m", "benchmarks", "index", tmp_path / "results", "--sets", "1000"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stderr.count("'1000' is not SAMPLES/SHARD_SIZE")) == (2, 1)
