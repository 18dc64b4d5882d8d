"""A process of an encoding job dies or hangs: the job ends and says which, and the rerun gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.latents.test_encode import contents
from tests.training.mishap import ROOT, start
from tests.training.test_ranks import BUSY_SECONDS, DOCUMENTED_SECONDS, MISHAPS, TIMEOUT_SECONDS, names_the_rank

SCRIPT = ROOT / "scripts" / "encode_dataset.py"
MORE = (
    "data.source=synthetic", "data.path=", "data.synthetic.count=120", "data.synthetic.resolution=64", "batch=2",
    "shard_size=2",
)  # fmt: skip
FORWARD_PASS = 200
"""After some shards; each module called counts as one."""


@pytest.fixture(scope="module")
def whole(encode, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "set"
    assert encode(path, *MORE) == 0
    return path


@pytest.mark.promise(3)
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mishap", MISHAPS)
def test_a_lost_process_ends_the_job_and_the_rerun_continues(
    encode, settings, whole, tmp_path, mishap, record_property
):
    output = tmp_path / "set"
    job = start(tmp_path / "job", SCRIPT, *settings, *MORE, f"output={output}", "workers=1",
                f"timeout_seconds={TIMEOUT_SECONDS}", launcher="torchrun", mishap=mishap,
                forward_pass=FORWARD_PASS)  # fmt: skip
    code = job.end(seconds=240)
    seconds = job.seconds_since_mishap()
    assert code != 0
    assert names_the_rank(job), job.output
    assert seconds < DOCUMENTED_SECONDS + BUSY_SECONDS, job.output
    made = len(list(output.glob("shard-*.jsonl")))
    assert made
    assert not (output / "manifest.json").exists()
    assert encode(output, *MORE) == 0
    assert contents(output) == contents(whole)
    record_property("figure", f"encoding, rank 1 {mishap}: ended after {seconds:.1f} s of a timeout of "
                              f"{TIMEOUT_SECONDS} s with {made} of 60 shards, the rerun is byte-identical")  # fmt: skip
