"""A small network that reads known attributes off pictures, so that an edit of any of them can be measured.

Trained on unedited images with their known values. What it cannot read on images that it never saw is not measured:
see `evaluation`. Owns the network and its training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae.applications.directions.known import Attribute

SIDE = 64
"""Of the pictures that it looks at, reduced by averaging."""
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

    centre: Tensor
    scale: Tensor

    def __init__(self, attributes: int, width: int = 24) -> None:
        super().__init__()
        self.trunk = convolutional_trunk(SIDE, width)
        self.heads = nn.Linear(4 * width, attributes)
        self.register_buffer("centre", torch.zeros(attributes))
        self.register_buffer("scale", torch.ones(attributes))

    def forward(self, images: Tensor) -> Tensor:
        return self.heads(self.trunk(images)) * self.scale + self.centre


def train_reader(images: Tensor, attributes: Sequence[Attribute], epochs: int, seed: int = 0) -> AttributeReader:
    """A reader of images (n, 3, 64, 64) in [-1, 1]; values that are not known do not count. The same each time."""
    from tqdm import tqdm

    values = torch.from_numpy(np.stack([attribute.values for attribute in attributes], axis=1)).float()
    known = torch.isfinite(values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = AttributeReader(len(attributes))
        for k in range(len(attributes)):
            column = values[known[:, k], k]
            reader.centre[k], reader.scale[k] = column.mean(), column.std().clamp_min(1e-6)
        values = torch.where(known, values, reader.centre)
        steps = math.ceil(len(images) / BATCH) * epochs
        optimizer = torch.optim.AdamW(reader.parameters(), LEARNING_RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in tqdm(range(epochs), desc="training the reader", unit="epoch", dynamic_ncols=True, leave=False):
            for rows in torch.randperm(len(images)).split(BATCH):
                errors = (reader(images[rows]) - values[rows]) / reader.scale
                loss = (errors.square() * known[rows]).sum() / known[rows].sum().clamp_min(1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return reader.eval().requires_grad_(False)
