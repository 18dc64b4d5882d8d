"""Fair timing on a noisy machine: contestants take turns within a round, and ratios are taken within a round.

What disturbs the machine for a while meets all of them. Owns the clock; what is timed belongs to the subjects.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Seconds = dict[str, list[float]]
"""Contestant -> seconds a call, one number a round."""


def alternating(
    actions: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 0.0, device: str = "cpu"
) -> Seconds:
    """Time all actions, each round begun by another one, after one call of each that does not count.

    A turn lasts at least `seconds`, and at least one call. On "cuda" the time is that of the device (events), with
    everything queued before it finished.
    """
    for action in actions.values():
        action()
    found: Seconds = {name: [] for name in actions}
    for number in range(rounds):
        for name in rotated(list(actions), number):
            found[name].append(turn(actions[name], seconds, device))
    return found


def rotated(contestants: Sequence[str], number: int) -> list[str]:
    """Their order in round `number`, begun by another one each time."""
    first = number % len(contestants)
    return [*contestants[first:], *contestants[:first]]


def turn(action: Callable[[], object], seconds: float, device: str) -> float:
    """Seconds a call."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
    calls, started = 0, time.perf_counter()
    while not calls or time.perf_counter() - started < seconds:
        action()
        calls += 1
    if not on_gpu:
        return (time.perf_counter() - started) / calls
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a ratio over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Ratio of two series, round by round. The speedup of ours is `ratio(theirs, ours)`, of seconds."""
    values = [above / below for above, below in zip(numerator, denominator, strict=True)]
    if len(values) < 2:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)


def bar(name: str, measured: float, at_least: float, unit: str = "x") -> dict[str, Any]:
    """A line of the table of promises: what was measured, the limit, and whether it holds."""
    return {"bar": name, "measured": measured, "at_least": at_least, "unit": unit, "reached": measured >= at_least}


def bars_table(bars: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines."""
    lines = ["| bar | measured | at least | |", "|---|---|---|---|"]
    for one in bars:
        verdict = "reached" if one["reached"] else "**missed**"
        unit = one["unit"]
        lines.append(f"| {one['bar']} | {one['measured']:.3g}{unit} | {one['at_least']:.3g}{unit} | {verdict} |")
    return lines
