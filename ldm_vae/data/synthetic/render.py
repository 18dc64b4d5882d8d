"""Colors of the synthetic set: equal steps of hue at equal lightness, in OKLCH (Ottosson 2020).

A color here is a float32 triple of *light*: the square of the encoded sRGB value. Squaring stands in for the
sRGB curve, so that the renderer encodes with one square root.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ldm_vae.random import numpy_rng

Color = np.ndarray
"""float32 (3,), red, green, blue, 0 to 1."""


def oklch(lightness: float, chroma: float, hue: float) -> Color:
    """Linear light of an OKLCH color, clipped to sRGB. `hue` in turns: 0.1 red, 0.3 yellow, 0.7 blue."""
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


def vivid(hue: float, lightness: float = 0.0, chroma: float = 0.0) -> Color:
    """An object's color, lighter for yellow than for blue; the offsets give related colors."""
    base = 0.665 + 0.10 * math.cos(2 * math.pi * (hue - 0.29))
    return oklch(base + lightness, 0.165 + chroma, hue)


# The content of image i: one object with its position, size, color, texture and light.

LABELS = ("ball", "cube", "donut", "star", "heart", "moon", "flower", "tree", "mushroom", "gem")
TEXTURES = ("plain", "stripes", "dots", "marble", "wood")
DEFECTS = ("none", "scratch", "spot", "missing", "blob")

ROLL = dict.fromkeys(("ball", "star", "heart", "moon"), 0.22) | {"donut": 0.14, "flower": 0.12, "gem": 0.14}
SPINS = ("cube", "donut", "flower", "mushroom", "gem")
UNFIT = {("mushroom", "dots"), *(("gem", texture) for texture in TEXTURES)}


@dataclass(frozen=True)
class Scene:
    """The content of one image. Fields that have no effect on the object (see ROLL, SPINS, UNFIT) are 0.

    Attributes:
        label: Index into LABELS.
        x, y: Center of the object, from the left and the top edge.
        size: Half the object's extent.
        roll: Rotation in the image plane, radians, counter-clockwise.
        spin: Rotation about the object's own axis, in [0, 1) of the range that the shape allows.
        hue: Hue of the object, in turns of OKLCH (0.08 red, 0.3 yellow, 0.4 green, 0.7 blue).
        background_hue: Hue of the background, at least a quarter turn from `hue`.
        light: Position of the light, -1 left to 1 right; never frontal, which would look flat.
        texture: Index into TEXTURES.
        phase: Shifts the texture, in [0, 1).
        defect: Index into DEFECTS.
    """

    label: int
    x: float
    y: float
    size: float
    roll: float
    spin: float
    hue: float
    background_hue: float
    light: float
    texture: int
    phase: float
    defect: int


def label_of(seed: int, index: int) -> int:
    """Every ten consecutive images contain each label once, in a random order."""
    block, place = divmod(index, len(LABELS))
    return int(numpy_rng(seed, "synthetic-labels", block).permutation(len(LABELS))[place])


def draw_scene(seed: int, index: int, defects: float, textured: float) -> Scene:
    """The scene of one image.

    `textured` is the probability of a texture other than plain. `defects` is that of a defect and changes nothing else:
    with 0, the scene is the same without the defect.
    """
    rng = numpy_rng(seed, "synthetic-scene", index)
    uniform = rng.uniform
    label = label_of(seed, index)
    name = LABELS[label]
    hue = uniform()
    texture = int(rng.choice(len(TEXTURES), p=(1 - textured, *[textured / 4] * 4)))
    texture = 0 if (name, TEXTURES[texture]) in UNFIT else texture
    scene = Scene(
        label=label,
        x=uniform(0.45, 0.55),
        y=uniform(0.45, 0.52),
        size=uniform(0.30, 0.37),
        roll=uniform(-1.0, 1.0) * ROLL.get(name, 0.0) + 0.0,  # no -0.0
        spin=uniform() * (name in SPINS),
        hue=hue,
        background_hue=(hue + uniform(0.25, 0.75)) % 1.0,
        light=float(rng.choice((-1.0, 1.0))) * uniform(0.35, 1.0),
        texture=texture,
        phase=uniform() * (texture > 0),
        defect=0,
    )
    draw = numpy_rng(seed, "synthetic-defect", index)
    return replace(scene, defect=int(draw.integers(1, len(DEFECTS)))) if draw.uniform() < defects else scene


