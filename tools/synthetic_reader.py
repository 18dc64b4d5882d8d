"""The reader of `measure_synthetic.py`: a small network that tells what a synthetic image shows.

Owns the network, its training on real images whose truth is known, and what it reads: the class, and those attributes
of the scene that can be read in every picture. Nothing here knows of generated images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae.applications.directions.attributes import convolutional_trunk
from ldm_vae.data import transforms
from ldm_vae.data.samples import channels_first
from ldm_vae.data.synthetic.render import LABELS
from ldm_vae.data.synthetic.source import SyntheticConfig, SyntheticSource

LINES = ("x", "y", "size", "roll", "light")
"""Attributes on a line, as `Scene` defines them, but no roll of a ball: a plain one shows none."""
CIRCLES = ("hue", "background_hue")
"""Attributes in turns: 0 and 1 are the same."""
BETWEEN_HUES = "background_hue - hue"
"""Read from the two: the set keeps them a quarter of a turn apart or more."""
ATTRIBUTES = (*LINES, *CIRCLES, BETWEEN_HUES)

FINER = 2
"""Factor by which real images are rendered finer than they are read; they are reduced like generated ones."""
READER_SEED, HELD_OUT_SEED = 1_000_003, 2_000_003
"""Added to the seed of the training set: no scene is in two of the three sets."""
BATCH = 64
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Truth:
    """What n images show: `labels` (n,), int64, and `attributes`, each (n,), float64, by the names in ATTRIBUTES."""

    labels: np.ndarray
    attributes: dict[str, np.ndarray]

    def first(self, count: int) -> Truth:
        return Truth(self.labels[:count], {name: values[:count] for name, values in self.attributes.items()})


def is_circle(name: str) -> bool:
    return name not in LINES


def reader_config(config: SyntheticConfig, count: int) -> SyntheticConfig:
    """The set that the reader learns from: like `config`, with other scenes."""
    return dataclasses.replace(config, seed=config.seed + READER_SEED, count=count)


def held_out_config(config: SyntheticConfig, count: int, resolution: int | None = None) -> SyntheticConfig:
    """The set of held-out real images: like `config`, with scenes that neither it nor the reader's set has."""
    resolution = resolution or config.resolution
    return dataclasses.replace(config, seed=config.seed + HELD_OUT_SEED, count=count, resolution=resolution)


def render(config: SyntheticConfig, side: int, finer: int = FINER) -> tuple[Tensor, Truth]:
    """The images of a set (n, 3, side, side) in [-1, 1], whatever its resolution, and what they show.

    They are rendered with sides of `finer` x `side` pixels and reduced; 1 gives those of the set at `side` itself.
    """
    source = SyntheticSource(dataclasses.replace(config, resolution=finer * side))
    return torch.cat([reduced(source.read(i), side) for i in range(len(source))]), truth_of(source)


def truth_of(source: SyntheticSource) -> Truth:
    labels = np.array([source.label(i) for i in range(len(source))])
    rows = [source.attributes(i) for i in range(len(source))]
    found = {name: np.array([row[name] for row in rows]) for name in (*LINES, *CIRCLES)}
    found["roll"][labels == LABELS.index("ball")] = 0.0
    return Truth(labels, with_relation(found))


