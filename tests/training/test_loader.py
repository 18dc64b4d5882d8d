"""The order of samples, learning rates and batches as pure functions of the step."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from ldm_vae.training.loader import InOrder, Plan, Span, batches, learning_rate, rank_rows
from tests.training.toy import ToySamples

PLAN = Plan((Span(3, 8, 2), Span(4, 4, 2, size=16)))


class Positions:
    """Samples that say who they are."""

    def __len__(self):
        return 10

    def sample(self, index, position, size):
        return {
            "index": index,
            "position": position,
            "size": size or 0,
            "rejected": [("x", "y")] if position == 3 else [],
        }


def seen(first_step=0, rank=0, processes=1, workers=0):
    found = []
    for batch in batches(
        Positions(), PLAN, seed=0, first_step=first_step, rank=rank, processes=processes, workers=workers
    ):
        found.append([(int(i), int(p)) for part in batch.parts for i, p in zip(part["index"], part["position"])])
    return found


def test_every_epoch_visits_each_sample_once_in_a_new_order():
    indices = [index for step in seen() for index, _ in step]
    epochs = [indices[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


class Backwards:
    count = 10

    def __call__(self, position):
        return 9 - position % 10


def test_samples_may_bring_their_order():
    found = [index for batch in batches(InOrder(Positions(), Backwards()), PLAN, seed=0) for part in batch.parts
             for index in part["index"].tolist()]  # fmt: skip
    assert found == [9 - position % 10 for position in range(3 * 8 + 4 * 4)]


def test_positions_run_on_through_the_spans():
    positions = [position for step in seen() for _, position in step]
    assert positions == list(range(3 * 8 + 4 * 4))
    sizes = [int(part["size"][0]) for batch in batches(Positions(), PLAN, seed=0) for part in batch.parts]
    assert sizes == [0] * 12 + [16] * 8


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_starting_at_the_step(workers):
    assert seen(first_step=2, workers=workers) == seen()[2:]


def test_processes_share_each_step_without_overlap():
    whole, halves = seen(), [seen(rank=rank, processes=2) for rank in range(2)]
    assert [first + second for first, second in zip(*halves)] == whole
    assert rank_rows(8, 2, rank=1, processes=2) == [slice(4, 6), slice(6, 8)]


def test_augmentation_does_not_depend_on_workers():
    plan = Plan((Span(3, 4, 4),))
    first, second = ([b.parts[0]["x"] for b in batches(ToySamples(), plan, seed=0, workers=w)] for w in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_lists_of_samples_are_joined():
    first = next(iter(batches(Positions(), PLAN, seed=0)))
    assert [item for part in first.parts for item in part.data["rejected"]] == [("x", "y")]


def test_the_learning_rate_is_a_function_of_the_step():
    rates = [learning_rate(step, 100, peak=1.0, warmup_steps=10, final_fraction=0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert sorted(rates[10:], reverse=True) == rates[10:]


FAILING = """
import sys
from ldm_vae.errors import UserError
from ldm_vae.training.loader import batches
from ldm_vae.training.loader import Plan, Span

class Failing:
    def __len__(self):
        return 10

    def sample(self, index, position, size):
        raise {error}

def main():
    try:
        for _ in batches(Failing(), Plan((Span(4, 4, 2),)), seed=0, workers=2):
            pass
    except UserError as error:
        print("one sentence:", error)
        return 2

sys.exit(main())
"""


@pytest.mark.parametrize(("error", "code"), [("UserError('data: nothing to read')", 2), ("ValueError('a mistake')", 1)])
def test_an_error_in_a_worker_ends_the_program(error, code):
    """torch alone would wait for its workers for ever."""
    words = [sys.executable, "-c", FAILING.format(error=error)]
    job = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert job.returncode == code
    assert (job.stdout == "one sentence: data: nothing to read\n") == (code == 2)
    assert ("ValueError: a mistake" in job.stderr) == (code == 1)


LOST = """
import os, signal, sys, time
from ldm_vae.errors import UserError
from ldm_vae.training.loader import batches
from ldm_vae.training.loader import Plan, Span

class Lost:
    def __len__(self):
        return 10

    def id(self, index):
        return str(index)

    def sample(self, index, position, size):
        {fault}

try:
    for _ in batches(Lost(), Plan((Span(4, 4, 2),)), seed=0, workers=1, timeout_seconds=5):
        pass
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.promise(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("time.sleep(1000)", "data: no batch from the loading processes (DataLoader timed out after 4.0 seconds)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "data: a loading process was killed (DataLoader worker (pid"),
    ],
)
def test_a_worker_that_hangs_or_is_killed_ends_the_program(fault, sentence, record_property):
    words = [sys.executable, "-c", LOST.format(fault=fault)]
    started = time.monotonic()
    job = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert job.returncode == 2, job.stderr
    assert job.stdout.startswith(sentence)
    assert ('File "<string>", line 15 in sample' in job.stderr) == (fault == "time.sleep(1000)")  # where it hangs
    seconds = time.monotonic() - started
    record_property("figure", f"a loading process, {fault}: one sentence, exit 2, {seconds:.0f} s with the imports")
