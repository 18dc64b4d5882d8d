"""What makes resuming exact: no generator state is stored, the order is a function of the step, steps are whole."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_vae import config as configuration
from ldm_vae.errors import UserError
from ldm_vae.training.loader import Plan, Span, batches
from ldm_vae.training.run_directory import RunDirectory
from ldm_vae.training.trainer import fit, make_accelerator
from tests.training import faults, toy
from tests.training.test_kills import assert_identical, state_of


class ManySamples(toy.ToySamples):
    """An epoch of 250 steps. Making one uses up numbers of every global generator, another count in each attempt."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt

    def __len__(self):
        return 2000

    def sample(self, index, position, size):
        torch.rand(self.attempt)
        np.random.rand(self.attempt)  # noqa: NPY002 - the global generator is meant
        random.random()
        return super().sample(index % 20, position, size)


class DrawingModel(toy.ToyModel):
    """Logs a number from torch's global generator, as dropout would draw it."""

    def update(self, step, batch, engine):
        return super().update(step, batch, engine) | {"drawn": torch.rand(())}


class WatchfulModel(toy.ToyModel):
    """Notes after how many updates it was saved; no gradient may be under way then."""

    def __init__(self, config):
        super().__init__(config)
        self.updates, self.saved = 0, []

    def update(self, step, batch, engine):
        self.updates += 1
        return super().update(step, batch, engine)

    def tensors(self):
        assert all(parameter.grad is None for parameter in self.modules["net"].parameters())
        self.saved.append(self.updates)
        return {}


class LostModel(toy.ToyModel):
    """Its training is lost just before the finished model is published."""

    def export(self, engine, directory, metrics):
        raise RuntimeError("lost")


def train(output: Path, model_class: type[Any], samples: Any, plan: Plan, *overrides: str) -> Any:
    config = configuration.load(toy.ToyConfig, None, [f"output={output}", *overrides])
    accelerator = make_accelerator(config.training, output)
    model = model_class(config)
    assert fit(model, samples, plan, config.training, RunDirectory(output, config), accelerator) == 0
    return model


@pytest.mark.promise(1)
def test_other_generator_states_and_three_resumes_in_one_epoch_change_nothing(tmp_path, record_property):
    def attempt(output: Path, number: int, kill_at: int = -1) -> None:
        os.environ["TOY_KILL_AT"] = str(kill_at)
        torch.manual_seed(number)
        random.seed(number)
        train(output, DrawingModel, ManySamples(number), Plan((Span(20, 8, 4),)), "training.save_every=2")

    attempt(tmp_path / "whole", 0)
    os.environ.pop("TOY_KILL_AT")
    for number, kill_at in enumerate((5, 11, 18), start=1):
        outcome = faults.outcome(lambda n=number, k=kill_at: attempt(tmp_path / "killed", n, k), tmp_path / "told")
        assert outcome == (-signal.SIGKILL, "")
    assert faults.outcome(lambda: attempt(tmp_path / "killed", 4), tmp_path / "told") == (0, "")
    assert_identical(state_of(tmp_path / "killed"), state_of(tmp_path / "whole"))
    (saved, *_) = (tmp_path / "whole" / "checkpoints").iterdir()
    assert {path.stem for path in saved.iterdir()} == {"net", "net-ema", "net-optimizer", "state", "MANIFEST"}
    state = json.loads((saved / "state.json").read_text())
    assert not [name for name in [*state, *state["model"]] if "rng" in name or "generator" in name or "seed" in name]
    record_property("figure", "3 kills in one epoch, every global generator in another state each time, none stored: "
                    "bit-identical")  # fmt: skip


class Indices:
    def __len__(self):
        return 1000

    def sample(self, index, position, size):
        return {"index": index}


def test_a_finished_run_that_was_made_longer_and_lost_before_its_end_is_not_finished(tmp_path):
    """Its last checkpoint is there, and what the first attempt published, which is not the model of this one."""
    for steps, model_class in ((4, toy.ToyModel), (8, LostModel), (8, toy.ToyModel)):
        with pytest.raises(RuntimeError, match="lost") if model_class is LostModel else contextlib.nullcontext():
            train(tmp_path, model_class, toy.ToySamples(), Plan((Span(steps, 8, 8),)), f"steps={steps}")
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 8


