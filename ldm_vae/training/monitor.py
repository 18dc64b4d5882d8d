"""What a run reports while it trains: metrics, the stability of its updates, and images that could not be read.

`Averages` collects the metrics of the steps. `StabilityChecks` records which updates were skipped because a number was
not finite, and which losses spike. `Tracker` writes both to `metrics.jsonl`, TensorBoard (or wandb) and the terminal.
`BadSamples` lists unreadable images. All processes have the same values, and the main process writes them.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_vae.errors import UserError
from ldm_vae.training.loader import MicroBatch, Plan, Samples, StreamedSamples, order_of
from ldm_vae.training.run_directory import RunDirectory
from ldm_vae.utils.progress import Progress, say

MAXIMUM_SKIPPED_STEPS = 20
LARGEST_NORM = 1e18
"""The largest gradient whose square is still a finite float32, as the optimizer's second moment must be."""

SPIKE_DEVIATIONS = 8.0
SPIKE_DECAY = 0.99
SPIKE_FROM = 100
"""Number of updates before the average of a loss is used."""
NAMED_SAMPLES = 6

Describe = Callable[[int], str]
"""The samples of a step, counted from 1, in words."""


@dataclass(frozen=True)
class Skipped:
    """Skipped updates of a module since the last log step; `step` and `norm` are those of the last one."""

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
    """The history of a module's updates. `average` and `variance` are exponential averages over its loss."""

    in_a_row: int = 0
    total: int = 0
    seen: int = 0  # updates in the average
    average: float = 0.0
    variance: float = 0.0
    step: int = 0
    norm: str = ""
    skipped: int = 0
    spike: dict[str, Any] | None = None

    def update(self, step: int, loss: float, norm: float) -> None:
        """Add the update of `step`, counted from 1."""
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

    def forget(self) -> None:
        """Restart the averages, because the loss changes here."""
        self.seen, self.average, self.variance = 0, 0.0, 0.0


