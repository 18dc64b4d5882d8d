"""A number that is not finite reaches no checkpoint: its update is left out, counted and told, in every process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm_vae.errors import UserError
from ldm_vae.training.loader import Plan, Span
from ldm_vae.training.monitor import SPIKE_FROM, History, StabilityChecks, sample_names
from tests.training import ailing, toy
from tests.training import test_resuming as resuming
from tests.training.ailing import MODULES, ONCE, Named, train

AILING = Path(ailing.__file__)
FAULTS = [f"{2 * number + 2}:{module}:{kind}" for number, (module, kind) in enumerate(
    (module, kind) for kind in ONCE for module in MODULES)]  # fmt: skip
"""Every kind of fault in every module, in every other step."""


def saved_tensors(output: Path) -> list[torch.Tensor]:
    files = list(output.glob("checkpoints/step-*/*.safetensors"))
    assert files
    return [tensor for file in files for tensor in load_file(file).values()]


def assert_finite(output: Path) -> None:
    assert all(tensor.isfinite().all() for tensor in saved_tensors(output) if tensor.is_floating_point())


def alarms(output: Path, verdict: str) -> list[str]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["alarm"] for line in lines if line.get("verdict") == verdict]


def skipped_updates(output: Path) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["optim/skipped_updates"] for line in lines if "optim/skipped_updates" in line]


def left_out(trace: list[torch.Tensor]) -> set[int]:
    """The steps, counted from 1, that changed no weight."""
    return {step for step in range(1, len(trace)) if torch.equal(trace[step - 1], trace[step])}


def half_precision_on_cpu(accelerator) -> None:
    """What `training.precision=fp16` makes on a GPU, with torch's scaler for the CPU, which starts 2^5 too high."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21, growth_interval=10**6)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.promise(8)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updates_with_a_number_that_is_not_finite_are_left_out(tmp_path, record_property, precision):
    model = train(tmp_path / "run", f"faults={json.dumps(FAULTS)}", f"training.precision={precision}")
    for name in MODULES:
        asked = {int(fault.split(":")[0]) for fault in FAULTS if f":{name}:" in fault}
        assert left_out(model.trace[name]) == asked
    assert_finite(tmp_path / "run")
    assert skipped_updates(tmp_path / "run")[-1] == len(FAULTS)
    record_property("figure", f"{len(FAULTS)} faults of {len(ONCE)} kinds in 2 modules, {precision}: weights finite")


@pytest.mark.promise(8)
def test_a_scaler_in_half_precision_finds_its_scale_and_faults_cost_their_step_only(tmp_path, record_property):
    """fp16 autocast and a scaler that starts far too high: the first updates overflow until it is low enough."""
    faults = ["17:decoder:loss_nan", "19:judge:gradient_inf"]
    words = (f"faults={json.dumps(faults)}", "steps=24", "training.log_every=24")
    model = train(tmp_path / "run", *words, prepare=half_precision_on_cpu)
    for name, fault in (("decoder", 17), ("judge", 19)):
        steps = left_out(model.trace[name])
        assert fault in steps
        overflow = sorted(steps - {fault})
        assert 0 < len(overflow) < 10
        assert overflow == list(range(1, len(overflow) + 1)), "overflow is at the start only"
    assert_finite(tmp_path / "run")
    assert not alarms(tmp_path / "run", "update_skipped")  # looking for the scale is no alarm
    record_property(
        "figure", f"fp16 with a scaler, on CPU: {len(overflow)} overflows, then only the 2 faulty updates left out"
    )


@pytest.mark.promise(8)
def test_a_skip_names_step_samples_and_norm(tmp_path):
    train(tmp_path / "run", 'faults=["5:judge:gradient_inf", "6:judge:loss_nan"]')
    (sentence,) = alarms(tmp_path / "run", "update_skipped")
    names = sample_names(Named(), Plan((Span(24, 8, 8),)), 0, 6)
    assert names.startswith("samples photo-")
    assert names.endswith("and 2 more")
    assert sentence == (
        "2 updates of the judge left out, the last in step 6: loss or gradient was not finite (gradient norm nan; "
        f"{names})"
    )
    assert skipped_updates(tmp_path / "run") == [2.0, 2.0, 2.0]


@pytest.mark.promise(8)
@pytest.mark.parametrize("log_every", [8, pytest.param(1000, marks=pytest.mark.slow)])
def test_twenty_in_a_row_stop_the_run_with_advice(tmp_path, record_property, log_every):
    faults = json.dumps([f"{step}:judge:gradient_nan" for step in range(11, 60)])
    words = (f"faults={faults}", "steps=60", f"training.log_every={log_every}", "training.save_every=10")
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", *words)
    step = {8: 32, 1000: 40}[log_every]
    assert str(caught.value).startswith(
        f"step {step}: loss or gradient of the judge was not finite in {step - 10} steps in a row (gradient norm nan; "
        "samples photo-"
    )
    assert "a lower training.learning_rate" in str(caught.value)
    assert_finite(tmp_path / "run")
    record_property("figure", f"stopped after {step - 10} in a row with training.log_every={log_every}")


