"""A ten-line model for the engine's tests: a small convolution that learns to copy, with noise and two processes.

Run as a script it trains: `python toy.py OUTPUT [key=value ...]`; keys: steps, micro, save_every, broken, nan_at.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from ldm_vae import config as configuration
from ldm_vae.random import generator, numpy_rng
from ldm_vae.training.loader import Plan, Span
from ldm_vae.training.run_directory import ModelKeys, RunDirectory
from ldm_vae.training.trainer import TrainingConfig, fit, make_accelerator


def toy_training() -> TrainingConfig:
    return TrainingConfig(
        learning_rate=0.01, warmup_steps=2, precision="fp32", device="cpu", workers=0, log_every=3, save_every=5,
        validate_every=10**6, preview_every=10**6, tracker="none",
    )  # fmt: skip


@dataclass(frozen=True)
class ToyConfig:
    output: str = "???"
    steps: int = 12
    batch: int = 8
    micro: int = 8
    broken: bool = False
    nan_at: int = -1
    training: TrainingConfig = field(default_factory=toy_training)

    KEYS: ClassVar[ModelKeys] = ModelKeys(may_change=("steps",), memory=("micro", "size"))


class ToySamples:
    def __len__(self) -> int:
        return 20

    def sample(self, index, position, size):
        flip = numpy_rng(0, "augment", position).random() < 0.5
        x = torch.linspace(-1, 1, 3 * 16).reshape(3, 4, 4) * (index + 1) / 20
        return {"x": x.flip(-1) if flip else x}

    def id(self, index):
        return f"sample {index}"


class Bare:
    """What a model of the tests has nothing to say about."""

    def alarms(self, step, metrics):
        return []

    def tensors(self):
        return {}

    def validate(self, engine):
        return {}

    def preview(self, engine):
        return None

    def state_dict(self):
        return {}

    def check_state(self, state, step):
        pass

    def load_state_dict(self, state, tensors, step):
        pass


class ToyModel(Bare):
    def __init__(self, config: ToyConfig) -> None:
        torch.manual_seed(0)
        self.config = config
        self.optimizer_settings = {}
        self.modules = {"net": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))}

    def update(self, step, batch, engine):
        if step == int(os.environ.get("TOY_KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        model = engine.modules["net"] if self.config.broken else engine.models["net"]  # broken: past the wrapper
        noise = torch.randn(batch.global_size, 3, 4, 4, generator=generator(0, "noise", step))
        total = 0.0
        for part in engine.parts(batch):
            loss = (model(part["x"] + 0.1 * noise[part.rows]) - part["x"]).square().mean()
            engine.backward(loss * float("nan") if step == self.config.nan_at else loss)
            total = total + loss.detach() / len(batch.parts)
        return {"loss/copy": total, "optim/grad_norm": engine.optimize("net", step)}

    def export(self, engine, directory, metrics):
        from safetensors.torch import save_file

        save_file(engine.emas["net"].module.state_dict(), directory / "ema.safetensors")
        save_file(engine.modules["net"].state_dict(), directory / "model.safetensors")


def main(output: str, *overrides: str) -> int:
    config = configuration.load(ToyConfig, None, [f"output={output}", *overrides])
    accelerator = make_accelerator(config.training)
    run = RunDirectory(config.output, config, main_process=accelerator.is_main_process)
    plan = Plan((Span(config.steps, config.batch, config.micro),))
    return fit(ToyModel(config), ToySamples(), plan, config.training, run, accelerator)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*sys.argv[1:]))
