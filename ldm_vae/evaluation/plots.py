"""Plots as SVG: their common look, and the training curves of a run from `metrics.jsonl`."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm_vae.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The look of every plot, and turning a matplotlib figure into SVG that follows a page's light or dark.

INK, RULE = "#010203", "#040506"
"""Text and axes; grid lines. Replaced by var(--ink) and var(--rule) in the SVG."""

COLORS = ("#17696a", "#bf5b21", "#5b6dae", "#8f4f87", "#7d8a2e", "#a8433e", "#3f8fb5", "#9b7a3c")
"""For one series after another; readable on light and on dark."""


def new_figure(width: float = 5.2, height: float = 3.0, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `columns` axes side by side, each `width` x `height` inches, in the package's look."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for each in axes:
        style(each)
    return figure, axes


def style(axes: Axes) -> None:
    """No box, faint grid, stand-in colors for everything that is ink."""
    axes.set_facecolor("none")
    axes.set_prop_cycle(color=list(COLORS))
    axes.grid(True, color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)
        text.set_fontsize(10)


def legend(axes: Axes) -> None:
    """A legend without a frame, where there is something to name."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def to_svg(figure: Figure, label: str) -> str:
    """An `<svg>` element with text as text, the same bytes for the same figure. `label`: for who cannot see it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "var(--ink, #1f1e1b)").replace(RULE, "var(--rule, #e5e1d8)")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # nothing but web addresses
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def save_svg(figure: Figure, path: Path, label: str) -> None:
    """A stand-alone SVG file on white, for Markdown pages; of one size, or a single panel would fill the page."""
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    sized = f'<svg style="background: #fff" width="{width}" height="{height}"'
    svg = to_svg(figure, label).replace("<svg", sized, 1)
    write_text(path, '<?xml version="1.0" encoding="utf-8"?>\n' + svg)


# Training curves.

MAXIMUM_POINTS = 240
"""Points drawn per curve; longer runs are averaged in bins, so the page stays small."""
LOGARITHMIC_SPAN = 8.0
LONG_CURVE = 100
"""With this number of points or more, a single extreme value counts as a spike and does not set the scale."""
CLASSES = ("raw", "line", "held-out", "target", "alarm")
"""What a panel draws; the classes of its groups in the SVG."""


@dataclass(frozen=True)
class Curve:
    """One logged quantity: `steps` (n,) rising and finite `values` (n,)."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class RecordedAlarm:
    """What training warned of: the verdict's name and its sentence."""

    step: int
    verdict: str
    sentence: str