def with_relation(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return found | {BETWEEN_HUES: (found["background_hue"] - found["hue"]) % 1.0}


def reduced(image: np.ndarray, side: int) -> Tensor:
    """uint8 (h, w, 3) -> (1, 3, side, side) in [-1, 1], each pixel the mean of those that it covers."""
    return F.interpolate(transforms.from_uint8(channels_first(image))[None], (side, side), mode="area")


class Reader(nn.Module):
    """Images (n, 3, side, side) -> class scores, lines (standardised), and (cosine, sine) of each circle."""

    def __init__(self, side: int, width: int = 32) -> None:
        super().__init__()
        self.side = side
        self.trunk = convolutional_trunk(side, width)
        self.heads = nn.Linear(4 * width, len(LABELS) + len(LINES) + 2 * len(CIRCLES))
        self.register_buffer("centre", torch.zeros(len(LINES)))
        self.register_buffer("spread", torch.ones(len(LINES)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.heads(self.trunk(images))
        scores, lines, circles = out.split([len(LABELS), len(LINES), 2 * len(CIRCLES)], dim=1)
        return scores, lines, circles

    @torch.no_grad()
    def read(self, images: Tensor) -> Truth:
        """What images (n, 3, side, side) in [-1, 1] show, in the units of `Scene`."""
        self.eval()
        parts = [self(part) for part in images.split(256)]
        scores, lines, circles = (torch.cat(each) for each in zip(*parts))
        lines = (lines * self.spread + self.centre).double()
        found = {name: lines[:, k].numpy() for k, name in enumerate(LINES)}
        for k, name in enumerate(CIRCLES):
            cosine, sine = circles[:, 2 * k].double(), circles[:, 2 * k + 1].double()
            found[name] = (torch.atan2(sine, cosine) / (2 * math.pi)).numpy() % 1.0
        return Truth(scores.argmax(1).numpy(), with_relation(found))


def train_reader(images: Tensor, truth: Truth, epochs: int, width: int = 32) -> Reader:
    """A reader of images (n, 3, side, side) that show `truth`; `width` is that of its first layer."""
    torch.manual_seed(0)
    reader = Reader(images.shape[-1], width)
    lines = torch.tensor(np.stack([truth.attributes[name] for name in LINES], 1), dtype=torch.float32)
    reader.centre, reader.spread = lines.mean(0), lines.std(0)
    angles = 2 * math.pi * torch.tensor(np.stack([truth.attributes[name] for name in CIRCLES], 1), dtype=torch.float32)
    wanted = (
        torch.from_numpy(truth.labels),
        (lines - reader.centre) / reader.spread,
        torch.stack([angles.cos(), angles.sin()], 2).flatten(1),
    )
    optimizer = torch.optim.AdamW(reader.parameters(), LEARNING_RATE, weight_decay=1e-2)
    steps = math.ceil(len(images) / BATCH) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        reader.train()
        for rows in torch.randperm(len(images)).split(BATCH):
            scores, read_lines, read_circles = reader(images[rows])
            loss = F.cross_entropy(scores, wanted[0][rows])
            loss = loss + F.mse_loss(read_lines, wanted[1][rows]) + F.mse_loss(read_circles, wanted[2][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return reader


def reading_errors(read: Truth, truth: Truth) -> dict[str, Any]:
    """How far readings are from the truth.

    Returns:
        `recognised`: the share of right classes; `errors`: by attribute the median absolute error, in turns for
        circles; `correlations`: by attribute, on circles the length of the mean of exp(2 pi i error).
    """
    errors, correlations = {}, {}
    for name in ATTRIBUTES:
        apart = read.attributes[name] - truth.attributes[name]
        if is_circle(name):
            apart = (apart + 0.5) % 1.0 - 0.5
            correlations[name] = float(abs(np.exp(2j * math.pi * apart).mean()))
        else:
            correlations[name] = float(np.corrcoef(read.attributes[name], truth.attributes[name])[0, 1])
        errors[name] = float(np.median(np.abs(apart)))
    recognised = float((read.labels == truth.labels).mean())
    return {"recognised": recognised, "errors": errors, "correlations": correlations}


def largest_gap(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, circle: bool) -> float:
    """Distance of the distributions of two samples, 0 to 1: Kolmogorov and Smirnov's, on a circle Kuiper's.

    It is the largest difference of the shares that any half-line (any arc) holds: so much of one sample would have to
    move to make the other.
    """
    places = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(sample), places, side="right") / len(sample) for sample in (first, second)]
    gaps = shares[0] - shares[1]
    return float(max(gaps.max(), 0.0) - min(gaps.min(), 0.0)) if circle else float(np.abs(gaps).max())
