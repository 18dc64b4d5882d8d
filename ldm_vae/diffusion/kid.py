"""KID of generated images, on request while training: its settings, and when it is due.

What measures it lives in `evaluation.fidelity.samples` and is handed in: it needs images and the Inception network,
which training does without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ldm_vae.data.sources import DataConfig
from ldm_vae.errors import UserError
from ldm_vae.latents.words import counted

FEWEST = 100
"""Images on either side; below, the spread over subsets is as large as what one looks for."""

Judge = Callable[[Any], dict[str, float]]
"""A pipeline -> figures."""


@dataclass(frozen=True)
class KidConfig:
    """KID of samples of the EMA weights to held-out images: not in latents, so what the autoencoder loses counts.

    Attributes:
        samples: generated for each measurement, the classes in turn; 0: none.
        every: steps from one to the next, a multiple of training.validate_every; null: once, at the end.
        data: the images that were encoded. The part with the ids that this run holds out is compared with.
        steps: of the sampler, for each sample.
        subset: images in each of KID's subsets; a quarter of the held-out images where that is less.
        inception_weights: a local file of torch-fidelity's Inception weights; null: its download.
    """

    samples: int = 0
    every: int | None = None
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 30
    subset: int = 200
    inception_weights: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 0 or 0 < self.samples < FEWEST:
            raise UserError(
                f"kid.samples: KID of {counted(self.samples, 'image')} would be noise; give {FEWEST} or more (1000 is "
                "usual), or 0 for none"
            )
        if self.every is not None and self.every < 1:
            raise UserError(f"kid.every: {self.every} is below 1; give a number of steps, or null for the end alone")
        if self.steps < 1 or self.subset < 2:
            name, value = ("steps", self.steps) if self.steps < 1 else ("subset", self.subset)
            raise UserError(f"kid.{name}: {value} is too few")

    def check(self, held_out: float, validate_every: int) -> None:
        """Raises: UserError for a measurement that never comes about in a run of such settings."""
        if self.samples and held_out == 0:
            raise UserError("kid.samples: needs held-out images, and held_out=0; hold some out, or set kid.samples=0")
        if self.samples and self.every and self.every % validate_every:
            raise UserError(
                f"kid.every: {self.every} is no multiple of training.validate_every={validate_every}; give one"
            )

    def due(self, finished: int, steps: int) -> bool:
        """Whether to measure after `finished` of `steps` steps."""
        return finished == steps or (self.every is not None and finished % self.every == 0)
