"""Attributes of images as numbers, from wherever they are known.

    labels, tables, scenes of the synthetic set   -> `collect`
    pixels (brightness, saturation, sharpness ...) -> `measure`
    pictures without known attributes              -> `AttributeReader`, a small network

A class is yes or no against all others, a number stays one, a circle (hue in turns) is its cosine and its sine.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae.data.folder import FILE_COLUMNS, LABEL_COLUMNS
from ldm_vae.data.sources import ImageSource
from ldm_vae.data.synthetic.render import TEXTURES
from ldm_vae.data.synthetic.source import SyntheticSource
from ldm_vae.errors import UserError
from ldm_vae.utils.progress import track
from ldm_vae.utils.text import pluralize

PIXELS, LABELS, SCENE = "pixels", "labels", "scene"
"""Where attributes come from, besides tables."""
LEAST_IMAGES = 20
"""With a known value, or of a class and outside of it together, before a direction is fitted."""
LEAST_OF_CLASS = 5
SCENE_NUMBERS = ("x", "y", "size", "roll", "light")
SCENE_CIRCLES = ("hue", "background_hue")
"""In turns; what has no effect in most pictures (spin, phase) is left out."""
MAXIMUM_TABLE_BYTES = 1 << 28


@dataclass(frozen=True)
class Attribute:
    """One number for each of n images.

    Attributes:
        values: (n,) float64, NaN where it is not known.
        binary: the values are 0 (no) and 1 (yes).
    """

    name: str
    values: np.ndarray
    binary: bool

    @property
    def known(self) -> np.ndarray:
        """(n,) bool."""
        return np.isfinite(self.values)

    def at(self, rows: np.ndarray) -> Attribute:
        return Attribute(self.name, self.values[rows], self.binary)

    def problem(self) -> str | None:
        """Why no direction can be fitted to it; None where one can."""
        values = self.values[self.known]
        if len(values) < LEAST_IMAGES:
            return f"is known of {pluralize(len(values), 'image')}, {LEAST_IMAGES} are the least"
        if values.min() == values.max():
            return f"is the same in all {len(values)} images ({values[0]:g})"
        if self.binary and min(values.sum(), len(values) - values.sum()) < LEAST_OF_CLASS:
            return f"has {int(values.sum())} images of {len(values)}, {LEAST_OF_CLASS} inside and outside are the least"
        return None


def collect_attributes(
    origins: Sequence[str],
    source: ImageSource | None,
    indices: Sequence[int],
    ids: Sequence[str],
    labels: np.ndarray,
    label_names: Sequence[str],
    pixels: Sequence[Mapping[str, Tensor]] = (),
    circles: Sequence[str] = (),
) -> list[Attribute]:
    """The attributes of n images.

    Args:
        origins: `pixels`, `labels`, `scene`, or paths of tables.
        source, indices: of the images, for scenes; None: there are latents only.
        labels: int64 (n,), -1 for none.
        pixels: what `measure` found, batch by batch.
        circles: columns of tables that are in turns.

    Raises:
        UserError: an origin that says nothing of these images, or two attributes of one name.
    """
    found: list[Attribute] = []
    for origin in origins:
        if origin == SCENE:
            if not isinstance(source, SyntheticSource):
                raise UserError("attributes_from: scene needs the images of data.source=synthetic; leave it out")
            found += of_scenes(source, indices)
        elif origin == LABELS:
            found += of_classes(labels, label_names, LABELS)
        elif origin == PIXELS:
            found += [
                Attribute(name, torch.cat([one[name] for one in pixels]).double().cpu().numpy(), False)
                for name in MEASURED
            ]
        else:
            found += of_table(origin, ids, circles)
    return distinct(found)


def distinct(attributes: list[Attribute]) -> list[Attribute]:
    """Raises: UserError when two have one name."""
    names = [attribute.name for attribute in attributes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"attributes_from: {name!r} comes from two places; rename a column, or leave one out")
    return attributes


def of_classes(labels: np.ndarray, names: Sequence[str], where: str) -> list[Attribute]:
    """One attribute for each class, against all others; labels (n,) int64, -1 (not known) for none.

    Raises:
        UserError: fewer than two classes among the images.
    """
    found = sorted({int(label) for label in labels if label >= 0})
    if len(found) < 2:
        what = f"one class only ({names[found[0]]!r})" if found else "no labels"
        raise UserError(
            f"{where}: {what} among {pluralize(len(labels), 'image')}; a direction needs at least two classes"
        )
    labels = np.asarray(labels)
    return [Attribute(names[k], np.where(labels < 0, np.nan, (labels == k).astype(float)), True) for k in found]


def of_scenes(source: SyntheticSource, indices: Sequence[int]) -> list[Attribute]:
    """The known truth of the synthetic set: place, size, roll, light, both hues and the texture."""
    rows = [source.attributes(index) for index in indices]
    found = [Attribute(name, np.array([row[name] for row in rows]), False) for name in SCENE_NUMBERS]
    for name in SCENE_CIRCLES:
        found += of_circle(name, np.array([row[name] for row in rows]))
    textures = np.array([int(row["texture"]) for row in rows])
    plain = (textures != TEXTURES.index("plain")).astype(float)
    return [*found, Attribute("textured", plain, True)]


def of_circle(name: str, turns: np.ndarray) -> list[Attribute]:
    """Turns (n,) -> `NAME.cos` and `NAME.sin`."""
    angle = 2 * math.pi * turns
    return [Attribute(f"{name}.cos", np.cos(angle), False), Attribute(f"{name}.sin", np.sin(angle), False)]


def of_table(path: str | Path, ids: Sequence[str], circles: Sequence[str] = ()) -> list[Attribute]:
    """The columns of a CSV or JSONL file for images with these ids: a column of numbers is one attribute, of words one
    for each word. `circles`: columns in turns.

    Raises:
        UserError: no such file, no column that names the images, or none of these images in it.
    """
    rows = read_table(Path(path))
    columns = list(dict.fromkeys(column for row in rows for column in row if column is not None))
    named = [column for column in ("id", *FILE_COLUMNS) if column in columns]
    if not named:
        raise UserError(f"{path}: no column names the images; give one called {', '.join(FILE_COLUMNS)} or id")
    known: dict[str, dict[str, Any]] = {}
    for column in named:
        known |= {str(PurePosixPath(str(row.get(column)).replace("\\", "/"))): row for row in rows}
    found = [known.get(id) for id in ids]
    if not any(found):
        example = rows[0].get(named[0])
        raise UserError(
            f"{path}: names none of the {len(ids)} images, for example {example!r} and no {ids[0]!r}; give "
            "paths relative to the folder of images, or ids"
        )
    columns = [column for column in columns if column not in named]
    for column in circles:
        if column not in columns:
            raise UserError(f"circles: {column!r} is not a column of {path}; there are {', '.join(columns)}")
    attributes = []
    for column in columns:
        cells = [None if row is None else row.get(column) for row in found]
        attributes += _of_column(column, cells, column in circles)
    return attributes


def _of_column(name: str, cells: Sequence[Any], circle: bool) -> list[Attribute]:
    texts = [None if cell is None or str(cell).strip() == "" else str(cell).strip() for cell in cells]
    try:
        if name in LABEL_COLUMNS:
            raise ValueError(f"{name} holds classes even where they are numbers")
        numbers = np.array([math.nan if text is None else float(text) for text in texts])
    except ValueError:
        words = sorted({text for text in texts if text is not None})
        prefix = "" if name in LABEL_COLUMNS else f"{name}="
        return [
            Attribute(
                f"{prefix}{word}", np.array([math.nan if text is None else float(text == word) for text in texts]), True
            )
            for word in words
        ]
    if circle:
        return of_circle(name, numbers)
    binary = set(numbers[np.isfinite(numbers)].tolist()) <= {0.0, 1.0}
    return [Attribute(name, numbers, binary)]


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a .csv or .jsonl file, at least one. Raises: UserError."""
    try:
        if path.stat().st_size > MAXIMUM_TABLE_BYTES:
            raise UserError(f"{path}: is larger than {MAXIMUM_TABLE_BYTES} bytes; give a table of attributes")
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a .csv or .jsonl file") from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write it as UTF-8 .csv or .jsonl") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: holds no rows of attributes; give a .csv with a header, or .jsonl")
    return rows


