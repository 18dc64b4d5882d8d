"""From surfaces to pixels: the backdrop, soft shadows, light on a surface, anti-aliased layering.

Owns the canvas and the light model, and knows no shape. A shape asks for the patches of a box around it,
computes coverage and normals there, and paints; only that box costs time. Light is kept as the square of the
encoded value (see `palette`), in float32 planes (3, side, side).

Axes: x right, y up, z towards the viewer, in half extents of the object, from its centre.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ldm_vae.data.synthetic.palette import Colour, oklch
from ldm_vae.data.synthetic.scene import Scene
from ldm_vae.data.synthetic.textures import pattern

Array = np.ndarray
Normal = tuple[Array, Array, Array]

KEY = (0.88, 0.84, 0.78)  # the light: slightly warm
WRAP = 0.22  # how far it reaches around, as in wax and clay
BAND_PIXELS = 16384  # computed at a time: arrays stay in a core's cache, and malloc keeps their pages
FLOOR_TILT = 0.30  # depth of a circle on the floor over its width


@dataclass(frozen=True)
class Material:
    """How a surface answers light: its colour, its pattern's other colour, its gloss (0 chalk, 1 glaze)."""

    colour: Colour
    second: Colour | None = None
    gloss: float = 0.5


@dataclass(frozen=True)
class Patch:
    """A box of pixels, or a band of one, with a row more above and below than is painted, for gradients.

    Attributes:
        x, y: (h, w), centres of the pixels in the object's axes.
        rows, columns: Where the painted part lies in the picture.
        painted: Which of the h rows are painted.
        pixel: The width of a pixel.
        cosine, sine: The turn from the object's axes to the screen's.
    """

    x: Array
    y: Array
    rows: slice
    columns: slice
    painted: slice
    pixel: float
    cosine: float
    sine: float

    def upright(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Turn a vector from the object's axes to the screen's."""
        if self.sine == 0.0:
            return x, y
        return self.cosine * x - self.sine * y, self.sine * x + self.cosine * y

    def gradient(self, field: Array) -> tuple[Array, Array]:
        """Central differences along the screen's axes, one-sided at the border."""
        along_x, along_y = np.empty_like(field), np.empty_like(field)
        np.subtract(field[:, 2:], field[:, :-2], out=along_x[:, 1:-1])
        np.subtract(field[:-2], field[2:], out=along_y[1:-1])
        along_x[:, 0], along_x[:, -1] = along_x[:, 1], along_x[:, -2]
        along_y[0], along_y[-1] = along_y[1], along_y[-2]
        along_x *= 0.5 / self.pixel
        along_y *= 0.5 / self.pixel
        return along_x, along_y


class Canvas:
    """A picture in the making: `light` (3, side, side), and how far the object covers each pixel, `coverage`.

    Args:
        keep_background: Also keep the picture without the object, in `background`.
    """

    def __init__(self, scene: Scene, resolution: int, keep_background: bool = False) -> None:
        self.scene = scene
        self.resolution = resolution
        self.coverage = np.zeros((resolution, resolution), np.float32)
        self.light = backdrop(scene, resolution)
        self.background: Array | None = None
        self._keep_background = keep_background
        self._ceiling = oklch(0.94, 0.03, scene.background_hue)
        self._floor = oklch(0.84, 0.06, scene.background_hue)
        azimuth = 0.95 * scene.light
        self.towards_light = unit(0.85 * math.sin(azimuth), 0.75, 0.25 + 0.4 * math.cos(azimuth))

    def patches(self, left: float, right: float, bottom: float, top: float, rolled: bool = True) -> Iterator[Patch]:
        """The pixels of a box, which turns with the object if `rolled`, in bands from the top."""
        rows, columns = self._box(left, right, bottom, top, rolled)
        height = rows.stop - rows.start
        bands = max(1, min(height // 8, height * (columns.stop - columns.start) // BAND_PIXELS))
        edges = [rows.start + height * k // bands for k in range(bands + 1)]
        for first, last in itertools.pairwise(edges):
            yield self._patch(slice(first, last), rows, columns, rolled)

    def patch(self, left: float, right: float, bottom: float, top: float) -> Patch:
        """All pixels of a small upright box at once."""
        rows, columns = self._box(left, right, bottom, top, False)
        return self._patch(rows, rows, columns, False)

    def _box(self, left: float, right: float, bottom: float, top: float, rolled: bool) -> tuple[slice, slice]:
        """Rows and columns, at least 3 of each, that hold what the picture shows of a box."""
        side, size, scene = self.resolution, self.scene.size, self.scene
        cosine, sine = self._turn(rolled)
        corners = [(x, y) for x in (left, right) for y in (bottom, top)]
        xs = [cosine * x - sine * y for x, y in corners]
        ys = [sine * x + cosine * y for x, y in corners]
        rows = _pixels((scene.y - max(ys) * size) * side, (scene.y - min(ys) * size) * side, side)
        return rows, _pixels((scene.x + min(xs) * size) * side, (scene.x + max(xs) * size) * side, side)

    def _turn(self, rolled: bool) -> tuple[float, float]:
        return (math.cos(self.scene.roll), math.sin(self.scene.roll)) if rolled else (1.0, 0.0)

    def _patch(self, rows: slice, box: slice, columns: slice, rolled: bool) -> Patch:
        """The given rows of a box, with a neighbour on either side where the box has one."""
        side, size, scene = self.resolution, self.scene.size, self.scene
        cosine, sine = self._turn(rolled)
        first, last = max(rows.start - 1, box.start), min(rows.stop + 1, box.stop)
        u = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) / side
        v = (np.arange(first, last, dtype=np.float32) + 0.5) / side
        u = ((u - scene.x) / size)[None, :]
        v = ((scene.y - v) / size)[:, None]
        x, y = cosine * u + sine * v, cosine * v - sine * u
        painted = slice(rows.start - first, rows.stop - first)
        return Patch(x, y, rows, columns, painted, 1.0 / (side * size), cosine, sine)

    def paint(
        self,
        patch: Patch,
        coverage: Array,
        normal: Normal,
        material: Material,
        surface: tuple[Array, Array] | None = None,
        occlusion: Array | float = 1.0,
    ) -> None:
        """Light a surface and lay it over the picture.

        Args:
            coverage: (h, w), 0 to 1.
            normal: Three (h, w), of unit length, in the screen's axes.
            material: Its colours.
            surface: Coordinates, each (h, w), for the scene's texture; None for none.
            occlusion: (h, w) or a number, 1 where nothing near blocks the light of the surroundings.
        """
        inner = patch.painted
        coverage, normal = coverage[inner], (normal[0][inner], normal[1][inner], normal[2][inner])
        occlusion = occlusion if isinstance(occlusion, float) else occlusion[inner]
        key, sky, shine, rim = self._lit(normal, material.gloss, occlusion)
        blend = None
        if surface is not None and material.second is not None:
            u, v = surface[0][inner], surface[1][inner]
            blend = pattern(self.scene.texture, u, v, self.scene.phase, patch.pixel)
        colours = []
        for channel in range(3):
            bounce, ceiling = float(self._floor[channel]), float(self._ceiling[channel])
            colour = sky * (0.62 * ceiling - 0.42 * bounce)
            colour += 0.42 * bounce * (0.3 + 0.7 * occlusion)
            colour += key * KEY[channel]
            base = float(material.colour[channel])
            if blend is None or material.second is None:
                colour *= base
            else:
                colour *= base + (float(material.second[channel]) - base) * blend
            colour += shine
            colour += rim * (0.45 * ceiling)
            colours.append(colour)
        self._lay(patch, coverage, colours)

    def _lit(self, normal: Normal, gloss: float, occlusion: Array | float) -> tuple[Array, Array, Array, Array]:
        """The key light, the sky's light, the highlight and the bright rim, each (h, w)."""
        lx, ly, lz = self.towards_light
        key = _dot(normal, (lx, ly, lz))
        key += WRAP
        key *= 1.0 / (1.0 + WRAP)
        key.clip(0.0, 1.0, out=key)
        key *= 0.35 + 0.65 * occlusion
        sky = (0.5 * normal[1] + 0.5) * occlusion
        shine = _dot(normal, unit(lx, ly, lz + 1.0))
        shine.clip(0.0, 1.0, out=shine)
        for _ in range(3):
            shine *= shine
        broad = shine * (0.16 * gloss)
        for _ in range(3):
            shine *= shine
        shine *= 0.55 * gloss
        shine += broad
        rim = 1.0 - normal[2]
        rim *= rim * rim
        rim *= sky
        return key, sky, shine, rim

    def glaze(self, patch: Patch, coverage: Array, value: Array, colour: Colour, bright: Colour) -> None:
        """Lay glass over the picture: `value` (h, w) 0 is dark, 0.5 `colour`, 1 `bright`, 2 white."""
        coverage, value = coverage[patch.painted], value[patch.painted]
        low, high = value.clip(0.0, 1.0), (value - 1.0).clip(0.0, 1.0)
        square = low * low
        colours = []
        for channel in range(3):
            base, top = 1.1 * float(colour[channel]), float(bright[channel])
            colours.append(low * base + square * (top - base) + high * (1.15 - top))
        self._lay(patch, coverage, colours)

    def lay(self, patch: Patch, coverage: Array, colours: Array) -> None:
        """Lay one flat colour (3,), or three planes (3, h, w), over the picture as part of the object."""
        planes = list(colours) if colours.ndim == 1 else [plane[patch.painted] for plane in colours]
        self._lay(patch, coverage[patch.painted], planes)

    def _lay(self, patch: Patch, coverage: Array, colours: list[Array]) -> None:
        if self._keep_background and self.background is None:
            self.background = self.light.copy()
        target = self.light[:, patch.rows, patch.columns]
        for channel in range(3):
            change = colours[channel] - target[channel]
            change *= coverage
            target[channel] += change
        covered = self.coverage[patch.rows, patch.columns]
        covered += coverage * (1.0 - covered)

    def tint(self, patch: Patch, amount: Array, colour: Colour) -> None:
        """Multiply the picture by 1 where `amount` (h, w) is 0 and by `colour` where it is 1."""
        target, amount = self.light[:, patch.rows, patch.columns], amount[patch.painted]
        for channel in range(3):
            target[channel] *= 1.0 - (1.0 - float(colour[channel])) * amount

    def shadow(
        self, bottom: float, width: float, lift: float = 0.0, middle: float = 0.8, glow: Colour | None = None
    ) -> None:
        """Soft shadows on the floor: one thrown away from the light, one close below the object.

        Args:
            bottom: y of the object's lowest point.
            width: Half the width of what stands or hovers there.
            lift: Height of the lowest point above the floor.
            middle: Height of the object's middle above that point; it sets how far the shadow is thrown.
            glow: What the darkest part keeps of the floor's light; glass colours it.
        """
        keep = (self._floor / float(self._floor.max())) ** 2 * 0.40 if glow is None else glow
        lx, ly, lz = self.towards_light
        floor, high = bottom - lift, middle + lift
        thrown = (
            -0.6 * lx / ly * high,
            floor + 0.5 * FLOOR_TILT * lz / ly * high,
            1.1 * width + 0.35 + 0.2 * lift,
        )
        below = (-lx / ly * (0.10 + 0.5 * lift), floor + 0.07 * width, width + 0.3 * lift)
        for (x, y, reach), strength in ((thrown, 0.65 - 0.3 * lift), (below, 0.78 - 0.6 * lift)):
            depth = FLOOR_TILT * reach
            for patch in self.patches(x - reach, x + reach, y - depth, y + depth, rolled=False):
                amount = 1.0 - ((patch.x - x) * (1.0 / reach)) ** 2 - ((patch.y - y) * (1.0 / depth)) ** 2
                amount.clip(0.0, 1.0, out=amount)
                amount *= amount
                amount *= strength
                self.tint(patch, amount, keep)

    def pixels(self) -> Array:
        """uint8 (side, side, 3)."""
        side = self.resolution
        out = np.empty((side, side, 3), np.uint8)
        step = max(1, BAND_PIXELS // side)
        for channel in range(3):
            for start in range(0, side, step):
                encoded = self.light[channel, start : start + step].clip(0.0, 1.0)
                np.sqrt(encoded, out=encoded)
                encoded *= 255.0
                encoded += 0.5
                out[start : start + step, :, channel] = encoded
        return out


def backdrop(scene: Scene, resolution: int) -> Array:
    """A studio cove, float32 (3, side, side): a wall that flows into a floor, brighter in the middle."""
    t = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    hue = scene.background_hue
    floor, wall = smoothstep(0.60, 0.86, t), smoothstep(0.0, 0.7, t)
    across = np.exp(-(((t - 0.5 - 0.16 * scene.light) / 0.42) ** 2))
    down = 0.22 * np.exp(-(((t - 0.36) / 0.34) ** 2)) + 0.16 * np.exp(-(((t - 0.90) / 0.12) ** 2))
    top, low, ground = oklch(0.80, 0.065, hue), oklch(0.90, 0.045, hue), oklch(0.84, 0.06, hue)
    light = np.empty((3, resolution, resolution), np.float32)
    for channel in range(3):
        column = top[channel] + (low[channel] - top[channel]) * wall
        column += (ground[channel] - column) * floor
        np.multiply((column * down)[:, None], across[None, :], out=light[channel])
        light[channel] += column[:, None]
    return light


def edge(field: Array, slope: Array | float, pixel: float) -> Array:
    """Coverage of the region `field` > 0, from its value and the length of its gradient."""
    coverage = field * (1.0 / (slope * pixel))
    coverage += 0.5
    return coverage.clip(0.0, 1.0, out=coverage)


def smoothstep(low: float, high: float, value: Array) -> Array:
    """0 at `low`, 1 at `high` (which may be the smaller), flat at both."""
    t = (value - low) * (1.0 / (high - low))
    t.clip(0.0, 1.0, out=t)
    return t * t * (3.0 - 2.0 * t)


def unit(x: float, y: float, z: float) -> tuple[float, float, float]:
    length = math.sqrt(x * x + y * y + z * z)
    return x / length, y / length, z / length


def _dot(a: Normal, b: tuple[float, float, float]) -> Array:
    total = a[0] * b[0]
    total += a[1] * b[1]
    total += a[2] * b[2]
    return total


def _pixels(first: float, last: float, side: int) -> slice:
    start = min(max(0, math.floor(first) - 2), side - 3)
    return slice(start, max(min(side, math.ceil(last) + 2), start + 3))
