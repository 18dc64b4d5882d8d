"""Faults on a finished object, each with the exact mask of the pixels that it may have changed.

Owns where a defect lies and what it looks like. A place is found on a small picture of the same scene, so it
is the same at every resolution; the mask is every pixel that the defect covers in the least.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ldm_vae.data.synthetic.palette import oklch, vivid
from ldm_vae.data.synthetic.render import Array, Canvas, Material, Patch, edge, smoothstep
from ldm_vae.data.synthetic.scene import DEFECTS
from ldm_vae.data.synthetic.surfaces import puffed

PLACING_RESOLUTION = 64
Place = tuple[float, float]


def add_defect(canvas: Canvas, small: Canvas, rng: np.random.Generator) -> Array:
    """Draw the scene's defect onto a painted canvas.

    Args:
        canvas: Painted; for a missing piece with its background kept.
        small: The same scene painted at PLACING_RESOLUTION.
        rng: Decides place and form.

    Returns:
        bool (side, side): the pixels covered by the defect. All others are as without it.
    """
    kind = DEFECTS[canvas.scene.defect]
    draw: dict[str, Callable[[Canvas, Place, np.random.Generator], tuple[Patch, Array]]]
    draw = {"scratch": _scratch, "spot": _spot, "missing": _missing, "blob": _blob}
    inside = _place_inside(small, rng)
    place = _towards_outline(small, inside, rng) if kind == "missing" else inside
    patch, touched = draw[kind](canvas, place, rng)
    mask = np.zeros(canvas.coverage.shape, bool)
    mask[patch.rows, patch.columns] = touched > 0.0
    return mask


def _place_inside(small: Canvas, rng: np.random.Generator) -> Place:
    """A random point, in object units, with the object all around it."""
    full = small.coverage > 0.95
    inner = full.copy()
    for axis in (0, 1):
        for shift in (-2, -1, 1, 2):
            inner &= np.roll(full, shift, axis)
    rows, columns = np.nonzero(inner if inner.any() else full)
    k = int(rng.integers(len(rows)))
    side, scene = small.resolution, small.scene
    return (
        float(((columns[k] + 0.5) / side - scene.x) / scene.size),
        float((scene.y - (rows[k] + 0.5) / side) / scene.size),
    )


def _towards_outline(small: Canvas, start: Place, rng: np.random.Generator) -> Place:
    """Where a walk from `start` in a random direction leaves the object."""
    angle = rng.uniform(0.0, 2.0 * math.pi)
    side, scene = small.resolution, small.scene
    x, y = start
    while True:
        column = int((scene.x + x * scene.size) * side)
        row = int((scene.y - y * scene.size) * side)
        if not (0 <= row < side and 0 <= column < side) or small.coverage[row, column] < 0.5:
            return x, y
        x, y = x + 0.02 * math.cos(angle), y + 0.02 * math.sin(angle)


def _around(canvas: Canvas, place: Place, reach: float) -> tuple[Patch, Array, Array, Array]:
    """The patch around a place, x and y from there, and the object's coverage before the defect."""
    x, y = place
    patch = canvas.patch(x - reach, x + reach, y - reach, y + reach)
    return patch, patch.x - x, patch.y - y, canvas.coverage[patch.rows, patch.columns].copy()


def _lobed(x: Array, y: Array, radius: float, roughness: float, rng: np.random.Generator) -> Array:
    """A field, positive inside an irregular disc: the distance from its outline, about."""
    angle, outline = np.arctan2(y, x), np.full_like(x, radius)
    for lobes in (2, 3, 5):
        outline += (radius * roughness / math.sqrt(lobes)) * np.sin(lobes * angle + rng.uniform(0.0, 6.28))
    return outline - np.sqrt(x * x + y * y)


def _scratch(canvas: Canvas, place: Place, rng: np.random.Generator) -> tuple[Patch, Array]:
    """A tapering groove along an arc: dark, with a lit lip on the side away from the light."""
    length, bend, heading = rng.uniform(0.35, 0.6), rng.uniform(-0.5, 0.5), rng.uniform(0.0, math.pi)
    width = rng.uniform(0.022, 0.034)
    patch, x, y, covered = _around(canvas, place, length + 4 * width)
    along = math.cos(heading) * x + math.sin(heading) * y
    across = math.cos(heading) * y - math.sin(heading) * x
    across += (bend * (along - length)) * (along + length)
    taper = np.sqrt((1.0 - (along * (1.0 / length)) ** 2).clip(0.0, None)) * width
    slope = 1.0 + abs(2.0 * bend) * length
    groove = edge(taper - np.abs(across), slope, patch.pixel) * (taper > 0.0)
    towards = canvas.towards_light[1] * math.cos(heading) - canvas.towards_light[0] * math.sin(heading)
    lip = edge(0.6 * taper - np.abs(across + math.copysign(1.2 * width, towards)), slope, patch.pixel)
    lip *= (taper > 0.0) * (1.0 - groove)
    canvas.tint(patch, groove * covered, np.array([0.30, 0.28, 0.28], np.float32))
    canvas.lay(patch, 0.55 * lip * covered, oklch(0.97, 0.01, 0.2))
    return patch, np.maximum(groove, lip) * covered


def _spot(canvas: Canvas, place: Place, rng: np.random.Generator) -> tuple[Patch, Array]:
    """A stain: it darkens and browns the surface, most along its edge."""
    radius = rng.uniform(0.10, 0.17)
    patch, x, y, covered = _around(canvas, place, 1.8 * radius)
    field = _lobed(x, y, radius, 0.3, rng)
    stain = edge(field, 1.0, max(patch.pixel, 0.02)) * covered
    amount = stain * (0.75 + 0.25 * smoothstep(0.06, 0.0, field))
    canvas.tint(patch, amount, np.array([0.28, 0.20, 0.13], np.float32))
    return patch, stain


def _missing(canvas: Canvas, place: Place, rng: np.random.Generator) -> tuple[Patch, Array]:
    """A bite out of the outline: the background shows, and a strip of the dark inside along the break."""
    radius = rng.uniform(0.22, 0.32)
    patch, x, y, covered = _around(canvas, place, 1.8 * radius)
    form = _lobed(x, y, radius, 0.22, rng)
    bite = edge(form, 1.0, patch.pixel) * covered
    assert canvas.background is not None, "paint this canvas with keep_background=True"
    background = canvas.background[:, patch.rows, patch.columns]
    canvas.lay(patch, bite, background)
    depth = smoothstep(0.075, 0.055, form) * bite
    canvas.lay(patch, depth, vivid(canvas.scene.hue, -0.22, -0.06))
    return patch, bite


def _blob(canvas: Canvas, place: Place, rng: np.random.Generator) -> tuple[Patch, Array]:
    """A lump of something else, of the opposite hue and dull, with a little shade around it."""
    radius = rng.uniform(0.11, 0.17)
    patch, x, y, covered = _around(canvas, place, 2.2 * radius)
    field = _lobed(x, y, radius, 0.2, rng)
    shade = smoothstep(-0.5 * radius, 0.2 * radius, field) * covered
    canvas.tint(patch, 0.55 * shade, np.zeros(3, np.float32))
    coverage, normal = puffed(patch, field * (2.0 / radius), radius)
    hue = (canvas.scene.hue + rng.uniform(0.35, 0.65)) % 1.0
    canvas.paint(patch, coverage, normal, Material(vivid(hue, -0.12, -0.08), None, 0.35))
    return patch, np.maximum(shade, coverage)
