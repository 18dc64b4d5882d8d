"""A toy of two modules whose numbers break on request, for the tests of `training.numbers`.

Run as a script it trains in every process that a launcher starts: `python ailing.py OUTPUT [key=value ...]`.
A fault is `step:module:kind[:rank]`, steps counted from 1.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from ldm_vae import config as configuration
from ldm_vae.random import generator
from ldm_vae.training.loader import Plan, Span
from ldm_vae.training.run_directory import ModelKeys, RunDirectory
from ldm_vae.training.trainer import TrainingConfig, fit, make_accelerator
from tests.training.toy import Bare

MODULES = ("decoder", "judge")
ONCE = ("loss_nan", "loss_inf", "gradient_nan", "gradient_inf", "gradient_huge", "pixel_nan")
"""Faults of one step, which leave the weights as they are."""


def short_training() -> TrainingConfig:
    return TrainingConfig(
        learning_rate=0.01, warmup_steps=2, precision="fp32", device="cpu", workers=0, log_every=8, save_every=8,
        validate_every=10**6, preview_every=10**6, tracker="none",
    )  # fmt: skip


@dataclass(frozen=True)
class AilingConfig:
    output: str = "???"
    steps: int = 24
    faults: tuple[str, ...] = ()
    training: TrainingConfig = field(default_factory=short_training)

    KEYS: ClassVar[ModelKeys] = ModelKeys()


class Named:
    """Samples with names."""

    def __len__(self):
        return 20

    def id(self, index):
        return f"photo-{index:02d}.png"

    def sample(self, index, position, size):
        # of two processes the second one meets it
        rejected = [("damaged.png", "undecodable")] if position == 13 else []
        return {"x": torch.linspace(-1, 1, 48).reshape(3, 4, 4) * (index + 1) / 20, "rejected": rejected}


class AilingModel(Bare):
    """Two modules that each learn to copy. `trace`: the weights of each after every step."""

    def __init__(self, config: AilingConfig) -> None:
        torch.manual_seed(0)
        self.config = config
        self.optimizer_settings = {"judge": {"gradient_clip": float("inf")}}
        self.modules = {
            name: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
            for name in MODULES
        }
        self.trace = {name: [flat(module)] for name, module in self.modules.items()}

    def update(self, step, batch, engine):
        noise = torch.randn(batch.global_size, 3, 4, 4, generator=generator(0, "noise", step))
        metrics = {}
        for name in MODULES:
            kinds = self.faults(step + 1, name, engine.accelerator.process_index)
            corrupt(kinds, engine, name)
            for part in engine.parts(batch):
                x = part["x"] * float("nan") if "pixel_nan" in kinds else part["x"]
                made = engine.models[name](x + 0.1 * noise[part.rows])
                for kind in kinds & {"gradient_nan", "gradient_inf", "gradient_huge"}:
                    made.register_hook(partial(broken, kind=kind))
                loss = (made.float() - x).square().mean()
                if "loss_inf" in kinds:
                    loss = loss + float("inf")  # its gradient is finite
                elif "loss_spike" in kinds:
                    loss = loss + 50.0
                engine.backward(loss * float("nan") if "loss_nan" in kinds else loss)
            metrics[f"loss/{name}"] = loss.detach()
            metrics[f"optim/{name}_grad_norm"] = engine.optimize(name, step)
            self.trace[name].append(flat(self.modules[name]))
        return metrics

    def faults(self, step, name, rank):
        asked = (fault.split(":") for fault in self.config.faults)
        return {kind for at, module, kind, *ranks in asked if int(at) == step and module == name
                and (not ranks or int(ranks[0]) == rank)}  # fmt: skip

    def export(self, engine, directory, metrics):
        pass


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def broken(gradient, kind):
    if kind == "gradient_huge":  # finite, its square is not
        return gradient / gradient.abs().max() * 1e30
    return gradient * float(kind.removeprefix("gradient_"))


def corrupt(kinds, engine, name):
    """Faults that stay."""
    if "weight_nan" in kinds:
        with torch.no_grad():
            next(engine.modules[name].parameters())[0, 0, 0, 0] = float("nan")
    if "moment_nan" in kinds:
        next(iter(engine.optimizers[name].optimizer.state.values()))["exp_avg"].fill_(float("nan"))


def train(output, *overrides, prepare=None):
    """Train in this process; `prepare` may change the accelerator. Returns the model."""
    config = configuration.load(AilingConfig, None, [f"output={output}", *overrides])
    accelerator = make_accelerator(config.training)
    if prepare:
        prepare(accelerator)
    run = RunDirectory(config.output, config, main_process=accelerator.is_main_process)
    model = AilingModel(config)
    fit(
        model,
        Named(),
        Plan((Span(config.steps, 8, 8 // accelerator.num_processes),)),
        config.training,
        run,
        accelerator,
    )
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(*sys.argv[1:])