@pytest.mark.promise(8)
@pytest.mark.parametrize("kind", ["weight_nan", "moment_nan"])
def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path, record_property, kind):
    with pytest.raises(UserError, match=r"step 16: \S+ tensor .* is not finite, so nothing was saved"):
        train(tmp_path / "run", f'faults=["12:decoder:{kind}"]')
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000008"]
    assert_finite(tmp_path / "run")
    record_property("figure", f"{kind}: the checkpoint was refused, the one before is intact")


@pytest.mark.promise(8)
def test_two_processes_leave_out_the_same_update(tmp_path, record_property):
    """The fault is in one process only."""
    faults = ["3:decoder:loss_nan:1", "5:judge:loss_inf:0", "7:decoder:gradient_inf:1"]
    result = run_in_two(tmp_path / "run", f"faults={json.dumps(faults)}", "steps=8", "training.log_every=2")
    assert result.returncode == 0, result.stderr[-2000:]
    assert skipped_updates(tmp_path / "run") == [1.0, 2.0, 3.0]
    assert [sentence.split(":")[0] for sentence in alarms(tmp_path / "run", "update_skipped")] == [
        "1 update of the decoder left out, the last in step 3",
        "1 update of the judge left out, the last in step 5",
        "1 update of the decoder left out, the last in step 7",
    ]
    assert_finite(tmp_path / "run")
    listed = (tmp_path / "run" / "quarantine.jsonl").read_text()  # an image that only the second process met
    assert json.loads(listed) == {"id": "damaged.png", "reason": "undecodable"}
    record_property("figure", "2 processes, 3 faults in one of them: left out in both at the same step")


def run_in_two(output: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(AILING)]
    variables = os.environ | {"PYTHONPATH": str(AILING.parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, str(output), *words], env=variables, capture_output=True, text=True, timeout=280)


@pytest.mark.promise(8)
def test_a_spike_of_the_loss_is_told_with_its_step_and_samples(tmp_path, record_property):
    train(tmp_path / "run", 'faults=["150:judge:loss_spike"]', "steps=160", "training.save_every=160")
    (sentence,) = alarms(tmp_path / "run", "loss_spike")
    assert sentence.startswith("the loss of the judge was 50 in step 150, ")
    assert "standard deviations above its average of" in sentence
    assert "samples photo-" in sentence
    assert not skipped_updates(tmp_path / "run")
    record_property("figure", "1 spike in 160 steps: found, and nothing else called one")


def test_a_noisy_loss_is_no_spike_and_an_outlier_does_not_hide_the_next():
    history, rng = History(), torch.Generator().manual_seed(0)
    losses = (1 + 0.3 * torch.randn(5000, generator=rng)).tolist()
    for step, loss in enumerate(losses, start=1):
        history.update(step, loss, 1.0)
    assert history.spike is None
    assert history.average == pytest.approx(1.0, abs=0.15)
    for step, loss in ((6000, 9.0), (6001, 1.0), (6002, 8.0)):
        history.spike = None
        history.update(step, loss, 1.0)
        assert (history.spike is not None) == (loss > 2)
    assert History(seen=SPIKE_FROM - 1, average=1.0, variance=0.01).spike is None


class Steep(toy.ToyModel):
    """Its loss is a hundred times as high from a step on, as where a phase adds a term."""

    def update(self, step, batch, engine):
        backward = engine.backward
        engine.backward = lambda loss: backward(loss * (100 if step >= SPIKE_FROM + 20 else 1))
        try:
            return super().update(step, batch, engine)
        finally:
            engine.backward = backward


@pytest.mark.parametrize("spans", [(SPIKE_FROM + 20, 20), (SPIKE_FROM + 40,)])
def test_the_loss_of_a_new_phase_is_no_spike(tmp_path, spans):
    plan = Plan(tuple(Span(steps, 8, 8) for steps in spans))
    resuming.train(tmp_path, Steep, toy.ToySamples(), plan, f"steps={plan.steps}")
    assert len(alarms(tmp_path, "loss_spike")) == (0 if len(spans) == 2 else 1)


def test_what_was_counted_survives_a_checkpoint():
    numbers = StabilityChecks(["net"])
    for step, norm in enumerate([1.0, math.nan, math.inf, 2.0, math.nan], start=1):
        numbers.add("net", step, torch.tensor(0.5), torch.tensor(norm))
    numbers.collect(lambda values: values)
    state = json.loads(json.dumps(numbers.state_dict(), allow_nan=False))
    again = StabilityChecks(["net"])
    again.load_state_dict(state)
    assert again.histories == numbers.histories
    assert again.metrics() == {"optim/skipped_updates": 3.0}
    assert again.histories["net"].in_a_row == 1
    assert [event.count for event in again.take_alarms()] == [3]
    assert again.take_alarms() == []
