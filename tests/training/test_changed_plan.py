"""What another number of steps does to each piece of a run's state, when the run continues.

What is a function of the step and the plan is what it would be, had the run been planned so from the start:

- learning rate: the cosine of the new plan. A finished run that is lengthened jumps back up to it, without a warm-up;
  the moments of AdamW are kept.
- phases: `Plan.span` of the step. Where batch sizes differ between phases, the position in the order of the samples
  jumps with their lengths: within that epoch some samples come twice or not at all.
- when to save, validate and preview: multiples of a step, and the new end.
- steps fewer than a run has behind it were reported as finished, and the record said the smaller number: refused now.

What was accumulated under another plan was wrong in two places, and is tested beside them:

- rate (`autoencoder/test_rate.py`): the sum of ln beta was divided by the window of the new plan, and the integral
  wound up while beta was locked. The rate and beta were wrong. Alarms of the rate were raised once for all plans.
- adversarial loss (`autoencoder/test_gan.py`): a run that became shorter met a discriminator that had not learned, with
  a weight that was not measured and a guard without a reference; one that became longer measured its ratio twice.

What does not depend on the plan: the moving averages (their decay is a function of the step, `sigma_rel` a share of the
run so far), the histories of losses, the gradient scaler. The snapshots of averages and the patience of the suggestion
to stop are shares of the run: the new one counts, below.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from ldm_vae import config as configuration
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.autoencoder.training import train_vae
from ldm_vae.diffusion.power_function_ema import EmaConfig, EmaSnapshots, std_to_exp
from ldm_vae.errors import UserError
from ldm_vae.training.loader import Plan, Span, learning_rate
from tests.training import toy
from tests.training.test_resuming import train


def logged(output) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["optim/lr"] for line in lines if "optim/lr" in line}


def test_the_learning_rate_is_that_of_the_new_plan(tmp_path):
    for steps in (6, 18, 30):
        train(tmp_path, toy.ToyModel, toy.ToySamples(), Plan((Span(steps, 8, 8),)), f"steps={steps}")
    config = toy.toy_training()
    settings = config.learning_rate, config.warmup_steps, config.final_learning_rate_fraction
    found = logged(tmp_path)
    assert found[30] == pytest.approx(config.learning_rate * config.final_learning_rate_fraction)
    for step, rate in found.items():
        assert rate == pytest.approx(learning_rate(step - 1, 6 if step <= 6 else 18 if step <= 18 else 30, *settings))


def test_fewer_steps_than_the_run_has_behind_it_are_refused(tmp_path):
    def attempt(steps: int) -> None:
        train(tmp_path, toy.ToyModel, toy.ToySamples(), Plan((Span(steps, 8, 8),)), f"steps={steps}")

    attempt(10)
    with pytest.raises(UserError, match="has finished 10 steps, and 7 were asked for; ask for 10"):
        attempt(7)
    attempt(10)  # finished: nothing to do
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 10


def test_a_run_whose_phases_change_goes_on_in_the_phase_of_its_step():
    small, large = Span(6, 8, 8, size=32), Span(4, 4, 4, size=64)
    longer = Plan((Span(9, 8, 8, size=32), large))
    assert [Plan((small, large)).span(7)[0].size, longer.span(7)[0].size] == [64, 32]
    assert [longer.span(step)[1] for step in (8, 9, 10)] == [64, 72, 76]  # positions without a gap within a plan


@pytest.mark.parametrize(("before", "stop", "after"), [(100, 100, 150), (100, 60, 80), (100, 60, 300)])
def test_the_last_snapshot_is_that_of_the_new_end(before, stop, after):
    class Run:
        def __init__(self, steps):
            self.steps = steps

    module, written, kept = nn.Linear(2, 2), [], {}
    first_weight = module.weight.detach().clone()
    for steps, first, last in ((before, 0, stop), (after, stop, after)):
        snapshots = EmaSnapshots(EmaConfig(lengths=(0.1,), snapshots=5), module, None)
        snapshots.load_state_dict({"written": written}, kept)
        for step in range(first, last):
            with torch.no_grad():
                module.weight += 1.0
            snapshots.update(step, Run(steps))
        written, kept = snapshots.written, snapshots.tensors()
    assert written[-1] == after
    assert written == sorted(set(written))
    gamma = std_to_exp(0.1)  # weights that grow by 1 a step have the mean (gamma + 1) / (gamma + 2) of their last value
    grown = kept["unet-power-0.1"]["weight"] - first_weight
    torch.testing.assert_close(grown, torch.full_like(grown, after * (gamma + 1) / (gamma + 2)), rtol=0.01, atol=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_training_that_becomes_longer_and_shorter_keeps_its_rate(tmp_path, record_property):
    """600 steps; lengthened to 1,000; taken up again at step 700 and shortened to 740."""
    words = [
        f"output={tmp_path}", "data.source=synthetic", "data.synthetic.count=600", "data.synthetic.resolution=64",
        "data.held_out=0.25", "autoencoder.preset=pico", "loss.perceptual=0", "crop.short_side_min=48",
        "held_out_images=2", "held_out_resolution=64", "training.precision=fp32", "training.device=cpu",
        "training.workers=0", "training.tracker=none", "training.warmup_steps=20", "training.ema_decay=0.95",
        "training.save_every=100", "training.keep_checkpoints=100", "training.preview_every=10000",
    ]  # fmt: skip
    rates = []
    for steps, taken_up_at in ((600, 0), (1000, 600), (740, 700)):
        for checkpoint in (tmp_path / "checkpoints").glob("step-*"):
            if int(checkpoint.name.removeprefix("step-")) > taken_up_at:
                shutil.rmtree(checkpoint)
        phases = f"phases=[{{steps: {steps}, crop: 32, batch: 8}}]"
        assert train_vae(configuration.load(TrainVaeConfig, None, [*words, phases])) == 0
        record = json.loads((tmp_path / "autoencoder" / "training.json").read_text())
        rates.append(record["held_out"]["held_out/nats_per_dim"])
    record_property("figure", f"held-out rates of 2.5 nats: {', '.join(f'{rate:.3f}' for rate in rates)}")
    assert rates == pytest.approx([2.5] * 3, rel=0.03)