# Attributes that pixels alone tell: brightness, contrast, saturation, the two axes of hue, sharpness.

MEASURED = ("brightness", "contrast", "saturation", "red_green", "yellow_blue", "sharpness")

LINEAR_TO_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
CONES_TO_OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
FLAT = 1e-3
"""Standard deviation of lightness below which there is nothing to be sharp."""


def oklab(images: Tensor) -> Tensor:
    """Images (n, 3, h, w) in [-1, 1] -> lightness 0 to 1, green-red and blue-yellow about -0.4 to 0.4, same shape."""
    encoded = (images.float().clamp(-1, 1) + 1) / 2
    linear = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    cones = torch.einsum("ij,njhw->nihw", torch.tensor(LINEAR_TO_CONES, device=images.device), linear)
    return torch.einsum("ij,njhw->nihw", torch.tensor(CONES_TO_OKLAB, device=images.device), cones ** (1 / 3))


def measure_attributes(images: Tensor) -> dict[str, Tensor]:
    """The attributes of images (n, 3, h, w) in [-1, 1], each (n,).

    Returns:
        brightness: mean lightness, 0 black to 1 white; contrast: standard deviation of the lightness; saturation: mean
        chroma, 0 gray to about 0.3; red_green, yellow_blue: mean of the two color axes, positive for red and yellow;
        sharpness: mean absolute step of the lightness to the right and below, relative to the contrast, so that a
        picture of more contrast is not sharper; it depends on the resolution.
    """
    lightness, red_green, yellow_blue = oklab(images).unbind(1)
    contrast = lightness.std(dim=(1, 2), correction=0)
    steps = (lightness.diff(dim=2).abs().mean(dim=(1, 2)) + lightness.diff(dim=1).abs().mean(dim=(1, 2))) / 2
    return {
        "brightness": lightness.mean(dim=(1, 2)),
        "contrast": contrast,
        "saturation": torch.hypot(red_green, yellow_blue).mean(dim=(1, 2)),
        "red_green": red_green.mean(dim=(1, 2)),
        "yellow_blue": yellow_blue.mean(dim=(1, 2)),
        "sharpness": torch.where(contrast > FLAT, steps / contrast.clamp_min(FLAT), torch.zeros_like(steps)),
    }


