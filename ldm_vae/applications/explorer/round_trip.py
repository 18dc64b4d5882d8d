"""One number for how much of the map means something: the share that decodes to images that encode to where they were.

An autoencoder was shown the places of its images only. Between them its decoder makes something, and its encoder judges
it: what was made of a hole is encoded to somewhere else. Only the inside of the images' outline counts, since far
outside no autoencoder was ever asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_vae.applications.explorer.explored import Explored
from ldm_vae.applications.explorer.plane import Bounds, Plane

TOLERANCE = 0.25
"""Standard deviations of the images' points, along each axis its own."""
PAUSE_SECONDS = 0.001
"""After each pass, in which whoever waits for the networks gets them: Python's locks know no queue."""


@dataclass(frozen=True, eq=False)
class RoundTrip:
    """The round trips of the centres of a grid's cells over the bounds of a plane.

    Attributes:
        share: of the cells inside, those whose error is at most the tolerance, 0 to 1.
        share_in_holes: the same of the cells inside that hold no image; None where every one does.
        tolerance: in standard deviations.
        grid: cells along each axis.
        errors: (grid, grid) float32, distance of where a centre's decoded image is encoded to from the centre, in the
            plane, in standard deviations of the images' points along each axis; rows by rising y.
        inside: (grid, grid) bool, cells whose centre lies in the convex hull of the images' points.
        bounds: of the grid.
    """

    share: float
    share_in_holes: float | None
    tolerance: float
    grid: int
    errors: np.ndarray
    inside: np.ndarray
    bounds: Bounds


def measure_round_trip(
    explored: Explored, plane: Plane, grid: int = 24, advance: Callable[[int], None] | None = None
) -> RoundTrip:
    """Decode every centre to 8-bit pixels, encode these to the mean, and project that.

    For a projected plane (`pca`) only the way inside the plane counts.

    Args:
        advance: called with the number of points that were just measured; what it raises ends the measurement.
    """
    centres = grid_centres(plane.bounds, grid)
    spread = torch.tensor(plane.spread)
    errors = []
    for part in centres.split(explored.batch):
        mean, _ = explored.encode(explored.decode(plane.latent_at(part)))
        errors.append(((plane.point_of(mean) - part) / spread).norm(dim=1))
        if advance is not None:
            advance(len(part))
        time.sleep(PAUSE_SECONDS)
    found = torch.cat(errors).reshape(grid, grid).numpy()
    inside = in_outline(plane.points.numpy(), centres.numpy()).reshape(grid, grid)
    hit, holes = found <= TOLERANCE, inside & ~occupied(plane, grid)
    return RoundTrip(
        share=float(hit[inside].mean()),
        share_in_holes=float(hit[holes].mean()) if holes.any() else None,
        tolerance=TOLERANCE,
        grid=grid,
        errors=found,
        inside=inside,
        bounds=plane.bounds,
    )


def grid_centres(bounds: Bounds, grid: int) -> Tensor:
    """(grid * grid, 2): x changes fastest, both rise."""
    x0, x1, y0, y1 = bounds
    steps = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    y, x = torch.meshgrid(y0 + (y1 - y0) * steps, x0 + (x1 - x0) * steps, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2).float()


def in_outline(points: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(m,) bool: which of `places` (m, 2) lie in the convex hull of `points` (n, 2); all of them where it holds none or
    has no area."""
    from scipy.spatial import ConvexHull, QhullError

    try:
        sides = ConvexHull(points.astype(np.float64)).equations
    except QhullError:
        return np.ones(len(places), bool)
    found = (places @ sides[:, :2].T + sides[:, 2] <= 0).all(axis=1)
    return found if found.any() else np.ones(len(places), bool)


def occupied(plane: Plane, grid: int) -> np.ndarray:
    """(grid, grid) bool: the cells that hold the point of an image; rows by rising y."""
    x0, x1, y0, y1 = plane.bounds
    counts, _, _ = np.histogram2d(
        plane.points[:, 1].numpy(), plane.points[:, 0].numpy(), bins=grid, range=((y0, y1), (x0, x1))
    )
    return counts > 0