class StabilityChecks:
    """The updates of every module of a run: which were skipped, which losses spike, and when the run must stop.

    The trainer skips an update on the device. Only `collect` waits for the device: on log steps, and at least
    every `MAXIMUM_SKIPPED_STEPS` steps.
    """

    def __init__(self, names: Iterable[str], *, scaled: bool = False, starts: Iterable[int] = ()) -> None:
        """
        Args:
            names: the modules.
            scaled: there is a gradient scaler. It finds its scale by occasional overflows, which raise no alarm.
            starts: steps, counted from 1, at which the loss changes and its average starts again.
        """
        self.scaled, self.starts = scaled, frozenset(starts)
        self.histories = {name: History() for name in names}
        self._pending: dict[str, list[tuple[int, Tensor, Tensor]]] = {name: [] for name in self.histories}

    def add(self, name: str, step: int, loss: Tensor, norm: Tensor) -> None:
        """Add the update of `step`, counted from 1: this process's loss, and the gradient norm of all processes."""
        self._pending[name].append((step, loss, norm))

    def collect(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Move the added updates into the histories. `mean` averages over processes; all of them must call this."""
        for name, updates in self._pending.items():
            if updates:
                losses = mean(torch.stack([loss for _, loss, _ in updates]).double()).tolist()
                norms = torch.stack([norm for _, _, norm in updates]).tolist()
                for (step, _, _), loss, norm in zip(updates, losses, norms):
                    if step in self.starts:
                        self.histories[name].forget()
                    self.histories[name].update(step, loss, norm)
                updates.clear()

    def check(self, describe: Describe) -> None:
        """Raises: UserError when too many updates in a row were skipped."""
        for name, history in self.histories.items():
            if history.in_a_row >= MAXIMUM_SKIPPED_STEPS:
                raise UserError(
                    f"step {history.step}: loss or gradient of the {name} was not finite in {history.in_a_row} steps "
                    f"in a row (gradient norm {history.norm}; {describe(history.step)}); start with another output and "
                    "a lower training.learning_rate or training.precision=fp32; the checkpoints here are intact"
                )

    def metrics(self) -> dict[str, float]:
        """The number of skipped updates since the run began, for modules that have any."""
        total = sum(history.total for history in self.histories.values())
        return {"optim/skipped_updates": float(total)} if total else {}

    def take_alarms(self) -> list[Skipped | Spike]:
        """The events since the last call."""
        found: list[Skipped | Spike] = []
        for name, history in self.histories.items():
            if history.skipped and not self.scaled:
                found.append(Skipped(name, history.skipped, history.step, history.norm))
            if history.spike is not None:
                found.append(Spike(name, **history.spike))
            history.skipped, history.spike = 0, None
        return found

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The state, exact in JSON. Call `collect` first, so that nothing is pending."""
        return {name: asdict(history) for name, history in self.histories.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        self.histories |= {name: History(**values) for name, values in state.items()}


def is_usable(norm: float) -> bool:
    """Whether an update with this gradient norm is made; False for NaN."""
    return norm < LARGEST_NORM


def unusable(norm: Tensor) -> Tensor:
    """`is_usable` on the device: 1.0 if an update must be skipped, else 0.0."""
    return (~(norm < LARGEST_NORM)).float()


def marked(loss: Tensor) -> Tensor:
    """The loss, with a NaN gradient if it is not finite, so that every process skips the update."""
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


# The metrics and where they are written.


class Averages:
    """Sums of scalar tensors since the last log step. Part of the checkpoint, so that resuming in between is exact."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def synchronize(self, accelerator: Any) -> None:
        """Replace the sums by their mean over the processes, so that one process can save them for all."""
        if self.sums and accelerator.num_processes > 1:
            means = accelerator.reduce(torch.stack(list(self.sums.values())), "mean")
            self.sums = dict(zip(self.sums, means.unbind()))

    def take(self, accelerator: Any) -> dict[str, float]:
        """Return the means over steps and processes, and reset."""
        self.synchronize(accelerator)
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """The state, exact and with NaN (which JSON does not have): floats are written in hexadecimal."""
        return {"counts": self.counts, "sums": {name: float(value).hex() for name, value in self.sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.counts = dict(state["counts"])
        self.sums = {
            name: torch.tensor(float.fromhex(value), dtype=torch.float64, device=device)
            for name, value in state["sums"].items()
        }


class Tracker:
    """Writes metrics and moves the progress bar. Only the main process shows or writes anything."""

    def __init__(self, run: RunDirectory, accelerator: Any, steps: int, first_step: int, seconds_before: float) -> None:
        self.accelerator = accelerator
        self.run = run
        self.seconds_before = seconds_before
        self.bad_samples = BadSamples(run.path)
        self._started = self._last_time = time.monotonic()
        self._images = 0
        shown = accelerator.is_main_process
        self.bar = Progress(run.keys.command, steps, "step", done=first_step, shown=shown)

    @property
    def seconds(self) -> float:
        """Wall time of the run, including interrupted attempts up to their last checkpoint."""
        return self.seconds_before + time.monotonic() - self._started

    def advance(self, images: int) -> None:
        self._images += images
        self.bar.advance()

    def throughput(self) -> dict[str, float]:
        """Images per second since the last call, and the run's seconds."""
        now = time.monotonic()
        rate = self._images / max(1e-9, now - self._last_time)
        self._last_time, self._images = now, 0
        return {"time/images_per_second": round(rate, 2), "time/seconds": round(self.seconds, 2)}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics after `step` finished steps."""
        if not self.accelerator.is_main_process:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.run.add_metrics({"step": step, **finite})
        with self.run.writing():
            self.accelerator.log(dict(metrics), step=step)

    def log_and_print(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log rare metrics on a line of their own."""
        if metrics:
            self.log(step, metrics)
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def alarm(self, step: int, name: str, sentence: str) -> None:
        """Write a sentence above the progress bar, and a line to the metrics, which the plots mark."""
        if self.accelerator.is_main_process:
            self.run.add_metrics({"step": step, "alarm": sentence, "verdict": name})
        self.say(f"step {step}: ALARM {sentence}")

    def report_rejected(self) -> None:
        """Report the images that could not be read since the last call. All processes must call this."""
        new = self.bad_samples.take_new(self.accelerator)
        if new and self.accelerator.is_main_process:
            with self.run.writing():
                self.bad_samples.append(new)
        for sentence in rejection_sentences(new):
            self.say(sentence)

    def show(self, metrics: Mapping[str, float]) -> None:
        """The metrics beside the progress bar."""
        self.bar.note = ", ".join(f"{name} {value:.4g}" for name, value in self.run.keys.shown(metrics).items())

    def say(self, text: str) -> None:
        """Write a line above the progress bar."""
        if self.accelerator.is_main_process:
            say(text)

    def close(self) -> None:
        """Close the trackers. Errors of a tracker are ignored, since `metrics.jsonl` has all lines."""
        for tracker in self.accelerator.trackers:
            with contextlib.suppress(OSError):
                tracker.finish()
        self.accelerator.trackers = []
        self.bar.close(self.bar.done == self.bar.total)


# Images that could not be read: reported once for all processes, and listed in `quarantine.jsonl`.

FILE = "quarantine.jsonl"
REPORTED_AT_ONCE = 10


class BadSamples:
    """The images that were replaced by others. Images listed by an earlier attempt of the run are not listed again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._listed: set[str] = set()
        self._observed: list[tuple[str, str]] = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # incomplete line
                    self._listed.add(json.loads(line)["id"])

    def observe(self, parts: Iterable[MicroBatch]) -> None:
        """Take the rejections from the samples of a step."""
        for part in parts:
            self._observed += [tuple(pair) for pair in part.data.get("rejected", []) if pair[0] not in self._listed]

    def take_new(self, accelerator: Any) -> list[tuple[str, str]]:
        """(id, reason) of the images that are new to all processes. All processes must call this."""
        from accelerate.utils import gather_object

        observed = gather_object(self._observed) if accelerator.num_processes > 1 else self._observed
        new = [pair for pair in dict(observed).items() if pair[0] not in self._listed]
        self._observed, self._listed = [], self._listed | {identity for identity, _ in new}
        return new

    def append(self, new: list[tuple[str, str]]) -> None:
        """List them in the file; for the main process. Raises: OSError."""
        with open(self.path, "a+") as file:
            file.seek(0)
            before = file.read()
            torn = bool(before) and not before.endswith("\n")  # by a killed attempt
            lines = [json.dumps({"id": identity, "reason": reason}) + "\n" for identity, reason in new]
            file.write("\n" * torn + "".join(lines))


def rejection_sentences(new: list[tuple[str, str]]) -> list[str]:
    """A sentence for each of the first images, and the number of the others."""
    lines = [f"{identity}: cannot be read ({reason}); another image takes its place" for identity, reason in new]
    more = len(lines) - REPORTED_AT_ONCE
    return lines if more <= 0 else [*lines[:REPORTED_AT_ONCE], f"{more} more cannot be read, see {FILE}"]
