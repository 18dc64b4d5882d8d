"""What the HTML pages share: one template environment, one style sheet (`templates/style.css`), embedded pictures.

A page is one file that loads nothing: pictures are data URIs. What a page says belongs to its own module and template.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_vae.data.split import NEVER_TRAINED_ON
from ldm_vae.utils.text import Table

if TYPE_CHECKING:
    from jinja2 import Environment
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
    environment.globals["never_trained_on"] = NEVER_TRAINED_ON
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


def image_label(path: Path, folder: Path) -> str:
    """The label that `generate` wrote into the picture, else the one in its name.

    `0003_red-ball_1.png` and `red-ball/0003.png` are both `red ball`; a bare number has no label.
    """
    from PIL import Image

    with Image.open(path) as file:
        written = getattr(file, "text", {}).get("parameters")
    if written:
        return str(json.loads(written).get("label") or "")
    word = re.sub(r"^\d+(?:[_-]+|$)|[_-]+\d+$", "", path.stem)
    if not word and path.parent != folder:
        word = path.parent.name
    return word.replace("_", " ").replace("-", " ").strip()