class RemovedModel(toy.ToyModel):
    """While it trains, its folder is removed, and another run of other settings begins and ends there."""

    def update(self, step, batch, engine):
        if step == 6:
            shutil.rmtree(self.config.output)
            self.outcome = faults.outcome(
                lambda: train(Path(self.config.output), toy.ToyModel, toy.ToySamples(), PLAN, OTHER),
                Path(self.config.output).with_name("log"),
            )
        return super().update(step, batch, engine)


PLAN, OTHER = Plan((Span(12, 8, 8),)), "training.learning_rate=0.02"


@pytest.mark.promise(11)
@pytest.mark.parametrize("save_every", [5, 100])
def test_a_run_whose_folder_was_taken_over_publishes_nothing_there(tmp_path, save_every):
    """A stopped job must not write its weights into the run that began there meanwhile."""
    output = tmp_path / "run"
    with pytest.raises(UserError, match=r"was removed, replaced or unmounted while in use \(run\.lock is not"):
        train(output, RemovedModel, toy.ToySamples(), PLAN, f"training.save_every={save_every}")
    train(tmp_path / "undisturbed", toy.ToyModel, toy.ToySamples(), PLAN, OTHER)
    assert_identical(state_of(output), state_of(tmp_path / "undisturbed"))
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "undisturbed/model.safetensors").read_bytes()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(tmp_path, toy.ToyModel, toy.ToySamples(), PLAN)
    text = (tmp_path / "config.yaml").read_text()
    assert "learning_rate: 0.01" in text
    (tmp_path / "config.yaml").write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    longer = Plan((Span(14, 8, 8),))
    with pytest.raises(UserError, match=r"step-000000012: holds a run with other settings: training.learning_rate"):
        train(tmp_path, toy.ToyModel, toy.ToySamples(), longer, OTHER, "steps=14")


def visited(steps: int, processes: int) -> list[int]:
    """The samples in the order of the global batches, as so many processes load them."""
    plan = Plan((Span(steps, 8, 8 // processes),))
    loaders = [batches(Indices(), plan, seed=3, rank=rank, processes=processes) for rank in range(processes)]
    return [i for step in zip(*loaders) for batch in step for part in batch.parts for i in part["index"].tolist()]


@pytest.mark.promise(1)
@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_order_is_a_function_of_seed_and_step_on_any_number_of_processes(steps, record_property):
    one = visited(steps, 1)
    assert len(one) == 8 * steps
    for processes in (2, 4, 8):
        assert visited(steps, processes) == one
    epochs = [one[first : first + 1000] for first in range(0, len(one), 1000)]
    assert all(sorted(epoch) == list(range(1000)) for epoch in epochs)
    record_property("figure", f"{steps} steps: the same samples on 1, 2, 4 and 8 processes, each of 1000 once in "
                    f"{len(epochs)} epochs")  # fmt: skip


@pytest.mark.promise(1)
@pytest.mark.parametrize("schedules", [4, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_checkpoint_is_never_inside_an_accumulation(tmp_path, schedules, record_property):
    choose, saves = random.Random(0), 0
    for number in range(schedules):
        spans = []
        for _ in range(choose.randrange(1, 4)):
            batch = choose.choice([2, 4, 6, 12])
            spans.append(
                Span(choose.randrange(1, 6), batch, choose.choice([n for n in range(1, batch + 1) if not batch % n]))
            )
        plan, every = Plan(tuple(spans)), choose.randrange(1, 8)
        model = train(tmp_path / str(number), WatchfulModel, toy.ToySamples(), plan, f"training.save_every={every}")
        assert model.saved == sorted({*range(every, plan.steps + 1, every), plan.steps})
        saves += len(model.saved)
    record_property(
        "figure", f"{schedules} schedules, {saves} checkpoints: all after a whole step, no gradient under way"
    )