# A small network that reads known attributes off pictures, so that an edit of any of them can be measured.

SIDE = 64
"""Side in pixels of its input pictures, reduced by averaging."""
BATCH = 64
LEARNING_RATE = 2e-3


def convolutional_trunk(side: int, width: int) -> nn.Sequential:
    """Images (n, 3, side, side) -> features (n, 4 width). Where things are is kept: no pooling over positions."""
    layers: list[nn.Module] = []
    channels, remaining = 3, side
    for number in range(4):
        wider = width * (number + 1)
        layers += [nn.Conv2d(channels, wider, 5 if number == 0 else 3, 2, 2 if number == 0 else 1)]
        layers += [nn.BatchNorm2d(wider), nn.SiLU()]
        channels, remaining = wider, math.ceil(remaining / 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * remaining**2, 4 * width), nn.SiLU())


def reduced(images: Tensor) -> Tensor:
    """Images (n, 3, h, w) of at least 64 pixels -> (n, 3, 64, 64), each pixel the mean of those that it covers."""
    return F.interpolate(images.float(), (SIDE, SIDE), mode="area")


class AttributeReader(nn.Module):
    """Images (n, 3, 64, 64) in [-1, 1] -> attributes (n, k), in their own units; yes or no as 1 or 0, not rounded."""

    center: Tensor
    scale: Tensor

    def __init__(self, attributes: int, width: int = 24) -> None:
        super().__init__()
        self.trunk = convolutional_trunk(SIDE, width)
        self.heads = nn.Linear(4 * width, attributes)
        self.register_buffer("center", torch.zeros(attributes))
        self.register_buffer("scale", torch.ones(attributes))

    def forward(self, images: Tensor) -> Tensor:
        return self.heads(self.trunk(images)) * self.scale + self.center


def train_reader(images: Tensor, attributes: Sequence[Attribute], epochs: int, seed: int = 0) -> AttributeReader:
    """A reader of images (n, 3, 64, 64) in [-1, 1]; values that are not known do not count. The same each time."""
    values = torch.from_numpy(np.stack([attribute.values for attribute in attributes], axis=1)).float()
    known = torch.isfinite(values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = AttributeReader(len(attributes))
        for k in range(len(attributes)):
            column = values[known[:, k], k]
            reader.center[k], reader.scale[k] = column.mean(), column.std().clamp_min(1e-6)
        values = torch.where(known, values, reader.center)
        steps = math.ceil(len(images) / BATCH) * epochs
        optimizer = torch.optim.AdamW(reader.parameters(), LEARNING_RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in track(range(epochs), "training the reader", "epoch"):
            for rows in torch.randperm(len(images)).split(BATCH):
                errors = (reader(images[rows]) - values[rows]) / reader.scale
                loss = (errors.square() * known[rows]).sum() / known[rows].sum().clamp_min(1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return reader.eval().requires_grad_(False)
