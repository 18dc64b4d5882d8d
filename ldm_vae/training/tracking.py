"""What a run tells: `metrics.jsonl`, TensorBoard (or wandb) through accelerate, and the progress bar.

Metrics are averaged over the steps since the last log step, on the device; the host waits on log steps only.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm_vae.training.quarantine import Quarantine, sentences
from ldm_vae.training.run import RunDirectory


class Averages:
    """Sums of scalar tensors since the last log step. Part of the checkpoint: resuming inside an interval is exact."""

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
        """The means over steps and processes, and start anew."""
        self.synchronize(accelerator)
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Exact, NaN included: JSON has no word for it, so the floats are written in hexadecimal."""
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
        from tqdm import tqdm

        self.accelerator = accelerator
        self.run = run
        self.seconds_before = seconds_before
        self.quarantine = Quarantine(run.path)
        self._started = self._last_time = time.monotonic()
        self._images = 0
        self.bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.5,
            disable=not accelerator.is_main_process,
        )

    @property
    def seconds(self) -> float:
        """Wall time of the run, interrupted attempts included up to their last checkpoint."""
        return self.seconds_before + time.monotonic() - self._started

    def advance(self, images: int) -> None:
        self._images += images
        self.bar.update(1)

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

    def log_and_say(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log figures that are rare enough for a line of their own."""
        if metrics:
            self.log(step, metrics)
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def alarm(self, step: int, name: str, sentence: str) -> None:
        """One sentence above the progress bar, and a line among the metrics that the plots mark."""
        if self.accelerator.is_main_process:
            self.run.add_metrics({"step": step, "alarm": sentence, "verdict": name})
        self.say(f"step {step}: ALARM {sentence}")

    def report_rejected(self) -> None:
        """Name the images that could not be read since the last call. All processes must call this."""
        new = self.quarantine.take_new(self.accelerator)
        if new and self.accelerator.is_main_process:
            with self.run.writing():
                self.quarantine.append(new)
        for sentence in sentences(new):
            self.say(sentence)

    def show(self, metrics: Mapping[str, float]) -> None:
        """The figures worth a place beside the progress bar."""
        shown = [name for name in metrics if name.startswith("loss/") and name != "loss/kl"] + ["rate/nats_per_dim"]
        short = {name.split("/")[-1]: f"{metrics[name]:.4g}" for name in shown if name in metrics}
        rate = metrics.get("time/images_per_second")
        self.bar.set_postfix(short | ({"images/s": f"{rate:.0f}"} if rate is not None else {}))

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def close(self) -> None:
        """A tracker that cannot write its last lines is let go: `metrics.jsonl` has them, an error may be under way."""
        for tracker in self.accelerator.trackers:
            with contextlib.suppress(OSError):
                tracker.finish()
        self.accelerator.trackers = []
        self.bar.close()
