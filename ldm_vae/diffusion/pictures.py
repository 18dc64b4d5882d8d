"""Which images a call of `generate` makes: for each one its class, its noise and its file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ldm_vae.diffusion.arguments import image_generator
from ldm_vae.diffusion.guidance import EVERYWHERE
from ldm_vae.diffusion.interpolation import between_noises, shares
from ldm_vae.diffusion.labels import Mixture, find_label
from ldm_vae.errors import UserError
from ldm_vae.latents.words import counted


@dataclass(frozen=True)
class GenerationConfig:
    """What decides the images.

    Attributes:
        model: A pipeline directory, or the run directory of `train-diffusion`.
        labels: Names or ids, taken in turn; none: every class of the model in turn.
        count: Images; with `grid` rows of them, of one image per label.
        seed: Image i starts from the noise of (seed, i).
        steps: Steps of the sampler.
        sampler: euler, heun, dpm++ or unipc; None: the pipeline's scheduler.
        guidance: Strength of classifier-free guidance; None: 3 for a model with classes.
        guidance_interval: Lowest and highest t in [0, 1] at which guidance acts.
        guidance_rescale: 0 to 1, against the strong colours of strong guidance.
        autoguidance: Strength of autoguidance, for a pipeline with a second U-Net.
        grid: Every label from the same noise: what the label changes.
        interpolate: Two seeds, or two labels; `count` images from the one to the other.
        init: File of an image to start from.
        strength: Share of the steps that it goes through; None: 0.6, or 1 with a mask.
        mask: File of a picture of its size, white where it is to be painted anew.
        height, width: Pixels; None: the size of the training images.
        precision: Of the networks. Sampling itself is float32.
    """

    model: str
    labels: tuple[str, ...] = ()
    count: int = 16
    seed: int = 0
    steps: int = 30
    sampler: str | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] = EVERYWHERE
    guidance_rescale: float = 0.0
    autoguidance: float = 1.0
    grid: bool = False
    interpolate: tuple[str, str] | None = None
    init: str | None = None
    strength: float | None = None
    mask: str | None = None
    height: int | None = None
    width: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count: {self.count} is below 1")
        if self.count < len(self.labels) and not self.grid:
            raise UserError(
                f"count: {counted(self.count, 'image')} for {len(self.labels)} labels; give at least one per label"
            )
        if self.steps < 1:
            raise UserError(f"steps: {self.steps} is below 1")
        if self.grid and self.interpolate:
            raise UserError("grid: and interpolate ask for different images; give one of them")
        for name in ("strength", "mask"):
            if getattr(self, name) is not None and self.init is None:
                raise UserError(f"{name}: has no effect without an image; give init, or leave it out")


@dataclass(frozen=True)
class Noise:
    """What an image starts from: the noise of (seed, number), or one on the way from there to another seed's."""

    seed: int
    number: int
    towards: int | None = None
    share: float = 0.0

    def draw(self, shape: Sequence[int]) -> Tensor:
        """(c, h, w), standard normal, on the CPU."""
        noise = torch.randn(*shape, generator=image_generator(self.seed, self.number))
        if self.towards is None:
            return noise
        other = torch.randn(*shape, generator=image_generator(self.towards, self.number))
        return between_noises(noise, other, self.share)


Row = tuple[Mixture | None, str | None, Noise]
"""Classes, caption and noise of an image."""


@dataclass(frozen=True)
class Picture:
    """One image to make; `classes` is None for a model without them, `caption` what the sheet says."""

    index: int
    classes: Mixture | None
    caption: str | None
    noise: Noise
    path: Path


def plan(config: GenerationConfig, names: Sequence[str], folder: Path) -> list[Picture]:
    """Every image, in the order of the sheet.

    Raises:
        UserError: an unknown label, or seeds and labels that do not go together.
    """
    wanted = [names[find_label(label, names)] for label in config.labels] or list(names)
    rows: list[Row]
    if config.interpolate:
        rows = _interpolation(config, config.interpolate, names)
    elif config.grid:
        if len(wanted) < 2:
            raise UserError(f"grid: {len(wanted)} classes to compare; give two labels or more")
        rows = [({label: 1.0}, label, Noise(config.seed, n)) for n in range(config.count) for label in wanted]
    elif wanted:
        turn = [wanted[index % len(wanted)] for index in range(config.count)]
        rows = [({label: 1.0}, label, Noise(config.seed, index)) for index, label in enumerate(turn)]
    else:
        rows = [(None, None, Noise(config.seed, index)) for index in range(config.count)]
    return [
        Picture(index, classes, caption, noise, folder / file_name(index, caption))
        for index, (classes, caption, noise) in enumerate(rows)
    ]


def _interpolation(config: GenerationConfig, ends: tuple[str, str], names: Sequence[str]) -> list[Row]:
    """Whole numbers are seeds, anything else is a label."""
    places = shares(config.count)
    if all(end.isdecimal() for end in ends):
        if names and len(config.labels) != 1:
            raise UserError("interpolate: between two seeds the label stays the same; give one label")
        label = names[find_label(config.labels[0], names)] if names else None
        classes = None if label is None else {label: 1.0}
        first, last = (int(end) for end in ends)
        return [(classes, label, Noise(first, 0, last, share)) for share in places]
    if config.labels:
        raise UserError("interpolate: its two labels are all labels there are; leave out the others")
    first_label, last_label = (names[find_label(end, names)] for end in ends)
    if first_label == last_label:
        raise UserError(f"interpolate: {first_label!r} twice; give two labels, or two seeds")
    rows: list[Row] = []
    for share in places:
        caption = f"{first_label} {round(100 * (1 - share))} %"
        rows.append(({first_label: 1 - share, last_label: share}, caption, Noise(config.seed, 0)))
    return rows


def file_name(index: int, caption: str | None) -> str:
    """`0007_red-ball.png`."""
    word = re.sub(r"[^\w]+", "-", caption).strip("-").lower() if caption else ""
    return f"{index:04d}_{word}.png" if word else f"{index:04d}.png"
