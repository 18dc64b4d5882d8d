"""The share of the map that comes back to itself: autoencoders whose share is known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_vae.applications.explorer.plane import fit_plane, grid_centers, in_outline, measure_round_trip, occupied
from tests.applications.explorer.models import Toy, made_of


def filled(count: int = 500) -> Tensor:
    """(n, 2, 1, 1), evenly spread from -2 to 2."""
    return (torch.rand(count, 2, 1, 1, generator=torch.Generator().manual_seed(0)) - 0.5) * 4


def ring(count: int = 500) -> Tensor:
    angle = torch.linspace(0, 2 * np.pi, count)
    return 2 * torch.stack([angle.cos(), angle.sin()], dim=1)[:, :, None, None]


def test_what_comes_back_everywhere_has_a_share_of_one() -> None:
    explored = made_of(ring(), Toy())
    found = measure_round_trip(explored, fit_plane(explored), grid=12)
    assert (found.share, found.share_in_holes) == (1.0, 1.0)
    assert found.errors.shape == found.inside.shape == (12, 12)
    assert found.errors.max() < found.tolerance == 0.25


def test_what_draws_the_same_for_all_has_a_share_of_almost_none() -> None:
    explored = made_of(ring(), Toy(shown=0))
    found = measure_round_trip(explored, fit_plane(explored), grid=12)
    assert found.share < 0.1
    assert found.share_in_holes is not None
    assert found.share_in_holes < 0.1
    nearest = np.unravel_index(found.errors.argmin(), found.errors.shape)
    assert {5, 6} >= set(nearest)  # the middle is what every picture is encoded to


def test_errors_are_in_deviations_of_each_axis_and_rows_rise_with_y() -> None:
    scale = torch.tensor([1.0, 0.25])[:, None, None]
    explored = made_of(filled() * scale, Toy(shown=0))
    plane = fit_plane(explored)
    found = measure_round_trip(explored, plane, grid=6)
    centers = grid_centers(plane.bounds, 6)
    expected = (centers / torch.tensor(plane.spread)).norm(dim=1).reshape(6, 6)
    assert np.allclose(found.errors, expected, atol=0.1)  # 8-bit pixels
    assert (centers[:6, 1] == centers[0, 1]).all()
    assert centers[0, 1] < centers[6, 1]
    assert centers[0, 0] < centers[1, 0]


class HalfBlind(Toy):
    """Draws nothing of latents with a negative first number."""

    def decode(self, z: Tensor):  # type: ignore[no-untyped-def]
        return super().decode(z * (z[:, :1] >= 0))


def test_half_of_the_map() -> None:
    explored = made_of(filled(), HalfBlind())
    found = measure_round_trip(explored, fit_plane(explored), grid=12)
    assert 0.45 < found.share < 0.6
    assert found.errors[:, 6:].max() < 0.1


def test_a_projected_plane_is_judged_in_the_plane() -> None:
    class Repeated(Toy):
        """Four numbers, of which only the first two are drawn, large as ever."""

        def encode(self, x: Tensor):  # type: ignore[no-untyped-def]
            posterior = super().encode(x).latent_dist
            mean = torch.cat([posterior.mean, 0.1 * posterior.mean.flip(1)], dim=1)
            posterior.mean, posterior.logvar = mean, mean * 0
            return type(super().encode(x))(latent_dist=posterior)

        def decode(self, z: Tensor):  # type: ignore[no-untyped-def]
            return super().decode(z[:, :2])

    latents = torch.cat([ring(), 0.1 * ring().flip(1)], dim=1)
    explored = made_of(latents, Repeated())
    plane = fit_plane(explored)
    assert plane.kind == "pca"
    assert measure_round_trip(explored, plane, grid=8).share == 1.0


def test_cells_with_images_are_no_holes_and_only_the_outline_counts() -> None:
    plane = fit_plane(made_of(ring()))
    held, inside = occupied(plane, 12), in_outline(plane.points.numpy(), grid_centers(plane.bounds, 12).numpy())
    assert not held[5:7, 5:7].any()
    assert held[5:7, [0, 1, 10, 11]].any()
    assert inside.reshape(12, 12)[5:7, 5:7].all()
    assert not inside.reshape(12, 12)[[0, 0, -1, -1], [0, -1, 0, -1]].any()
    corner = fit_plane(made_of(torch.cat([ring(), torch.tensor([[2.0, -2.0]]).view(1, 2, 1, 1)])))
    assert occupied(corner, 12)[:2, -2:].any()  # large x, small y
    assert not occupied(corner, 12)[-2:, :2].any()
    whole = fit_plane(made_of(filled(40_000)))
    assert occupied(whole, 6).all()


@pytest.mark.parametrize("bend", [0.0, 1.0])
def test_an_outline_around_nothing_does_not_count(bend: float) -> None:
    points = np.stack([np.arange(9.0), bend * np.arange(9.0) ** 2], axis=1)
    assert in_outline(points, np.array([[1.0, -5.0], [2.0, -3.0]])).all()


def test_whoever_waits_is_told_of_every_point_and_may_stop_it() -> None:
    explored = made_of(ring(), Toy())
    done: list[int] = []
    measure_round_trip(explored, fit_plane(explored), grid=40, advance=done.append)
    assert sum(done) == 1600
    assert len(done) > 1
