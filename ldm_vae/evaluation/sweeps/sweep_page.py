"""The page of a sweep: drawings, tables and pictures in one HTML file; words and look are in `templates/sweep.html`.

Owns rendering only; what is shown is handed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ldm_vae.evaluation.html_pages import Picture, template_environment


@dataclass(frozen=True)
class Drawing:
    """An `<svg>` element and its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Cells as text; `notes` stand below."""

    headings: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def render(
    title: str,
    lead: str,
    sentences: Sequence[str],
    drawings: Sequence[Drawing] = (),
    tables: Sequence[Table] = (),
    pictures: Sequence[Picture] = (),
) -> str:
    """The page as HTML; every text is escaped, the SVG is not."""
    from markupsafe import Markup

    environment = template_environment()
    return environment.get_template("sweep.html").render(
        title=title,
        lead=lead,
        sentences=list(sentences),
        drawings=[(Markup(drawing.svg), drawing.caption) for drawing in drawings],
        tables=list(tables),
        pictures=list(pictures),
    )


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * len(headings),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]
