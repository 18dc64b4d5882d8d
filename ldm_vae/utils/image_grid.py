"""Contact sheets: many pictures on one page, with a label on each column or each picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 8
MARGIN = 16
PAPER = (250, 250, 248)
INK = (40, 40, 44)


def labeled_sheet(
    images: Sequence[Image.Image],
    labels: Sequence[str] = (),
    side: int = 192,
    maximum_columns: int = 12,
    columns: int | None = None,
) -> Image.Image:
    """Pictures reduced to at most `side` pixels, on light paper.

    Labels that repeat in a cycle (a, b, c, a, b, c, ...) become columns, labeled once at the top; otherwise every
    picture is labeled.

    Args:
        images: Pictures; the first one gives the shape of every cell.
        labels: One per picture, all with the same number of lines, or none at all.
        side: Longest side of a cell in pixels; smaller pictures are not enlarged.
        maximum_columns: The largest number of columns.
        columns: This exact number of columns, with a label on each picture.
    """
    assert images, "labeled_sheet: no images"
    assert len(labels) in (0, len(images)), f"labeled_sheet: {len(labels)} labels for {len(images)} images"
    cycle = 0 if columns else label_cycle(labels, maximum_columns)
    columns = columns or cycle or min(maximum_columns, max(1, math.ceil(math.sqrt(len(images)))))
    rows = math.ceil(len(images) / columns)
    scale = min(1.0, side / max(images[0].size))
    width, height = (max(1, round(length * scale)) for length in images[0].size)
    letter = max(10, min(16, width // 9))
    font = ImageFont.load_default(size=letter)
    lines = labels[0].count("\n") + 1 if labels else 0
    line = math.ceil((1.6 + 1.25 * (lines - 1)) * letter) if labels else 0
    head, foot = (line, 0) if cycle else (0, line)
    sheet = Image.new(
        "RGB",
        (
            2 * MARGIN + columns * (width + GAP) - GAP,
            2 * MARGIN + head + rows * (height + foot + GAP) - GAP,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x = MARGIN + index % columns * (width + GAP)
        y = MARGIN + head + index // columns * (height + foot + GAP)
        sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (x, y))
        if labels and (foot or index < columns):
            text = "\n".join(shortened(words, font, width) for words in labels[index].split("\n"))
            baseline = y + height + foot // 2 if foot else MARGIN + head // 2 - GAP // 4
            draw.text((x + width / 2, baseline), text, font=font, fill=INK, anchor="mm", align="center")
    return sheet


def plain_grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures of one size in rows and columns, separated by white."""
    width, height = rows[0][0].size
    size = (len(rows[0]) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (width + GAP), y * (height + GAP)))
    return sheet


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row, separated by white."""
    return plain_grid([images])


def label_cycle(labels: Sequence[str], longest: int) -> int:
    """Length of the cycle in which distinct labels repeat, at most `longest`; 0 if they do not."""
    period = len(dict.fromkeys(labels))
    if not 1 < period <= longest or any(label != labels[i % period] for i, label in enumerate(labels)):
        return 0
    return period


def shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut with an ellipsis if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."
