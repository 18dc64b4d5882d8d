"""Objects made of puffed outlines and simple parts: star, moon, flower, tree, mushroom.

Each function paints one onto a canvas, back to front. Lengths are in half extents, x right, y up.
"""

from __future__ import annotations

import math

import numpy as np

from ldm_vae.data.synthetic.palette import oklch
from ldm_vae.data.synthetic.render import Canvas, Material, edge, smoothstep
from ldm_vae.data.synthetic.surfaces import bulged, dome, own_material, puffed, sectors, smooth_minimum, tube, under


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
    """A disc less a disc; its height is the harmonic mean of the two distances, 0 at both outlines."""
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
    centre, count = 0.26, 6
    for patch in canvas.patches(-0.78, 0.78, centre - 0.78, centre + 0.78):
        x, y = patch.x, patch.y - centre
        along, across, radius = sectors(x, y, count, (canvas.scene.spin - 0.5) * 2.0 * math.pi / count)
        field = 1.0 - ((along - 0.45) * (1.0 / 0.32)) ** 2 - (across * (1.0 / 0.26)) ** 2
        coverage, normal = puffed(patch, field, 0.16)
        between = along * math.sin(math.pi / count) - np.abs(across) * math.cos(math.pi / count)
        occlusion = (0.45 + 0.55 * smoothstep(0.0, 0.2, between)) * (0.5 + 0.5 * smoothstep(0.15, 0.45, radius))
        canvas.paint(patch, coverage, normal, own_material(canvas, 0.5), (patch.x, patch.y), occlusion)
    for patch in canvas.patches(-0.25, 0.25, centre - 0.25, centre + 0.25):
        coverage, normal = dome(patch, patch.x * (1.0 / 0.235), (patch.y - centre) * (1.0 / 0.235))
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
