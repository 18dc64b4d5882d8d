"""Small autoencoders for the tests of the explorer: real ones with random weights, and toys whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ldm_vae.applications.explorer.explored import ExploreConfig, Explored, open_models
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder

SIDE = 8
REACH = 4.0
"""Of the latents that a `Toy` can draw."""


class Toy(Autoencoder):
    """Two numbers drawn as the gray of the left and the right half of 8 x 8 pixels, and read from there.

    With `shown` 0 every latent is drawn as the same picture.
    """

    dtype, device, config = torch.float32, torch.device("cpu"), SimpleNamespace(latent_channels=2)

    def __init__(self, shown: float = 1.0) -> None:
        super().__init__()
        self.shown = shown

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        halves = x.mean(dim=(1, 2)).unflatten(1, (2, SIDE // 2)).mean(dim=2) * REACH
        mean = halves[:, :, None, None]
        return DiagonalGaussianDistribution(torch.cat([mean, mean * 0 - 2], dim=1))

    def image(self, z: Tensor) -> Tensor:
        halves = (self.shown * z / REACH).repeat_interleave(SIDE // 2, dim=1).flatten(1)
        return halves[:, None, None].expand(-1, 3, SIDE, -1)


def made_of(
    mean: Tensor, autoencoder: Autoencoder | None = None, images: Tensor | None = None, **others: Any
) -> Explored:
    """An `Explored` of given latents (n, c, h, w), without loading anything."""
    count = len(mean)
    values: dict[str, Any] = {
        "name": "toy",
        "path": "toy",
        "autoencoder": Toy() if autoencoder is None else autoencoder,
        "kind": "kl",
        "deterministic": False,
        "images": torch.zeros(count, 3, SIDE, SIDE, dtype=torch.uint8) if images is None else images,
        "labels": torch.full((count,), -1),
        "label_names": (),
        "ids": tuple(f"{number:03d}" for number in range(count)),
        "origin": "nowhere",
        "rejected": (),
        "mean": mean,
        "logvar": torch.full_like(mean, -2.0),
        "fingerprint": "",
        "parameters": 0,
        "downsampling": SIDE,
        "run_directory": None,
        "directions": None,
    }
    return Explored(**values | others)


def saved(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """The directory of an autoencoder with random weights; pico, unless `settings` say another."""
    torch.manual_seed(seed)
    build_autoencoder(AutoencoderConfig(**{"preset": "pico"} | settings)).save_pretrained(folder)
    return folder


def open_two(path: str | Path, compared: str | Path, config: ExploreConfig) -> tuple[Explored, ...]:
    """Two autoencoders on the same images."""
    return open_models(replace(config, autoencoder=str(path), compare=str(compared)))


def open_explored(path: str | Path, config: ExploreConfig) -> Explored:
    """One autoencoder."""
    return open_models(replace(config, autoencoder=str(path)))[0]