@dataclass(frozen=True)
class Panel:
    """One plot: a `train` curve, a `held_out` curve, a `target` level, a mark at each alarm.

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
    alarms: tuple[RecordedAlarm, ...] = ()


def read_metrics(path: Path) -> dict[str, Curve]:
    """Key -> curve of a `metrics.jsonl`; empty when there is no such file.

    A line cut off by a crash, text and non-finite values are skipped; a step logged twice (a resumed run) keeps the
    later value.
    """
    points: dict[str, dict[int, float]] = {}
    for step, record in _records(path):
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                points.setdefault(key, {})[step] = float(value)
    return {
        key: Curve(np.array(sorted(found)), np.array([found[step] for step in sorted(found)]))
        for key, found in points.items()
    }


def read_alarms(path: Path) -> list[RecordedAlarm]:
    """The alarms of a `metrics.jsonl` by step; one that a resumed run repeats counts once."""
    found = {}
    for step, record in _records(path):
        sentence = record.get("alarm")
        if isinstance(sentence, str):
            alarm = RecordedAlarm(step, str(record.get("verdict") or "alarm"), sentence)
            found[alarm.step, alarm.verdict, alarm.sentence] = alarm
    return sorted(found.values(), key=lambda alarm: (alarm.step, alarm.verdict))


def _records(path: Path) -> list[tuple[int, dict[str, object]]]:
    found = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            found.append((int(record.pop("step")), record))
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError):
            continue
    return found


def autoencoder_panels(
    metrics: Mapping[str, Curve], rate_target_nats: float | None = None, alarms: Sequence[RecordedAlarm] = ()
) -> list[Panel]:
    """Both loss terms apart, and any further term; the weight between them; quality on held-out images; health."""
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
            "The controller moves this weight until the rate sits at its target."
            if rate_target_nats
            else "As the settings say.",
            metrics.get("rate/beta"),
            noisy=False,
        ),
        Panel(
            "Held-out quality",
            "PSNR in dB",
            "Reconstruction of images that training never sees; higher is better.",
            held_out=metrics.get("held_out/psnr"),
        ),
        Panel(
            "Quietest channel",
            "KL in nats per dimension",
            "The latent channel that says least; near zero it is dead.",
            metrics.get("health/least_channel_nats"),
        ),
        Panel(
            "Hottest position",
            "standard deviations of its channel",
            "The largest latent value of a batch; far above ten something global hides in single positions.",
            metrics.get("health/hottest_sigmas"),
        ),
        _learning_rate(metrics),
    ]
    return [replace(panel, alarms=tuple(alarms)) for panel in panels if panel.train or panel.held_out]


def diffusion_panels(metrics: Mapping[str, Curve]) -> list[Panel]:
    """The flow-matching loss on both parts, and the learning rate."""
    loss = Panel(
        "Flow loss",
        "mean squared velocity error",
        "Training and held-out loss: a widening gap would mean that the network memorizes its images.",
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
        "Of every optimizer step: a rise, then a fall along a cosine.",
        metrics.get("optim/lr"),
        noisy=False,
        logarithmic=False,
    )


def render_svg(panel: Panel) -> str:
    """One panel as an `<svg>` element; what it draws stands in groups of the classes `CLASSES`."""
    figure, (axes,) = new_figure(height=2.9)
    draw_panel(axes, panel)
    return page_svg(figure, f"{panel.title}, {panel.unit}")


def draw_panel(axes: Axes, panel: Panel) -> None:
    """The curves, the target and the alarms of a panel, without its title."""
    train = panel.train and bin_means(panel.train)
    held_out = panel.held_out and bin_means(panel.held_out)
    smooth = train and (Curve(train.steps, running_mean(train.values)) if panel.noisy else train)
    drawn = [curve for curve in (smooth, held_out) if curve]
    _scale(axes, _levels(panel, train, drawn), panel.logarithmic)
    axes.set_xlim(0, float(max(curve.steps[-1] for curve in drawn)) or 1.0)
    axes.margins(x=0)
    alone = held_out is None and panel.target is None
    if train and smooth:
        if smooth is not train:
            axes.plot(train.steps, train.values, color=COLORS[0], linewidth=0.8, alpha=0.3, gid="raw")
        label = None if alone else "training"
        axes.plot(smooth.steps, smooth.values, color=COLORS[0], linewidth=1.7, gid="line", label=label)
    if held_out:
        (line,) = axes.plot(
            held_out.steps, held_out.values, color=COLORS[1], linewidth=1.5, gid="held-out", label="held out"
        )
        if len(held_out.steps) <= 40:
            line.set(marker="o", markersize=3.5, clip_on=False)
    if panel.target is not None:
        axes.axhline(panel.target, color=INK, linewidth=1.0, linestyle=(0, (1, 3)), gid="target", label="target")
    _mark_alarms(axes, panel.alarms)
    legend(axes)


def page_svg(figure: Figure, label: str) -> str:
    """`figures.to_svg` for a page of many: matplotlib numbers its groups from 1 in each, and an id must be unique.

    Groups named in `CLASSES` by their gid get that class.
    """

    def classed(match: re.Match[str]) -> str:
        return f'<g class="{match[1]}"' if match[1] in CLASSES else "<g"

    return re.sub(r'<g id="([^"]*)"', classed, to_svg(figure, label))


def _mark_alarms(axes: Axes, alarms: Sequence[RecordedAlarm]) -> None:
    """A dashed line at each step with an alarm, the verdicts' names along it."""
    steps = sorted({alarm.step for alarm in alarms})
    last = axes.get_xlim()[1]
    for step in steps:
        if step > last:
            continue
        names = ", ".join(sorted({alarm.verdict for alarm in alarms if alarm.step == step}))
        axes.axvline(step, color=COLORS[5], linewidth=1.0, linestyle=(0, (4, 3)), gid="alarm")
        axes.annotate(
            names, (step, 0.02), xycoords=("data", "axes fraction"), xytext=(-2, 0), textcoords="offset points",
            rotation=90, ha="right", va="bottom", fontsize=7.5, color=COLORS[5],
        )  # fmt: skip


def _levels(panel: Panel, train: Curve | None, drawn: Sequence[Curve]) -> np.ndarray:
    """What the vertical axis has to hold: the curves, of a noisy one all but its spikes, the target."""
    levels = np.concatenate([curve.values for curve in drawn])
    if train and panel.noisy:
        values = train.values
        if len(values) >= LONG_CURVE:
            values = values.clip(*np.quantile(values, [0.005, 0.995], method="closest_observation"))
        held_out = [curve.values for curve in drawn[1:]]
        levels = np.concatenate([running_mean(values), np.quantile(values, [0.02, 0.98]), *held_out])
    return levels if panel.target is None else np.append(levels, panel.target)


def _scale(axes: Axes, levels: np.ndarray, logarithmic: bool) -> None:
    """Limits and ticks; logarithmic where that is allowed and positive values span a factor of eight."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = float(levels.min()), float(levels.max())
    if logarithmic and low > 0 and high / low >= LOGARITHMIC_SPAN:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
        decades = math.log10(high / low)
        subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 3.5 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        axes.set_ylim(max(low - room, 0.0) if low >= 0 else low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: step_label(value)))


def step_label(step: float) -> str:
    """`step 0`, `500`, `20k`."""
    text = f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"
    return f"step {text}" if step == 0 else text


def number(value: float) -> str:
    """A tick label: at most four digits, small values as 1.5e−3, with a true minus sign."""
    if value != 0 and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def bin_means(curve: Curve) -> Curve:
    """At most MAXIMUM_POINTS points, each the mean of its bin."""
    if len(curve.steps) <= MAXIMUM_POINTS:
        return curve
    groups: Sequence[np.ndarray] = np.array_split(np.arange(len(curve.steps)), MAXIMUM_POINTS)
    return Curve(
        np.array([curve.steps[group].mean() for group in groups]),
        np.array([curve.values[group].mean() for group in groups]),
    )


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centered window of a twentieth of the curve, narrower toward the ends; no lag."""
    reach = np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]).clip(max=len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
