"""The map: where latents lie on a plane, which latent a point of the plane is, and which image lies nearest.

A latent of two numbers is the plane itself. All other latents are projected on the two directions in which they differ
most; the inverse of the projection is declared here: the latent in that plane, the mean image's in everything else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ldm_vae.applications.explorer.explored import Explored
from ldm_vae.data.samples import evenly_spaced

FITTED_IMAGES = 2000
"""Number of evenly spread images for the fit of the projection, whose cost grows with its cube; all are projected."""
SHARE_IN_BOUNDS = 0.99
MARGIN = 0.08
"""Margin on each side, as a share of the width or height."""
LEAST_SPREAD = 1e-6

Bounds = tuple[float, float, float, float]
"""x0, x1, y0, y1."""


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane in the space of an autoencoder's latents, and where n images lie on it.

    Attributes:
        kind: `latent`, the space itself, or `pca`.
        points: (n, 2) float32, in latent units; for `pca` the projection of latents whose channels are scaled to a
            standard deviation of 1.
        bounds: hold 99 % of the points and a margin.
        center, spread: mean and standard deviation of the points along each axis.
        explained: share of the variance of the scaled latents along each axis, `pca` only.
        origin: (d,) the latent at (0, 0); `axes`: (2, d) orthonormal; `scale`: (d,) of the latents along each number.
        latent_shape: c, h, w with d = chw.
    """

    kind: Literal["latent", "pca"]
    points: Tensor
    bounds: Bounds
    center: tuple[float, float]
    spread: tuple[float, float]
    explained: tuple[float, float] | None
    origin: Tensor
    axes: Tensor
    scale: Tensor
    latent_shape: tuple[int, int, int]

    def latent_at(self, xy: Tensor) -> Tensor:
        """Points (m, 2) -> latents (m, c, h, w); `point_of` leads back."""
        flat = self.origin + (xy.to(self.axes) @ self.axes) * self.scale
        return flat.unflatten(1, self.latent_shape)

    def point_of(self, latents: Tensor) -> Tensor:
        """Latents (m, c, h, w) -> points (m, 2), float32: where they are, or their shadow."""
        return ((latents.flatten(1).float() - self.origin) / self.scale) @ self.axes.T

    def nearest(self, x: float, y: float) -> tuple[int, float]:
        """Index of the image nearest to a point, and its distance in units of the plane."""
        distances = (self.points - torch.tensor([x, y])).norm(dim=1)
        index = int(distances.argmin())
        return index, float(distances[index])


def fit_plane(explored: Explored) -> Plane:
    """The plane of an autoencoder's images; the same for the same latents, signs included."""
    channels, height, width = (int(length) for length in explored.mean.shape[1:])
    shape = (channels, height, width)
    explained = None
    if shape == (2, 1, 1):
        origin, axes, scale = torch.zeros(2), torch.eye(2), torch.ones(2)
    else:
        scale = explored.channel_deviation.clamp_min(LEAST_SPREAD)
        scale = scale[:, None, None].expand(shape).reshape(-1)
        origin, axes, explained = _principal_axes(explored.mean.flatten(1), scale)
    points = ((explored.mean.flatten(1) - origin) / scale) @ axes.T
    deviation = points.std(dim=0, correction=0).clamp_min(LEAST_SPREAD)
    return Plane(
        kind="latent" if explained is None else "pca",
        points=points,
        bounds=_bounds(points),
        center=_pair(points.mean(dim=0)),
        spread=_pair(deviation),
        explained=explained,
        origin=origin,
        axes=axes,
        scale=scale,
        latent_shape=shape,
    )


def _principal_axes(latents: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Mean (d,), two orthonormal axes (2, d) and their shares of the variance, of latents (n, d) over `scale` (d,).

    Exact, by the products of either the numbers or the images with each other, whichever are fewer. The largest entry
    of an axis is positive; an axis without variance is zero.
    """
    from scipy.linalg import eigh

    fitted = latents[evenly_spaced(len(latents), FITTED_IMAGES)].double()
    origin = fitted.mean(dim=0)
    centered = (fitted - origin) / scale.double()
    count, length = centered.shape
    products = centered.T @ centered if length < count else centered @ centered.T
    first = max(0, len(products) - 2)
    values, vectors = (torch.from_numpy(each) for each in eigh(products, subset_by_index=[first, len(products) - 1]))
    axes = vectors.T if length < count else vectors.T @ centered
    total = float(products.trace())
    shares = [0.0, 0.0]
    found = torch.zeros(2, length, dtype=torch.float64)
    for place, (value, axis) in enumerate(zip(values.flip(0), axes.flip(0))):
        if value > 1e-12 * total:
            axis = axis / axis.norm()
            shares[place] = float(value) / total
            found[place] = axis * axis[axis.abs().argmax()].sign()
    return origin.float(), found.float(), (shares[0], shares[1])


def _bounds(points: Tensor) -> Bounds:
    """Along each axis all points but half a hundredth, and the margin: both axes together keep 99 %."""
    outside = (1 - SHARE_IN_BOUNDS) / 4
    low, high = torch.quantile(points.double(), torch.tensor([outside, 1 - outside], dtype=torch.float64), dim=0)
    room = (MARGIN * (high - low)).clamp_min(LEAST_SPREAD)
    low, high = low - room, high + room
    return float(low[0]), float(high[0]), float(low[1]), float(high[1])


def _pair(values: Tensor) -> tuple[float, float]:
    return float(values[0]), float(values[1])


# One number for how much of the map means something: the share that decodes to images that encode to where they were.

TOLERANCE = 0.25
"""Standard deviations of the images' points, along each axis its own."""
PAUSE_SECONDS = 0.001
"""After each pass, so that other threads get the networks: Python's locks know no queue."""


@dataclass(frozen=True, eq=False)
class RoundTrip:
    """The round trips of the centers of a grid's cells over the bounds of a plane.

    Attributes:
        share: of the cells inside, those whose error is at most the tolerance, 0 to 1.
        share_in_holes: the same of the cells inside that hold no image; None where every one does.
        tolerance: in standard deviations.
        grid: cells along each axis.
        errors: (grid, grid) float32, distance of where a center's decoded image is encoded to from the center, in the
            plane, in standard deviations of the images' points along each axis; rows by rising y.
        inside: (grid, grid) bool, cells whose center lies in the convex hull of the images' points.
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
    """Decode every center to 8-bit pixels, encode these to the mean, and project that.

    For a projected plane (`pca`) only the way inside the plane counts.

    Args:
        advance: called with the number of points that were just measured; what it raises ends the measurement.
    """
    centers = grid_centers(plane.bounds, grid)
    spread = torch.tensor(plane.spread)
    errors = []
    for part in centers.split(explored.batch):
        mean, _ = explored.encode(explored.decode(plane.latent_at(part)))
        errors.append(((plane.point_of(mean) - part) / spread).norm(dim=1))
        if advance is not None:
            advance(len(part))
        time.sleep(PAUSE_SECONDS)
    found = torch.cat(errors).reshape(grid, grid).numpy()
    inside = in_outline(plane.points.numpy(), centers.numpy()).reshape(grid, grid)
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


def grid_centers(bounds: Bounds, grid: int) -> Tensor:
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
