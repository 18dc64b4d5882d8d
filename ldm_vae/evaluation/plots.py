"""Training curves as small inline SVG panels, drawn from `metrics.jsonl`.

Owns reading the curves and drawing one panel; which colours the classes have is the page's style sheet, so a
panel follows light and dark. Text stays text. No plotting library: a panel is a few lines and some labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 16, 28
MAXIMUM_POINTS = 240
"""Points drawn per curve; longer runs are averaged in bins, so the page stays small."""


@dataclass(frozen=True)
class Curve:
    """One logged quantity: `steps` (n,) rising and finite `values` (n,)."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Panel:
    """One plot: a `train` curve, a `held_out` curve, a `target` level.

    A `noisy` training curve is drawn faint, its running mean bold.
    """

    title: str
    unit: str
    caption: str
    train: Curve | None = None
    held_out: Curve | None = None
    target: float | None = None
    noisy: bool = True
    logarithmic: bool = True
    """Where the values span a factor of eight or more."""


def read_metrics(path: Path) -> dict[str, Curve]:
    """Key -> curve of a `metrics.jsonl`; empty when there is no such file.

    A line cut off by a crash and non-finite values are skipped; a step logged twice (a resumed run) keeps the
    later value.
    """
    points: dict[str, dict[int, float]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
                step = int(record.pop("step"))
            except (ValueError, KeyError, AttributeError, TypeError):
                continue
            for key, value in record.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    points.setdefault(key, {})[step] = float(value)
    return {
        key: Curve(np.array(sorted(found)), np.array([found[step] for step in sorted(found)]))
        for key, found in points.items()
    }


def autoencoder_panels(metrics: Mapping[str, Curve], rate_target_nats: float | None = None) -> list[Panel]:
    """Both loss terms apart, and any further term; the weight between them; quality on held-out images."""
    panels = [
        Panel(
            "Reconstruction loss",
            "L1, mean per pixel and channel, range −1 to 1",
            "How far decoded pixels are from the originals; lower is better.",
            metrics.get("loss/l1"),
            metrics.get("held_out/l1"),
        ),
        Panel(
            "KL loss, as a rate",
            "bits per latent dimension",
            "How much the latents say about the image; the second loss term in a unit one can compare.",
            _in_bits(metrics.get("loss/kl")),
            _in_bits(metrics.get("held_out/nats_per_dim")),
            target=rate_target_nats / math.log(2) if rate_target_nats else None,
        ),
        Panel(
            "Perceptual loss",
            "LPIPS, unweighted",
            "Distance between the features that a frozen image network sees; lower looks closer.",
            metrics.get("loss/perceptual"),
        ),
    ]
    known = {"loss/l1", "loss/kl", "loss/perceptual", "loss/total"}
    for key in sorted(metrics.keys() - known):
        if key.startswith("loss/"):
            name = key.removeprefix("loss/").replace("_", " ")
            caption = "A further loss term, logged without its weight."
            title = name.upper() if len(name) <= 3 else name.capitalize()
            panels.append(Panel(f"{title} loss", "unweighted", caption, metrics[key]))
    panels += [
        Panel(
            "Weight of the KL term",
            "β",
            "The controller moves this weight until the rate sits at its target.",
            metrics.get("rate/beta"),
            noisy=False,
        ),
        Panel(
            "Held-out quality",
            "PSNR in dB",
            "Reconstruction of images that training never sees; higher is better.",
            held_out=metrics.get("held_out/psnr"),
        ),
        _learning_rate(metrics),
    ]
    return [panel for panel in panels if panel.train or panel.held_out]


def diffusion_panels(metrics: Mapping[str, Curve]) -> list[Panel]:
    """The flow-matching loss on both parts, and the learning rate."""
    loss = Panel(
        "Flow loss",
        "mean squared velocity error",
        "Training and held-out loss: a widening gap would mean that the network learns its images by heart.",
        metrics.get("loss/flow"),
        metrics.get("held_out/flow"),
    )
    return [panel for panel in (loss, _learning_rate(metrics)) if panel.train or panel.held_out]


def _in_bits(nats: Curve | None) -> Curve | None:
    return Curve(nats.steps, nats.values / math.log(2)) if nats else None


def _learning_rate(metrics: Mapping[str, Curve]) -> Panel:
    return Panel(
        "Learning rate",
        "per optimizer step",
        "A short warm-up, then a decay towards the end of the run.",
        metrics.get("optim/lr"),
        noisy=False,
        logarithmic=False,
    )


def render_svg(panel: Panel) -> str:
    """One panel as an `<svg>` element with the classes grid, axis, raw, line, held-out and target."""
    train = panel.train and _thin(panel.train)
    held_out = panel.held_out and _thin(panel.held_out)
    smooth = train and (Curve(train.steps, running_mean(train.values)) if panel.noisy else train)
    drawn = [curve for curve in (smooth, held_out) if curve]
    levels = np.concatenate([curve.values for curve in drawn])
    if train:
        levels = np.concatenate([levels, np.quantile(train.values, [0.02, 0.98])])
    if panel.target is not None:
        levels = np.append(levels, panel.target)
    axis = _Axis.over(levels, panel.logarithmic)
    last_step = float(max(curve.steps[-1] for curve in drawn)) or 1.0

    def points(curve: Curve) -> str:
        x = LEFT + curve.steps / last_step * (WIDTH - LEFT - RIGHT)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, axis.heights(curve.values)))

    parts = [_grid(axis, last_step)]
    if panel.target is not None:
        height = axis.heights(np.array([panel.target]))[0]
        parts.append(f'<path class="target" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>')
    if train and smooth:
        if smooth is not train:
            parts.append(f'<polyline class="raw" points="{points(train)}"/>')
        parts.append(f'<polyline class="line" points="{points(smooth)}"/>')
    if held_out:
        parts.append(f'<polyline class="held-out" points="{points(held_out)}"/>')
        parts += [
            f'<circle class="held-out-dot" cx="{point.split(",")[0]}" cy="{point.split(",")[1]}" r="2.4"/>'
            for point in points(held_out).split()
            if len(held_out.steps) <= 40
        ]
    parts.append(_legend(panel))
    label = escape(f"{panel.title}, {panel.unit}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class _Axis:
    """A vertical axis; logarithmic, where that is allowed and positive values span a factor of eight."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, values: np.ndarray, logarithmic: bool) -> _Axis:
        low, high = float(values.min()), float(values.max())
        if logarithmic and low > 0 and high / low >= 8:
            return cls(low / 1.1, high * 1.1, True)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return cls(max(low - room, 0.0) if low >= 0 else low - room, high + room, False)

    def heights(self, values: np.ndarray) -> np.ndarray:
        """SVG y coordinates; values outside are drawn at the edge."""
        values = np.clip(values, self.low, self.high)
        if self.logarithmic:
            share = np.log(values / self.low) / math.log(self.high / self.low)
        else:
            share = (values - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return round_numbers(self.low, self.high, 5)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [digit * 10.0**decade for decade in decades for digit in digits]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) <= 7:
                break
        return ticks


def round_numbers(low: float, high: float, count: int) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw * 0.999)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _grid(axis: _Axis, last_step: float) -> str:
    parts = []
    for tick in axis.ticks():
        height = axis.heights(np.array([tick]))[0]
        parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in round_numbers(0, last_step, 5):
        x = LEFT + tick / last_step * (WIDTH - LEFT - RIGHT)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        text = f"{tick / 1000:g}k" if tick >= 1000 else f"{tick:g}"
        text = f"step {text}" if tick == 0 else text
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    return "".join(parts)


def _legend(panel: Panel) -> str:
    entries = [("line", "training")] if panel.train and (panel.held_out or panel.target is not None) else []
    entries += [("held-out", "held out")] if panel.held_out else []
    entries += [("target", "target")] if panel.target is not None else []
    parts = []
    x = WIDTH - RIGHT
    for name, text in reversed(entries):
        parts.append(f'<text class="key {name}" x="{x}" y="11" text-anchor="end">{text}</text>')
        x -= 14 + 7 * len(text)
    return "".join(parts)


def _number(value: float) -> str:
    """A tick label: at most four digits, small values as 1.5e-3, with a true minus sign."""
    if value != 0 and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def _thin(curve: Curve) -> Curve:
    """At most MAXIMUM_POINTS points, each the mean of its bin."""
    if len(curve.steps) <= MAXIMUM_POINTS:
        return curve
    groups: Sequence[np.ndarray] = np.array_split(np.arange(len(curve.steps)), MAXIMUM_POINTS)
    return Curve(
        np.array([curve.steps[group].mean() for group in groups]),
        np.array([curve.values[group].mean() for group in groups]),
    )


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the curve, narrower towards the ends; no lag."""
    reach = np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]).clip(max=len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
