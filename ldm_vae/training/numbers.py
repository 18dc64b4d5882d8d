"""Updates that are left out because a number was not finite, losses that spike, and when a run must stop for it.

`Engine` leaves an update out on the device; here is what is known of each update afterwards. Nothing waits for the
device but `collect`, on log steps and at least every `MAXIMUM_SKIPPED_STEPS` steps. All processes hold the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_vae.errors import UserError
from ldm_vae.training.loader import Samples, StreamedSamples, order_of
from ldm_vae.training.schedule import Plan

MAXIMUM_SKIPPED_STEPS = 20
LARGEST_NORM = 1e18
"""Of a gradient: its square still is a float32, as the optimizer's second moment must be."""

SPIKE_DEVIATIONS = 8.0
SPIKE_DECAY = 0.99
SPIKE_FROM = 100
"""Updates before which the average of a loss says little."""
NAMED_SAMPLES = 6

Describe = Callable[[int], str]
"""The samples of a step, counted from 1, in words."""


@dataclass(frozen=True)
class Skipped:
    """Updates of a module since the last log step that were left out; `step` and `norm` are of the last one."""

    module: str
    count: int
    step: int
    norm: str
    name = "update_skipped"

    def sentence(self, describe: Describe) -> str:
        often = "1 update" if self.count == 1 else f"{self.count} updates"
        return (
            f"{often} of the {self.module} left out, the last in step {self.step}: loss or gradient was not finite "
            f"(gradient norm {self.norm}; {describe(self.step)})"
        )


@dataclass(frozen=True)
class Spike:
    """The highest outlier of a module's loss since the last log step, in standard deviations above its average."""

    module: str
    step: int
    loss: float
    average: float
    deviations: float
    name = "loss_spike"

    def sentence(self, describe: Describe) -> str:
        return (
            f"the loss of the {self.module} was {self.loss:.4g} in step {self.step}, {self.deviations:.0f} standard "
            f"deviations above its average of {self.average:.4g} ({describe(self.step)})"
        )


@dataclass
class History:
    """What is known of a module's updates. `average` and `variance` are exponential ones of its loss."""

    in_a_row: int = 0
    total: int = 0
    seen: int = 0
    average: float = 0.0
    variance: float = 0.0
    step: int = 0
    norm: str = ""
    skipped: int = 0
    spike: dict[str, Any] | None = None

    def see(self, step: int, loss: float, norm: float) -> None:
        """Take the update of `step`, counted from 1."""
        if not is_usable(norm):
            self.in_a_row, self.total, self.skipped = self.in_a_row + 1, self.total + 1, self.skipped + 1
            self.step, self.norm = step, f"{norm:.4g}"
            return
        self.in_a_row = 0
        difference, deviation = loss - self.average, math.sqrt(self.variance)
        if self.seen >= SPIKE_FROM and difference > SPIKE_DEVIATIONS * deviation > 0:
            if self.spike is None or self.spike["loss"] < loss:
                height = difference / deviation
                self.spike = {"step": step, "loss": loss, "average": self.average, "deviations": height}
            difference = SPIKE_DEVIATIONS * deviation  # one outlier must not hide the next
        self.seen += 1
        share = max(1 - SPIKE_DECAY, 1 / self.seen)
        self.average += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)


class Numbers:
    """The updates of every module of a run."""

    def __init__(self, names: Iterable[str], *, scaled: bool = False) -> None:
        """`scaled`: a gradient scaler looks for its scale by overflowing now and then, which is no alarm."""
        self.scaled = scaled
        self.histories = {name: History() for name in names}
        self._pending: dict[str, list[tuple[int, Tensor, Tensor]]] = {name: [] for name in self.histories}

    def add(self, name: str, step: int, loss: Tensor, norm: Tensor) -> None:
        """The update of `step`, counted from 1: this process's loss, and the gradient norm, equal on all of them."""
        self._pending[name].append((step, loss, norm))

    def collect(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Take in what was added. Waits for the device; `mean` is over the processes, which all must call this."""
        for name, updates in self._pending.items():
            if updates:
                losses = mean(torch.stack([loss for _, loss, _ in updates]).double()).tolist()
                norms = torch.stack([norm for _, _, norm in updates]).tolist()
                for (step, _, _), loss, norm in zip(updates, losses, norms):
                    self.histories[name].see(step, loss, norm)
                updates.clear()

    def check(self, describe: Describe) -> None:
        """Raises: UserError when too many updates in a row were left out."""
        for name, history in self.histories.items():
            if history.in_a_row >= MAXIMUM_SKIPPED_STEPS:
                raise UserError(
                    f"step {history.step}: loss or gradient of the {name} was not finite in {history.in_a_row} steps "
                    f"in a row (gradient norm {history.norm}; {describe(history.step)}); start with another output and "
                    "a lower training.learning_rate or training.precision=fp32; the checkpoints here are intact"
                )

    def figures(self) -> dict[str, float]:
        """Updates left out since the run began, where there are any."""
        total = sum(history.total for history in self.histories.values())
        return {"optim/skipped_updates": float(total)} if total else {}

    def take_alarms(self) -> list[Skipped | Spike]:
        """What happened since the last call."""
        found: list[Skipped | Spike] = []
        for name, history in self.histories.items():
            if history.skipped and not self.scaled:
                found.append(Skipped(name, history.skipped, history.step, history.norm))
            if history.spike is not None:
                found.append(Spike(name, **history.spike))
            history.skipped, history.spike = 0, None
        return found

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Exact in JSON. Nothing may be pending: call `collect` before."""
        return {name: asdict(history) for name, history in self.histories.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        self.histories |= {name: History(**values) for name, values in state.items()}


def is_usable(norm: float) -> bool:
    """Whether an update with this gradient norm is made; not with NaN."""
    return norm < LARGEST_NORM


def unusable(norm: Tensor) -> Tensor:
    """`is_usable` on the device: 1.0 where an update must be left out, else 0.0."""
    return (~(norm < LARGEST_NORM)).float()


def marked(loss: Tensor) -> Tensor:
    """The loss, with a gradient of NaN where it is not finite itself: then every process leaves the update out."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def sample_names(samples: Samples | StreamedSamples, plan: Plan, seed: int, step: int) -> str:
    """The samples of a step, counted from 1, on all processes, in words."""
    span, first = plan.span(step - 1)
    if isinstance(samples, StreamedSamples):
        return f"positions {first} to {first + span.global_batch - 1} of the stream"
    order = order_of(samples, seed)
    names = [samples.id(order(first + row)) for row in range(min(span.global_batch, NAMED_SAMPLES))]
    more = span.global_batch - len(names)
    return f"samples {', '.join(names)}" + (f" and {more} more" if more else "")
