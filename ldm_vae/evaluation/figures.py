"""The look of every plot, and turning a matplotlib figure into SVG that follows a page's light or dark.

Owns style and embedding; what is drawn belongs to the module that measured it. Figures are made without pyplot, so
nothing global is touched. Ink is drawn in two stand-in colours that the SVG replaces by CSS variables.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_vae.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE = "#010203", "#040506"
"""Text and axes; grid lines. Replaced by var(--ink) and var(--rule) in the SVG."""

COLOURS = ("#17696a", "#bf5b21", "#5b6dae", "#8f4f87", "#7d8a2e", "#a8433e", "#3f8fb5", "#9b7a3c")
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
    """No box, faint grid, stand-in colours for everything that is ink."""
    axes.set_facecolor("none")
    axes.set_prop_cycle(color=list(COLOURS))
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