# Building blocks of several shapes: domes, puffed outlines, tubes, sectors, the scene's material.

COMPANIONS = ((0.0, 0.0), (0.20, -0.11), (0.24, -0.13), (0.22, -0.12), (-0.16, -0.03))


def own_material(canvas: Canvas, gloss: float) -> Material:
    """The scene's color and, for its texture, a companion of the same hue."""
    hue = canvas.scene.hue
    return Material(vivid(hue), vivid(hue, *COMPANIONS[canvas.scene.texture]), gloss)


def bulged(x: Array, y: Array, nz: Array) -> tuple[Array, Array]:
    """Surface coordinates of a bulging front: denser toward the outline."""
    scale = 1.0 / (0.5 + 0.5 * nz)
    return x * scale, y * scale


def dome(patch: Patch, x: Array, y: Array) -> tuple[Array, Normal]:
    """Coverage and normals of the unit disc of x, y (may be stretched), rendered as a hemisphere."""
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
    """Coverage of a lower layer such that it and `upper`, painted next, together cover exactly `coverage`."""
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


# Patterns on surfaces: the amount, 0 to 1, of the second color of the material at a point.


def pattern(texture: int, x: Array, y: Array, phase: float, blur: float) -> Array | None:
    """Amount of the second color for an index of `scene.TEXTURES`; None for plain."""
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
    """A hexagonal lattice of discs: two rectangular lattices, using the nearer center."""
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


# From surfaces to pixels: the backdrop, soft shadows, light on a surface, anti-aliased layering.

Array = np.ndarray
Normal = tuple[Array, Array, Array]

KEY = (0.88, 0.84, 0.78)  # the light: slightly warm
WRAP = 0.22  # light that wraps around the edge, as in wax and clay
BAND_PIXELS = 16384  # rows computed at a time: arrays stay in a core's cache, and malloc keeps their pages
FLOOR_TILT = 0.30  # depth of a circle on the floor over its width


@dataclass(frozen=True)
class Material:
    """Appearance of a surface: its color, its pattern's second color, its gloss (0 chalk, 1 glaze)."""

    color: Color
    second: Color | None = None
    gloss: float = 0.5


