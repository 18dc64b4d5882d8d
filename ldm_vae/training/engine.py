"""`fit()`: one loop for every model. It owns all bookkeeping; the mathematics is in the model's `update()`.

def update(self, step, batch, engine):
    for part in engine.parts(batch):          # micro-batches; gradients are synchronised on the last one
        loss = ...engine.models["name"](...)   # the wrapped module, so that gradients are averaged over processes
        engine.backward(loss)
    engine.optimize("name", step)              # clip, skip if not finite, optimizer step, EMA
    return {"loss/...": ...}                   # scalar tensors; nothing waits for the device
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ldm_vae.errors import UserError
from ldm_vae.training import watchdog
from ldm_vae.training.ema import Ema
from ldm_vae.training.loader import Batch, MicroBatch
from ldm_vae.training.numbers import Numbers, marked, unusable
from ldm_vae.training.processes import TIMEOUT_SECONDS, check_timeout, close_accelerator, is_on_cpu, open_accelerator
from ldm_vae.training.roll_call import checksum
from ldm_vae.training.schedule import learning_rate

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the engine, the same for every model. Steps and batches belong to the model's own config."""

    seed: int = 0
    learning_rate: float = 1e-3
    final_learning_rate_fraction: float = 0.03
    warmup_steps: int = 200
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int | None = None
    timeout_seconds: int = TIMEOUT_SECONDS
    gradient_checkpointing: bool = False
    compile: bool = False
    workers: int = 2
    log_every: int = 20
    validate_every: int = 500
    preview_every: int = 500
    save_every: int = 500
    keep_checkpoints: int = 2
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"

    def __post_init__(self) -> None:
        for name in ("log_every", "validate_every", "preview_every", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name}: {getattr(self, name)} is below 1; give a number of steps")
        if self.learning_rate <= 0:
            raise UserError(f"training.learning_rate: {self.learning_rate} is not above 0")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"training.ema_decay: {self.ema_decay} is not in [0, 1)")
        check_timeout(self.timeout_seconds, "training.")


class Alarm(Protocol):
    """Something that is going wrong, in words."""

    @property
    def name(self) -> str: ...

    def sentence(self) -> str: ...


class Model(Protocol):
    """What `fit` trains. `modules` are wrapped, optimised and averaged under their names."""

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...

    @property
    def optimizer_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Module name -> fields of TrainingConfig that its optimizer has otherwise."""
        ...

    def update(self, step: int, batch: Batch, engine: Engine) -> dict[str, Tensor]:
        """One optimizer step; returns scalar metrics of this process."""
        ...

    def alarms(self, step: int, metrics: Mapping[str, float]) -> Sequence[Alarm]:
        """What newly goes wrong, from the averaged metrics of a log step."""
        ...

    def validate(self, engine: Engine) -> dict[str, float]:
        """Held-out figures from the EMA weights (main process only)."""
        ...

    def preview(self, engine: Engine) -> Image | None:
        """A picture of how it goes (main process only)."""
        ...

    def export(self, engine: Engine, directory: Path, metrics: Mapping[str, float]) -> None:
        """Write the finished model under the run directory (main process only)."""
        ...

    def random_samples(self, rows: slice, size: int | None) -> dict[str, Tensor]:
        """Data of a micro-batch made of noise, for `--dry-run`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state beyond the modules' weights."""
        ...

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Further tensors of the state: file stem -> name -> tensor."""
        ...

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """The inverse of both; `tensors` holds those of the whole checkpoint."""
        ...


def make_accelerator(config: TrainingConfig, project_dir: Path | None = None) -> Any:
    """An Accelerator for the config. Raises UserError when the processes or the precision are not what was asked."""
    if config.precision == "fp16" and is_on_cpu(config):
        raise UserError("training.precision: fp16 needs a GPU; use bf16 or fp32 on CPU")
    return open_accelerator(
        config,
        "training.",
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        log_with=None if config.tracker == "none" or project_dir is None else config.tracker,
        project_dir=str(project_dir) if project_dir else None,
    )


class Engine:
    """The moving parts of a run: wrapped models, optimizers, averages. One `optimize` call is one optimizer step."""

    def __init__(self, model: Model, config: TrainingConfig, accelerator: Any, steps: int) -> None:
        self.config = config
        self.accelerator = accelerator
        self.steps = steps
        self.modules = dict(model.modules)
        self.models: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        self.emas: dict[str, Ema] = {}
        self.numbers = Numbers(self.modules, scaled=accelerator.scaler is not None)
        self.configs: dict[str, TrainingConfig] = {}
        self._parts = 1
        self._loss = torch.zeros((), device=accelerator.device)
        for name, module in self.modules.items():
            module.to(accelerator.device)
            self.emas[name] = Ema(module, config.ema_decay)
            if config.compile:
                module.compile()
            self.models[name] = accelerator.prepare_model(module)
            self.configs[name] = replace(config, **model.optimizer_settings.get(name, {}))
            self.optimizers[name] = accelerator.prepare_optimizer(make_optimizer(module, self.configs[name]))

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def parts(self, batch: Batch) -> Iterator[MicroBatch]:
        """The micro-batches of this process; gradients are exchanged between processes on the last one only."""
        self._parts = len(batch.parts)
        for number, part in enumerate(batch.parts, start=1):
            with contextlib.ExitStack() as stack:
                if number < self._parts:
                    for wrapped in self.models.values():
                        stack.enter_context(self.accelerator.no_sync(wrapped))
                yield part
                watchdog.advance()

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient. `loss` is its mean; the step's loss is the mean over micro-batches."""
        loss = loss / self._parts
        self._loss = self._loss + loss.detach()
        self.accelerator.backward(marked(loss))

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over the processes, without gradient."""
        value = value.detach()
        return self.accelerator.reduce(value, "mean") if self.accelerator.num_processes > 1 else value

    def optimize(self, name: str, step: int) -> Tensor:
        """Clip, step (not if loss or gradient is not finite), zero the gradients, move the EMA. Returns the norm."""
        optimizer = self.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step, name)
        norm = self.accelerator.clip_grad_norm_(self.modules[name].parameters(), self.configs[name].gradient_clip)
        if self.accelerator.scaler is None:
            optimizer.optimizer.found_inf = unusable(norm)  # the fused kernel skips the update, without a host sync
        optimizer.step()
        optimizer.zero_grad()
        self.numbers.add(name, step + 1, self._loss, norm)
        self._loss = torch.zeros_like(self._loss)
        self.emas[name].update(step)
        return norm

    def forget_moments(self, name: str) -> None:
        """Start the optimizer of a module anew: its weights were replaced."""
        for state in self.optimizers[name].optimizer.state.values():
            for value in state.values():
                value.zero_()

    def learning_rate(self, step: int, name: str | None = None) -> float:
        config = self.configs[name] if name else self.config
        return learning_rate(
            step, self.steps, config.learning_rate, config.warmup_steps, config.final_learning_rate_fraction
        )

    def checksum(self) -> int:
        """Of the weights of all modules. Waits for the device: log steps only."""
        return int(checksum(list(self.modules.values()), self.device))

    def close(self, failure: BaseException | None = None) -> None:
        """Let go of the wrapped models, then of the process group, then end the trackers.

        In the other order the last reference to the group is the wrapper's, and its destructor waits for a thread that
        waits for Python's lock: seen as a hang after all work was done, once in about twenty runs of two processes.
        """
        self.models.clear()
        self.optimizers.clear()
        self.accelerator.free_memory()
        close_accelerator(self.accelerator, failure)


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, fused; weight decay on matrices and kernels only."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=True
    )
