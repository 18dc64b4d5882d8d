"""Colours of the synthetic set: equal steps of hue at equal lightness, in OKLCH (Ottosson 2020).

A colour here is a float32 triple of *light*: the square of the encoded sRGB value. Squaring stands in for the
sRGB curve, so that the renderer encodes with one square root.
"""

from __future__ import annotations

import math

import numpy as np

Colour = np.ndarray
"""float32 (3,), red, green, blue, 0 to 1."""


def oklch(lightness: float, chroma: float, hue: float) -> Colour:
    """Light of an OKLCH colour, clipped into sRGB. `hue` in turns: 0.1 red, 0.3 yellow, 0.7 blue."""
    a, b = chroma * math.cos(2 * math.pi * hue), chroma * math.sin(2 * math.pi * hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.array(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ]
    ).clip(0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (encoded**2).astype(np.float32)


def vivid(hue: float, lightness: float = 0.0, chroma: float = 0.0) -> Colour:
    """An object's colour, lighter for yellow than for blue, as eyes expect; offsets make its relatives."""
    base = 0.665 + 0.10 * math.cos(2 * math.pi * (hue - 0.29))
    return oklch(base + lightness, 0.165 + chroma, hue)
