"""The flow loss on latents that training never sees, always at the same times with the same noise; when to stop.

Owns the measurement and the suggestion in words. Nothing here stops a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae.diffusion import flow
from ldm_vae.random import generator

TIMES = 8
SMOOTHING = 0.1
"""Weight of a new log step in the training loss that the suggestion looks at."""


@torch.no_grad()
def held_out_losses(unet: nn.Module, latents: Tensor, labels: Tensor | None, shift: float) -> dict[float, float]:
    """Time -> mean squared velocity error, at the middles of eight equal parts of [0, 1], shifted.

    Args:
        unet: Latents, times and labels -> velocity.
        latents: Normalised, (n, c, h, w); the noise follows from their number and shape.
        labels: (n,), or None for an unconditional network.
        shift: Of the times towards noise.
    """
    rng = generator(0, "held_out", device=latents.device)
    losses = {}
    for number in range(TIMES):
        time = flow.shift_times(torch.tensor((number + 0.5) / TIMES), shift)
        times = time.expand(len(latents)).to(latents.device)
        noise = torch.randn(latents.shape, generator=rng, device=latents.device)
        velocity = unet(flow.interpolate(latents, noise, times), times, labels)
        losses[float(time)] = flow.velocity_loss(velocity, flow.velocity_target(latents, noise)).mean()
    return {time: float(loss) for time, loss in losses.items()}


def figures(losses: dict[float, float], of_training: dict[float, float]) -> dict[str, float]:
    """What is logged: the mean over the times, the loss at each of them, and by how much the mean is above that of
    training latents, measured in the same way."""
    by_time = {f"held_out/flow_t{time:.3g}": loss for time, loss in losses.items()}
    mean, trained = (sum(values.values()) / len(values) for values in (losses, of_training))
    return {"held_out/flow": mean, "held_out/gap": mean - trained} | by_time


@dataclass(frozen=True)
class Overfitting:
    """The alarm: since `step` the held-out loss has not improved, and the training loss fell."""

    step: int
    held_out: tuple[float, float]
    train: tuple[float, float]
    name: str = "overfitting"

    def sentence(self) -> str:
        return (
            f"overfitting: the held-out loss was best at step {self.step} ({self.held_out[0]:.4g}, now "
            f"{self.held_out[1]:.4g}) while the training loss fell from {self.train[0]:.4g} to {self.train[1]:.4g}; "
            "from here on the network learns its images by heart: stop, use more images, or raise unet.dropout"
        )


class StopSuggestion:
    """Remembers the best held-out loss, and the training loss at that time."""

    def __init__(self, patience: float) -> None:
        """`patience`: share of the run that may pass without a better held-out loss."""
        self.patience = patience
        self.train = math.inf
        self.train_then = math.inf
        self.best = self.last = math.inf
        self.best_step = 0
        self.said = False

    def see_training(self, loss: float) -> None:
        """At each log step."""
        known = math.isfinite(self.train)
        self.train = self.train + SMOOTHING * (loss - self.train) if known else loss

    def see_held_out(self, step: int, loss: float) -> None:
        """At each validation after `step` finished steps."""
        self.last = loss
        if loss < self.best:
            self.best, self.best_step, self.train_then, self.said = loss, step, self.train, False

    def alarm(self, step: int, steps: int) -> Overfitting | None:
        """Once, until the held-out loss improves again."""
        waited = step - self.best_step >= self.patience * steps
        if self.said or not math.isfinite(self.best) or not waited or self.train >= self.train_then:
            return None
        self.said = True
        return Overfitting(self.best_step, (self.best, self.last), (self.train_then, self.train))

    def last_word(self, step: int, snapshots: Sequence[int]) -> str:
        """What a finished run says: which step was best for latents that it has not seen, and how to get it."""
        if not math.isfinite(self.best):
            return "no latents were held out"
        if self.best_step == step:
            return f"the held-out loss was best at the end ({self.best:.4g}): a longer run may be better"
        words = f"the held-out loss was best at step {self.best_step} ({self.best:.4g}, now {self.last:.4g})"
        if not snapshots:
            return words
        near = min(snapshots, key=lambda number: abs(number - self.best_step))
        return f"{words}: `ldm-vae ema RUN --length 0.05 --step {near} --out DIR` writes the pipeline of that time"

    def state_dict(self) -> dict[str, Any]:
        """Exact; floats in hexadecimal, since JSON has no infinity."""
        values = {name: value for name, value in vars(self).items() if name != "patience"}
        return {name: value.hex() if isinstance(value, float) else value for name, value in values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, float.fromhex(value) if isinstance(value, str) else value)
