"""The ten shapes and the defects. First the objects made of puffed outlines: star, moon, flower, tree, mushroom.

Each function paints one onto a canvas, back to front. Lengths are in units of half the object; x right, y up.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ldm_vae.data.synthetic.render import (
    DEFECTS,
    Array,
    Canvas,
    Material,
    Patch,
    bulged,
    dome,
    edge,
    oklch,
    own_material,
    puffed,
    sectors,
    smooth_minimum,
    smoothstep,
    tube,
    under,
    vivid,
)


def star(canvas: Canvas) -> None:
    canvas.shadow(-0.86, 0.6, 0.2)
    for patch in canvas.patches(-1.0, 1.0, -0.95, 1.05):
        along, across, _ = sectors(patch.x, patch.y, 5)
        across = np.sqrt(across * across + 0.085**2)  # rounds the points and softens the ridges
        inner, tip, corner = 0.56, 1.22, math.pi / 5
        nx, ny = inner * math.sin(corner), tip - inner * math.cos(corner)
        length = math.hypot(nx, ny)
        field = (tip - along) * (nx / length) - across * (ny / length) - 0.012
        coverage, normal = puffed(patch, field, 0.75)
        surface = bulged(patch.x, patch.y, normal[2])
        occlusion = smoothstep(-1.4, 0.0, normal[1])
        canvas.paint(patch, coverage, normal, own_material(canvas, 0.7), surface, occlusion)


def moon(canvas: Canvas) -> None:
    """A disc minus a disc; the height is the harmonic mean of the two distances, 0 at both outlines."""
    canvas.shadow(-0.99, 0.55, 0.1)
    for patch in canvas.patches(-1.0, 1.0, -1.0, 1.0):
        x, y = patch.x - 0.16, patch.y
        disc = 1.0 - (x * x + y * y)
        rest = (x - 0.52) ** 2 + (y - 0.12) ** 2 - 0.74**2
        mean = np.maximum(disc, 1e-4) * np.maximum(rest, 1e-4) / np.maximum(disc + rest, 1e-4)
        field = np.where((disc > 0.0) & (rest > 0.0), mean, np.minimum(disc, rest))
        coverage, normal = puffed(patch, field, 0.9)
        surface = bulged(patch.x, patch.y, normal[2])
        occlusion = smoothstep(-1.4, 0.0, normal[1])
        canvas.paint(patch, coverage, normal, own_material(canvas, 0.6), surface, occlusion)


def flower(canvas: Canvas) -> None:
    canvas.shadow(-1.0, 0.36)
    _stem_and_leaves(canvas)
    center, count = 0.26, 6
    for patch in canvas.patches(-0.78, 0.78, center - 0.78, center + 0.78):
        x, y = patch.x, patch.y - center
        along, across, radius = sectors(x, y, count, (canvas.scene.spin - 0.5) * 2.0 * math.pi / count)
        field = 1.0 - ((along - 0.45) * (1.0 / 0.32)) ** 2 - (across * (1.0 / 0.26)) ** 2
        coverage, normal = puffed(patch, field, 0.16)
        between = along * math.sin(math.pi / count) - np.abs(across) * math.cos(math.pi / count)
        occlusion = (0.45 + 0.55 * smoothstep(0.0, 0.2, between)) * (0.5 + 0.5 * smoothstep(0.15, 0.45, radius))
        canvas.paint(patch, coverage, normal, own_material(canvas, 0.5), (patch.x, patch.y), occlusion)
    for patch in canvas.patches(-0.25, 0.25, center - 0.25, center + 0.25):
        coverage, normal = dome(patch, patch.x * (1.0 / 0.235), (patch.y - center) * (1.0 / 0.235))
        canvas.paint(patch, coverage, normal, Material(oklch(0.83, 0.16, 0.24), None, 0.4))


def _stem_and_leaves(canvas: Canvas) -> None:
    green = Material(oklch(0.66, 0.15, 0.39), None, 0.3)
    for patch in canvas.patches(-0.15, 0.15, -1.0, 0.2):
        across = (patch.x - 0.05 * np.sin(3.0 * patch.y)) * (1.0 / 0.06)
        coverage = edge(1.0 - np.abs(across), 1.0 / 0.06, patch.pixel) * edge(patch.y + 0.99, 1.0, patch.pixel)
        canvas.paint(patch, coverage, tube(patch, across), green, None, smoothstep(0.0, -0.6, patch.y))
    cosine, sine, length = math.cos(0.5), math.sin(0.5), 0.62
    for side in (-1.0, 1.0):
        for patch in canvas.patches(min(0.0, side * length), max(0.0, side * length), -1.0, -0.5):
            x, y = side * patch.x, patch.y + 0.95
            along = ((cosine * x + sine * y) * (1.0 / length)).clip(0.0, 1.0)
            width = length * along * (1.0 - along) * (1.25 - 0.5 * along)
            coverage, normal = puffed(patch, width - np.abs(cosine * y - sine * x), 0.35)
            canvas.paint(patch, coverage, normal, green, None, 0.8)


def tree(canvas: Canvas) -> None:
    """A trunk and three cones, each in the shade of the one above."""
    canvas.shadow(-0.97, 0.42)
    for patch in canvas.patches(-0.16, 0.16, -1.0, -0.4):
        across = patch.x * (1.0 / 0.13)
        normal = tube(patch, across)
        low = -0.97 + 0.035 * (1.0 - normal[2])
        coverage = edge(1.0 - np.abs(across), 1.0 / 0.13, patch.pixel) * edge(patch.y - low, 1.0, patch.pixel)
        bark = Material(oklch(0.52, 0.08, 0.15), None, 0.15)
        canvas.paint(patch, coverage, normal, bark, None, smoothstep(-0.5, -1.1, patch.y))
    tiers = ((-0.74, 0.14, 0.84, -0.28), (-0.28, 0.60, 0.68, 0.18), (0.18, 1.04, 0.50, 1.2))
    for bottom, top, width, above in tiers:
        for patch in canvas.patches(-width, width, bottom - 0.1, top):
            height = top - bottom
            half = (top - patch.y) * (width / height)
            nx, _, nz = tube(patch, patch.x / np.maximum(half, 1e-3))
            rounding = 0.09 * (1.0 - np.sqrt((1.0 - (patch.x * (1.0 / width)) ** 2).clip(0.0, None)))
            lower = patch.y - (bottom - 0.08) - rounding
            sides = (half - np.abs(patch.x)) * (height / math.hypot(height, width))
            coverage = edge(smooth_minimum(lower, sides, 0.14) - 0.01, 1.0, patch.pixel)
            flank = height / math.hypot(height, width)
            ny = width / math.hypot(height, width) - 1.1 * smoothstep(0.07, 0.0, lower)  # the brim curls under
            inverse = 1.0 / np.sqrt(ny * ny + flank * flank)
            side = flank * inverse
            occlusion = 0.35 + 0.65 * smoothstep(0.02, 0.42, above - 0.02 - patch.y - 0.1 * nx * nx)
            normal = (nx * side, ny * inverse, nz * side)
            canvas.paint(patch, coverage, normal, own_material(canvas, 0.4), (patch.x, patch.y), occlusion)


SPOTS = (  # x, y on the unit dome and radius, in radians over 1.2
    (0.0, 0.35, 0.17), (-0.5, 0.30, 0.14), (0.5, 0.22, 0.15), (-0.24, 0.72, 0.13), (0.3, 0.68, 0.12),
    (-0.82, 0.28, 0.10), (0.86, 0.30, 0.09), (-0.25, 0.0, 0.09), (0.2, -0.05, 0.08),
)  # fmt: skip


def mushroom(canvas: Canvas) -> None:
    canvas.shadow(-0.97, 0.47)
    for patch in canvas.patches(-0.45, 0.45, -1.0, 0.15):
        rise = (patch.y + 0.97).clip(0.0, None)
        half = 0.29 + 0.11 * np.exp(-(((rise - 0.14) / 0.26) ** 2))
        field = smooth_minimum(half - np.abs(patch.x), patch.y + 0.98, 0.3)
        nx, _, nz = tube(patch, patch.x / half)
        ny = -0.7 * smoothstep(0.25, 0.0, field) * smoothstep(0.4, 0.0, rise)
        inverse = 1.0 / np.sqrt(1.0 + ny * ny)
        normal = (nx * inverse, ny * inverse, nz * inverse)
        occlusion = 0.25 + 0.75 * smoothstep(0.15, -0.6, patch.y)
        cream = Material(oklch(0.93, 0.035, 0.2), None, 0.2)
        canvas.paint(patch, edge(field, 1.0, patch.pixel), normal, cream, None, occlusion)

    for patch in canvas.patches(-1.0, 1.0, -0.3, 0.95):
        y = patch.y - 0.02
        coverage, normal = dome(patch, patch.x, np.where(y > 0.0, y * (1.0 / 0.88), y * (1.0 / 0.26)))
        occlusion = smoothstep(-1.3, -0.1, normal[1])
        surface = bulged(patch.x, patch.y, normal[2])
        turn = (canvas.scene.spin - 0.5) * 0.5
        spots = np.zeros_like(coverage)
        for sx, sy, radius in SPOTS:
            sz = math.sqrt(max(0.0, 1.0 - sx * sx - sy * sy))
            sx, sz = sx * math.cos(turn) + sz * math.sin(turn), sz * math.cos(turn) - sx * math.sin(turn)
            cosine = normal[0] * sx + normal[1] * sy + normal[2] * sz
            spot = edge(cosine - math.cos(1.2 * radius), math.sin(1.2 * radius), patch.pixel)
            np.maximum(spots, spot, out=spots)
        spots *= coverage
        cap = own_material(canvas, 0.85)
        canvas.paint(patch, under(coverage, spots), normal, cap, surface, occlusion)
        canvas.paint(patch, spots, normal, Material(oklch(0.96, 0.015, 0.2), None, 0.3), None, occlusion)


# Objects with exact intersections of parallel view rays and surface: ball, cube, donut, heart, gem.

Vector = tuple[float, float, float]


def ball(canvas: Canvas) -> None:
    canvas.shadow(-0.98, 0.72)
    for patch in canvas.patches(-1.0, 1.0, -1.0, 1.0):
        coverage, normal = dome(patch, patch.x, patch.y)
        surface = bulged(patch.x, patch.y, normal[2])
        canvas.paint(patch, coverage, normal, own_material(canvas, 0.85), surface, smoothstep(-1.25, -0.2, normal[1]))


def cube(canvas: Canvas) -> None:
    """The nearest of three planes; near an edge the normal turns as on a rounded one."""
    yaw, pitch = math.radians(18 + 22 * canvas.scene.spin), math.radians(27)
    half, radius = 0.70, 0.085
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    axes: tuple[Vector, ...] = ((cy, -sy * sp, sy * cp), (0.0, cp, sp), (-sy, -cy * sp, cy * cp))
    top = half * sum(abs(axis[1]) for axis in axes)
    canvas.shadow(-top + 0.10, 0.92)
    for patch in canvas.patches(-1.0, 1.0, -top, top, rolled=False):
        x, y = patch.x, patch.y
        depth = outline = None
        for axis in axes:
            plane = (half - axis[0] * x - axis[1] * y) * (1.0 / axis[2])
            depth = plane if depth is None else np.minimum(depth, plane)
            length = math.hypot(axis[0], axis[1])  # the two outline edges that run along this axis
            ex, ey = -axis[1] / length, axis[0] / length
            reach = half * sum(abs(ex * other[0] + ey * other[1]) for other in axes)
            margin = reach - np.abs(ex * x + ey * y)
            outline = margin if outline is None else smooth_minimum(outline, margin, radius)
        assert depth is not None
        assert outline is not None
        points = [axis[0] * x + axis[1] * y + axis[2] * depth for axis in axes]
        leans = [point - 0.985 * point.clip(radius - half, half - radius) for point in points]
        inverse = 1.0 / np.sqrt(leans[0] ** 2 + leans[1] ** 2 + leans[2] ** 2 + 1e-9)
        nx, ny, nz = (
            (leans[0] * axes[0][k] + leans[1] * axes[1][k] + leans[2] * axes[2][k]) * inverse for k in range(3)
        )
        # each face shows another part of the pattern
        u = np.where(points[0] > half - 1e-3, points[2] + 2.3, points[0])
        v = np.where(points[1] > half - 1e-3, points[2] + 3.1, points[1])
        occlusion = smoothstep(-1.5 * half, 0.2 * half, points[1])
        coverage = edge(outline, 1.0, patch.pixel)
        canvas.paint(patch, coverage, (nx, ny, nz), own_material(canvas, 0.4), (1.2 * u, 1.2 * v), occlusion)


def donut(canvas: Canvas) -> None:
    """A torus found by ray marching; icing covers its upper side down to a wavy line, with sprinkles on it."""
    ring, tube, tilt = 0.70, 0.335, math.radians(48)
    ct, st = math.cos(tilt), math.sin(tilt)  # the torus' axis is (0, st, ct) on the screen
    canvas.shadow(-0.74, 0.92, 0.0, 0.4)
    for patch in canvas.patches(-ring - tube, ring + tube, -ring * ct - tube, ring * ct + tube):
        x, y = patch.x, patch.y
        inset = 0.5 * patch.pixel  # half a pixel thinner, so that coverage is 0.5 on the outline
        z, nearest = _march_to_torus(x, y, ring, tube - inset, ct, st)
        for last in (False, True):
            along, height = ct * y - st * z, st * y + ct * z
            radius = np.sqrt(x * x + along * along)
            away = radius - ring
            length = np.sqrt(away * away + height * height)
            up, lean = height / length, away / (length * radius)
            nz = ct * up - st * lean * along
            if not last:  # one Newton step, from the thinner torus to the true one
                z -= (length - tube) / np.maximum(nz, 0.4)
        nx, ny = patch.upright(lean * x, ct * lean * along + st * up)
        normal = (nx, ny, nz.clip(0.0, 1.0))
        coverage = (1.0 - nearest * (1.0 / patch.pixel)).clip(0.0, None)
        occlusion = smoothstep(-1.3, 0.3, up)
        wave = _icing_edge(x / radius, along / radius, 2.0 * math.pi * canvas.scene.spin)
        icing = coverage * edge(up - wave, 3.2, patch.pixel)
        dough = Material(oklch(0.76, 0.11, 0.18), None, 0.25)
        canvas.paint(patch, under(coverage, icing), normal, dough, None, occlusion)
        canvas.paint(patch, icing, normal, own_material(canvas, 0.9), (x, along), occlusion)
    if canvas.scene.texture == 0:
        _sprinkle(canvas, ring, tube, ct, st)


def _march_to_torus(x: Array, y: Array, ring: float, tube: float, ct: float, st: float) -> tuple[Array, Array]:
    """The point of each view ray nearest to the torus: (z, distance); the distance is 0 on the torus.

    A few steps for all rays, then more for those that have not converged.
    """
    shape = x.shape
    x, y = x.ravel(), y.ravel()
    z = (tube + 0.02 - y * st) * (1.0 / ct)  # where the ray enters the slab that holds the torus
    best, nearest = z.copy(), np.full_like(z, 9.0)

    def step(x: Array, y: Array, z: Array, best: Array, nearest: Array) -> Array:
        """Advance z in place. Returns: whether each ray has not converged yet."""
        along, height = ct * y - st * z, st * y + ct * z
        away = np.sqrt(x * x + along * along) - ring
        distance = np.sqrt(away * away + height * height) - tube
        np.copyto(best, z, where=distance < nearest)
        np.minimum(nearest, distance, out=nearest)
        z -= distance
        return (distance > 1e-4) & (height > -tube)

    for _ in range(7):
        under_way = step(x, y, z, best, nearest)
    for _ in range(6):
        rays = np.flatnonzero(under_way)
        if rays.size == 0:
            break
        part = [field[rays] for field in (x, y, z, best, nearest)]
        for _ in range(4):
            under_way[rays] = step(*part)
        z[rays], best[rays], nearest[rays] = part[2:]
    return best.reshape(shape), nearest.clip(0.0, None).reshape(shape)


def _icing_edge(cosine: Array, sine: Array, turn: float) -> Array:
    """The height on the tube where the icing ends, by the angle around the ring: waves of three and five periods."""
    c2, s2 = 2.0 * cosine * cosine - 1.0, 2.0 * sine * cosine
    c3, s3 = c2 * cosine - s2 * sine, s2 * cosine + c2 * sine
    c5, s5 = c3 * c2 - s3 * s2, s3 * c2 + c3 * s2
    five = c5 * (0.17 * math.cos(5 * turn)) + s5 * (0.17 * math.sin(5 * turn))
    return five + c3 * (0.12 * math.cos(3 * turn)) + s3 * (0.12 * math.sin(3 * turn)) + 0.12


def _sprinkle(canvas: Canvas, ring: float, tube: float, ct: float, st: float) -> None:
    """Sprinkles in five colors, evenly scattered (Roberts' R2 sequence), drawn if they face the viewer."""
    hue, length, width = canvas.scene.hue, 0.062, 0.024
    colors = [oklch(0.97, 0.02, hue)] + [vivid(hue + turn, 0.13, -0.02) for turn in (0.2, 0.4, 0.6, 0.8)]
    for k in range(34):
        around = 2.0 * math.pi * (0.7548777 * k + canvas.scene.spin)
        lean = 2.0 * (0.5698403 * k % 1.0 - 0.5)  # around the tube, 0 is its top
        heading = 1.7 * k
        sin_a, cos_a, sin_l, cos_l = math.sin(around), math.cos(around), math.sin(lean), math.cos(lean)

        def screen(across: float, along: float, height: float) -> Vector:
            return across, ct * along + st * height, ct * height - st * along

        out = ring + tube * sin_l
        px, py, _ = screen(out * cos_a, out * sin_a, tube * cos_l)
        nx, ny, facing = screen(sin_l * cos_a, sin_l * sin_a, cos_l)
        if facing < 0.45:
            continue
        ax, ay, _ = screen(-sin_a, cos_a, 0.0)
        bx, by, _ = screen(cos_l * cos_a, cos_l * sin_a, -sin_l)
        dx = length * (math.cos(heading) * ax + math.sin(heading) * bx)
        dy = length * (math.cos(heading) * ay + math.sin(heading) * by)
        reach = length + width
        for patch in canvas.patches(px - reach, px + reach, py - reach, py + reach):
            u, v = patch.x - px, patch.y - py
            t = ((u * dx + v * dy) * (1.0 / (dx * dx + dy * dy))).clip(-1.0, 1.0)
            distance = np.sqrt((u - t * dx) ** 2 + (v - t * dy) ** 2)
            lx, ly, lz = canvas.toward_light
            light = 0.5 + 0.6 * max(0.0, nx * lx + ny * ly + facing * lz)
            canvas.tint(patch, 0.35 * edge(width * 1.5 - distance, 3.0, patch.pixel), np.zeros(3, np.float32))
            canvas.lay(patch, edge(width - distance, 1.0, patch.pixel), colors[k % 5] * light)


def heart(canvas: Canvas) -> None:
    """Taubin's surface (x^2 + 9/4 z^2 + y^2 - 1)^3 = (x^2 + 9/80 z^2) y^3: a cubic in z^2 for each ray."""
    canvas.shadow(-0.97, 0.5, 0.15)
    for patch in canvas.patches(-1.0, 1.0, -0.98, 1.0):
        x, y = 1.14 * patch.x, 1.14 * patch.y + 0.1
        xx, yy = x * x, y * y
        a = xx + yy - 1.0
        # with x^2 + y^2 + 9/4 z^2 - 1 = y t it reads t^3 - y t / 20 = x^2 - a / 20; Newton from above
        t = np.full_like(a, 1.1)
        constant, linear = xx - 0.05 * a, 0.05 * y
        for _ in range(7):
            tt = t * t
            t = (2.0 * t * tt + constant) / (3.0 * tt - linear + 1e-4)
        z = np.sqrt(((y * t - a) * (4.0 / 9.0)).clip(0.0, None))
        tt = t * t
        nx = x * (6.0 * tt - 2.0 * y)  # the surface's gradient over y^2, which is finite where y is 0
        ny = tt * (6.0 * y - 3.0 * t)
        nz = z * (13.5 * tt - (9.0 / 40.0) * y)
        inverse = 1.0 / np.sqrt(nx * nx + ny * ny + nz * nz + 1e-9)
        nx, ny = patch.upright(nx * inverse, ny * inverse)
        nz *= inverse
        field = np.cbrt(xx) * y - a
        fx, fy = patch.gradient(field)
        coverage = edge(field, np.sqrt(fx * fx + fy * fy) + 1e-6, patch.pixel)
        surface = bulged(patch.x, patch.y, nz)
        occlusion = smoothstep(-1.4, 0.0, ny)
        canvas.paint(patch, coverage, (nx, ny, nz), own_material(canvas, 0.85), surface, occlusion)


def gem(canvas: Canvas) -> None:
    """A brilliant cut: the nearest facets, and through them a little of the farthest ones behind."""
    hue, spin = canvas.scene.hue, canvas.scene.spin
    canvas.shadow(-0.96, 0.42, 0.06, 0.9, 0.12 + 0.55 * vivid(hue, 0.08))
    for patch in canvas.patches(-1.0, 1.0, -1.0, 0.66):
        facets = _brilliant(spin, math.radians(17))
        lx, ly, lz = canvas.toward_light
        front, back = _Facets(patch, 1.0), _Facets(patch, -1.0)
        for number, ((nx, ny, nz), distance, value) in enumerate(facets):
            facing = nx * lx + ny * ly + nz * lz
            twinkle = math.sin(12.9898 * number + 40.0 * spin)
            if nz > 0.04:
                light = 0.55 * value + 0.5 * max(facing, 0.0) + 0.16 * twinkle + 0.8 * max(facing, 0.0) ** 12
                front.add((nx, ny, nz), distance, light)
            elif nz < -0.04:
                back.add((nx, ny, nz), distance, 0.5 + 0.45 * twinkle + 0.5 * max(-facing, 0.0))
        thickness = front.depth - back.depth
        fx, fy = patch.gradient(thickness)
        coverage = edge(thickness, np.sqrt(fx * fx + fy * fy) + 1e-6, patch.pixel)
        brightness = np.maximum(front.value + 0.5 * back.value + (0.1 * patch.y - 0.22), 0.35)
        canvas.glaze(patch, coverage, brightness, vivid(hue, -0.05, 0.03), vivid(hue + 0.04, 0.17, -0.05))


def _brilliant(spin: float, tilt: float) -> list[tuple[Vector, float, float]]:
    """Planes of the cut: (outward normal on the screen, distance from the center, brightness)."""
    ct, st = math.cos(tilt), math.sin(tilt)
    step = 2.0 * math.pi / 8.0
    crown, star = math.radians(40), math.radians(25)
    rings = (  # slope, half steps of turn, distance, brightness, up or down
        (crown, 0.0, 0.94 * math.sin(crown), 0.75, 1.0),
        (star, 0.5, 0.6 * math.sin(star) + 0.345 * math.cos(star), 1.0, 1.0),
        (math.radians(47), 0.0, 0.94 * math.sin(math.radians(47)), 0.6, -1.0),
        (math.radians(51), 0.5, 0.985 * math.sin(math.radians(51)), 0.85, -1.0),
    )
    planes = [((0.0, 1.0, 0.0), 0.36, 0.9)]
    for slope, shift, distance, value, up in rings:
        for k in range(8):
            around = (spin + k + shift) * step
            out = math.sin(slope)
            normal = (out * math.sin(around), up * math.cos(slope), out * math.cos(around))
            planes.append((normal, distance, value))
    center = 0.22
    tilted = []
    for (nx, ny, nz), distance, value in planes:
        ny, nz = ct * ny - st * nz, st * ny + ct * nz
        tilted.append(((nx, ny, nz), distance + center * ny, value))
    return tilted


class _Facets:
    """The nearest (`side` 1) or farthest (-1) of several planes along each view ray, with its brightness."""

    def __init__(self, patch: Patch, side: float) -> None:
        self.patch, self.side = patch, side
        self.depth = np.full_like(patch.x, 9.0 * side)
        self.value = np.zeros_like(patch.x)

    def add(self, normal: Vector, distance: float, value: float) -> None:
        plane = (distance - normal[0] * self.patch.x - normal[1] * self.patch.y) * (1.0 / normal[2])
        pick = edge((self.depth - plane) * self.side, 1.6 / abs(normal[2]), self.patch.pixel)
        self.value += pick * (value - self.value)
        self.depth = np.minimum(self.depth, plane) if self.side > 0 else np.maximum(self.depth, plane)


# Defects on a finished object, each with the exact mask of the pixels it may change.

PLACING_RESOLUTION = 64
Place = tuple[float, float]


def add_defect(canvas: Canvas, small: Canvas, rng: np.random.Generator) -> Array:
    """Draw the scene's defect onto a painted canvas.

    Args:
        canvas: Painted; for a missing piece, with `keep_background`.
        small: The same scene painted at PLACING_RESOLUTION.
        rng: Decides position and shape.

    Returns:
        bool (side, side): the pixels covered by the defect. All others are unchanged.
    """
    kind = DEFECTS[canvas.scene.defect]
    draw: dict[str, Callable[[Canvas, Place, np.random.Generator], tuple[Patch, Array]]]
    draw = {"scratch": _scratch, "spot": _spot, "missing": _missing, "blob": _blob}
    inside = _place_inside(small, rng)
    place = _toward_outline(small, inside, rng) if kind == "missing" else inside
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


def _toward_outline(small: Canvas, start: Place, rng: np.random.Generator) -> Place:
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
    """A field that is positive inside an irregular disc: approximately the distance from its outline."""
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
    toward = canvas.toward_light[1] * math.cos(heading) - canvas.toward_light[0] * math.sin(heading)
    lip = edge(0.6 * taper - np.abs(across + math.copysign(1.2 * width, toward)), slope, patch.pixel)
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
    """A dull lump of foreign material in the opposite hue, with a little shade around it."""
    radius = rng.uniform(0.11, 0.17)
    patch, x, y, covered = _around(canvas, place, 2.2 * radius)
    field = _lobed(x, y, radius, 0.2, rng)
    shade = smoothstep(-0.5 * radius, 0.2 * radius, field) * covered
    canvas.tint(patch, 0.55 * shade, np.zeros(3, np.float32))
    coverage, normal = puffed(patch, field * (2.0 / radius), radius)
    hue = (canvas.scene.hue + rng.uniform(0.35, 0.65)) % 1.0
    canvas.paint(patch, coverage, normal, Material(vivid(hue, -0.12, -0.08), None, 0.35))
    return patch, np.maximum(shade, coverage)
