"""Patterns on surfaces: how far, from 0 to 1, a point takes the second colour of its material.

Every pattern is a function of surface coordinates in object units (the object's half extent is 1); `blur` is
the width of one pixel in them, and only softens edges.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def pattern(texture: int, x: Array, y: Array, phase: float, blur: float) -> Array | None:
    """Amount of the second colour for an index of `scene.TEXTURES`; None for plain."""
    if texture == 0:
        return None
    return (stripes, dots, marble, wood)[texture - 1](x, y, phase, blur)


def stripes(x: Array, y: Array, phase: float, blur: float) -> Array:
    frequency = 15.0  # radians per unit
    wave = np.cos((0.8 * frequency) * x + (0.6 * frequency) * y + 6.283 * phase)
    wave *= 1.0 / (frequency * max(1.6 * blur, 0.02))
    wave += 0.45
    return wave.clip(0.0, 1.0, out=wave)


def dots(x: Array, y: Array, phase: float, blur: float) -> Array:
    """A hexagonal lattice of discs: two rectangular lattices, the nearer centre counts."""
    pitch, ratio = 0.42, 1.7320508
    u, v = x * (1 / pitch) + phase, y * (1 / (pitch * ratio)) + phase
    nearest = None
    for shift in (0.0, 0.5):
        a, b = u + shift, v + shift
        a -= np.rint(a)
        b -= np.rint(b)
        a *= a
        b *= b * ratio**2
        a += b
        nearest = a if nearest is None else np.minimum(nearest, a, out=nearest)
    assert nearest is not None
    distance = np.sqrt(nearest, out=nearest)
    distance -= 0.27
    distance *= -pitch / max(1.3 * blur, 0.015)
    distance += 0.5
    return distance.clip(0.0, 1.0, out=distance)


def marble(x: Array, y: Array, phase: float, blur: float) -> Array:
    """Veins: the zero lines of a wave, bent twice by slower waves."""
    turn = 6.283 * phase
    bend = np.sin(3.1 * y - 1.7 * x + turn)
    bend += 0.5 * np.sin(6.7 * x + 2.9 * y + 1.6 * bend)
    wave = np.sin(3.4 * x + 2.2 * y + 1.35 * bend + turn)
    np.abs(wave, out=wave)
    wave -= 1.0
    wave *= wave
    return np.multiply(wave, wave, out=wave)  # (1 - |sin|)^4: thin bright veins, soft flanks


def wood(x: Array, y: Array, phase: float, blur: float) -> Array:
    """Growth rings around an axis outside the object, slightly wavy: pale early wood, a darker late edge."""
    along = y + 0.07 * np.sin(3.0 * x + 6.283 * phase)
    across = 0.45 * x - (0.3 + 0.5 * phase)
    radius = np.sqrt(across * across + along * along * 1.6)
    ring = np.sin(21.0 * radius)
    ring *= 0.5
    ring += 0.5
    return np.multiply(ring, ring, out=ring)
