"""What the HTML pages share: one template environment, one style sheet (`templates/style.css`), embedded pictures.

A page is one file that loads nothing: pictures are data URIs. What a page says belongs to its own module and template.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_vae.files import write_text
from ldm_vae.utils.markdown import Table

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

WEBP_QUALITY = 90
MAXIMUM_SIDE = 512
LOSSLESS_SIDE = 96


@dataclass(frozen=True)
class Picture:
    """An embedded picture: `uri` is a data URI, `text` its alternative text."""

    uri: str
    text: str
    width: int
    height: int


@dataclass(frozen=True)
class Drawing:
    """An `<svg>` element and its caption."""

    svg: str
    caption: str


def template_environment() -> Environment:
    """Jinja over the package's templates: escaped, an undefined name is an error, with the filters of all pages."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("ldm_vae.evaluation"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "quantity": quantity, "signed": signed}
    return environment


def embed(path: Path, text: str) -> Picture:
    """A picture file as WebP in a data URI: at most 512 pixels, quality 90, or lossless when tiny."""
    from PIL import Image

    with Image.open(path) as file:
        return embed_image(file.convert("RGB"), text)


def embed_image(image: Image, text: str, maximum_side: int | None = MAXIMUM_SIDE) -> Picture:
    """The same for an RGB picture in memory; `maximum_side` in pixels, None leaves its size."""
    from PIL.Image import Resampling

    small = max(image.size) <= LOSSLESS_SIDE
    if maximum_side is not None and max(image.size) > maximum_side:
        image = image.copy()
        image.thumbnail((maximum_side, maximum_side), Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, lossless=small, method=4)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/webp;base64,{data}", text, *image.size)


def plain_page(
    title: str,
    lead: str,
    sentences: Sequence[str],
    drawings: Sequence[Drawing] = (),
    tables: Sequence[Table] = (),
    pictures: Sequence[Picture] = (),
) -> str:
    """A page of sentences, drawings, tables and pictures; every text is escaped, the SVG is not."""
    from markupsafe import Markup

    return (
        template_environment()
        .get_template("sweep.html")
        .render(
            title=title,
            lead=lead,
            sentences=list(sentences),
            drawings=[(Markup(drawing.svg), drawing.caption) for drawing in drawings],
            tables=list(tables),
            pictures=list(pictures),
        )
    )


def duration(seconds: float) -> str:
    """`48 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def quantity(number: float) -> str:
    """`950`, `2,000`, `2.7 million`."""
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,.0f}"


def signed(number: float) -> str:
    """Two digits with a sign, a true minus."""
    return f"{number:+.2f}".replace("-", "−")


# The look of every plot, and turning a matplotlib figure into SVG that follows a page's light or dark.

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
    """No box, faint grid, stand-in colors for everything that is ink."""
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