@dataclass(frozen=True)
class Patch:
    """A box of pixels, or a band of one, with an extra row above and below the painted ones, for gradients.

    Attributes:
        x, y: (h, w), centers of the pixels in the object's axes.
        rows, columns: The painted part's position in the picture.
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
    """A picture being rendered: `light` (3, side, side), and the object's `coverage` of each pixel.

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
        self.toward_light = unit(0.85 * math.sin(azimuth), 0.75, 0.25 + 0.4 * math.cos(azimuth))

    def patches(self, left: float, right: float, bottom: float, top: float, rolled: bool = True) -> Iterator[Patch]:
        """The pixels of a box, in bands from the top; the box rotates with the object if `rolled`."""
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
        """Rows and columns, at least 3 of each, of the part of a box inside the picture."""
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
        """The given rows of a box, with a neighbor on either side if the box has one."""
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
        """Light a surface and composite it over the picture.

        Args:
            coverage: (h, w), 0 to 1.
            normal: Three (h, w), of unit length, in the screen's axes.
            material: Its colors.
            surface: Coordinates, each (h, w), for the scene's texture; None for none.
            occlusion: (h, w) or a number; 1 where nothing blocks the ambient light.
        """
        inner = patch.painted
        coverage, normal = coverage[inner], (normal[0][inner], normal[1][inner], normal[2][inner])
        occlusion = occlusion if isinstance(occlusion, float) else occlusion[inner]
        key, sky, shine, rim = self._lit(normal, material.gloss, occlusion)
        blend = None
        if surface is not None and material.second is not None:
            u, v = surface[0][inner], surface[1][inner]
            blend = pattern(self.scene.texture, u, v, self.scene.phase, patch.pixel)
        colors = []
        for channel in range(3):
            bounce, ceiling = float(self._floor[channel]), float(self._ceiling[channel])
            color = sky * (0.62 * ceiling - 0.42 * bounce)
            color += 0.42 * bounce * (0.3 + 0.7 * occlusion)
            color += key * KEY[channel]
            base = float(material.color[channel])
            if blend is None or material.second is None:
                color *= base
            else:
                color *= base + (float(material.second[channel]) - base) * blend
            color += shine
            color += rim * (0.45 * ceiling)
            colors.append(color)
        self._lay(patch, coverage, colors)

    def _lit(self, normal: Normal, gloss: float, occlusion: Array | float) -> tuple[Array, Array, Array, Array]:
        """Key light, sky light, highlight and rim light, each (h, w)."""
        lx, ly, lz = self.toward_light
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

    def glaze(self, patch: Patch, coverage: Array, value: Array, color: Color, bright: Color) -> None:
        """Composite glass over the picture: `value` (h, w) 0 is dark, 0.5 `color`, 1 `bright`, 2 white."""
        coverage, value = coverage[patch.painted], value[patch.painted]
        low, high = value.clip(0.0, 1.0), (value - 1.0).clip(0.0, 1.0)
        square = low * low
        colors = []
        for channel in range(3):
            base, top = 1.1 * float(color[channel]), float(bright[channel])
            colors.append(low * base + square * (top - base) + high * (1.15 - top))
        self._lay(patch, coverage, colors)

    def lay(self, patch: Patch, coverage: Array, colors: Array) -> None:
        """Composite one flat color (3,), or three planes (3, h, w), over the picture as part of the object."""
        planes = list(colors) if colors.ndim == 1 else [plane[patch.painted] for plane in colors]
        self._lay(patch, coverage[patch.painted], planes)

    def _lay(self, patch: Patch, coverage: Array, colors: list[Array]) -> None:
        if self._keep_background and self.background is None:
            self.background = self.light.copy()
        target = self.light[:, patch.rows, patch.columns]
        for channel in range(3):
            change = colors[channel] - target[channel]
            change *= coverage
            target[channel] += change
        covered = self.coverage[patch.rows, patch.columns]
        covered += coverage * (1.0 - covered)

    def tint(self, patch: Patch, amount: Array, color: Color) -> None:
        """Multiply the picture by 1 where `amount` (h, w) is 0 and by `color` where it is 1."""
        target, amount = self.light[:, patch.rows, patch.columns], amount[patch.painted]
        for channel in range(3):
            target[channel] *= 1.0 - (1.0 - float(color[channel])) * amount

    def shadow(
        self, bottom: float, width: float, lift: float = 0.0, middle: float = 0.8, glow: Color | None = None
    ) -> None:
        """Soft shadows on the floor: one cast away from the light, one just below the object.

        Args:
            bottom: y of the object's lowest point.
            width: Half the width of the object there.
            lift: Height of the lowest point above the floor.
            middle: Height of the object's middle above that point; it sets how far the shadow is cast.
            glow: Share of the floor's light in the darkest part; glass colors it.
        """
        keep = (self._floor / float(self._floor.max())) ** 2 * 0.40 if glow is None else glow
        lx, ly, lz = self.toward_light
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
    """A studio backdrop, float32 (3, side, side): a wall curving into a floor, brighter in the middle."""
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
    """0 at `low`, 1 at `high` (which may be below `low`), with zero slope at both."""
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
