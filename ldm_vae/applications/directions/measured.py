"""Attributes that pixels alone tell: brightness, contrast, saturation, the two axes of hue, sharpness.

All are computed in OKLab (Ottosson 2020), where equal steps look equal. Hue is a circle and has no mean; its two axes
have: green to red and blue to yellow, the second also known as colour temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def measure(images: Tensor) -> dict[str, Tensor]:
    """The attributes of images (n, 3, h, w) in [-1, 1], each (n,).

    Returns:
        brightness: mean lightness, 0 black to 1 white; contrast: standard deviation of the lightness; saturation: mean
        chroma, 0 grey to about 0.3; red_green, yellow_blue: mean of the two colour axes, positive for red and yellow;
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
