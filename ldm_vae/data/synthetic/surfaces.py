"""What several shapes are made of: domes, puffed outlines, tubes, sectors, the scene's own material."""

from __future__ import annotations

import numpy as np

from ldm_vae.data.synthetic.palette import vivid
from ldm_vae.data.synthetic.render import Array, Canvas, Material, Normal, Patch, edge

COMPANIONS = ((0.0, 0.0), (0.20, -0.11), (0.24, -0.13), (0.22, -0.12), (-0.16, -0.03))


def own_material(canvas: Canvas, gloss: float) -> Material:
    """The scene's colour and, for its texture, a companion of the same hue."""
    hue = canvas.scene.hue
    return Material(vivid(hue), vivid(hue, *COMPANIONS[canvas.scene.texture]), gloss)


def bulged(x: Array, y: Array, nz: Array) -> tuple[Array, Array]:
    """Surface coordinates of a front that bulges: denser towards the outline."""
    scale = 1.0 / (0.5 + 0.5 * nz)
    return x * scale, y * scale


def dome(patch: Patch, x: Array, y: Array) -> tuple[Array, Normal]:
    """Coverage and normals of the unit disc of x, y (any stretched coordinates), seen as half a sphere."""
    squared = x * x + y * y
    fx, fy = patch.gradient(squared)
    coverage = edge(1.0 - squared, np.sqrt(fx * fx + fy * fy) + 1e-6, patch.pixel)
    inverse = 1.0 / np.sqrt(np.maximum(squared, 1.0))
    nx, ny = patch.upright(x * inverse, y * inverse)
    return coverage, (nx, ny, np.sqrt((1.0 - squared).clip(0.0, None)))


def puffed(patch: Patch, field: Array, thickness: float) -> tuple[Array, Normal]:
    """Coverage and normals of the surface z = thickness * sqrt(field); `field` is 0 at the outline."""
    fx, fy = patch.gradient(field)
    slope = fx * fx
    slope += fy * fy
    coverage = edge(field, np.sqrt(slope) + 1e-6, patch.pixel)
    nz = np.sqrt(field.clip(0.0, None))
    nz *= 2.0 / thickness
    slope += nz * nz
    slope += 1e-9
    inverse = 1.0 / np.sqrt(slope)
    nz *= inverse
    np.negative(inverse, out=inverse)
    fx *= inverse
    fy *= inverse
    return coverage, (fx, fy, nz)


def under(coverage: Array, upper: Array) -> Array:
    """Coverage of a lower layer so that it and `upper`, painted next, together cover `coverage`, no more."""
    return (coverage - upper) / np.maximum(1.0 - upper, 1e-6)


def tube(patch: Patch, across: Array) -> Normal:
    """Normals of an upright tube; `across` is -1 at its left and 1 at its right outline."""
    nx = across.clip(-1.0, 1.0)
    turned_x, turned_y = patch.upright(nx, np.zeros_like(nx))
    return turned_x, turned_y, np.sqrt(1.0 - nx * nx)


def smooth_minimum(a: Array, b: Array, width: float) -> Array:
    """Polynomial smooth minimum (Quilez): rounds the corner where two fields cross."""
    h = (width - np.abs(a - b)).clip(0.0, None)
    return np.minimum(a, b) - h * h * (0.25 / width)


def sectors(x: Array, y: Array, count: int, turn: float = 0.0) -> tuple[Array, Array, Array]:
    """Fold the plane into one of `count` equal sectors around the y axis: (along it, across it, radius)."""
    sector = 2.0 * np.pi / count
    angle = np.arctan2(x, y)
    angle -= turn
    angle -= np.rint(angle * (1.0 / sector)) * sector
    radius = np.sqrt(x * x + y * y)
    return radius * np.cos(angle), radius * np.sin(angle), radius
