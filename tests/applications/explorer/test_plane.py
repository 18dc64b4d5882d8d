"""The map: where latents lie, the way back, bounds, nearest images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_vae.applications.explorer.plane import fit_plane
from tests.applications.explorer.models import made_of


def vectors(count: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, 1, 1, generator=generator) * torch.tensor([2.0, 0.5])[:, None, None] + 1


def spatial(count: int = 60) -> torch.Tensor:
    """(n, 3, 4, 4) that differ most in two hidden ways."""
    generator = torch.Generator().manual_seed(1)
    ways = torch.randn(2, 3, 4, 4, generator=generator)
    strengths = torch.randn(count, 2, generator=generator) * torch.tensor([3.0, 1.5])
    noise = 0.1 * torch.randn(count, 3, 4, 4, generator=generator)
    return torch.einsum("nk,kchw->nchw", strengths, ways) + noise + 5


def test_two_numbers_are_the_plane_itself() -> None:
    latents = vectors()
    plane = fit_plane(made_of(latents))
    assert (plane.kind, plane.explained) == ("latent", None)
    assert torch.equal(plane.points, latents[:, :, 0, 0])
    assert torch.equal(plane.latent_at(torch.tensor([[0.25, -1.5]])), torch.tensor([0.25, -1.5]).view(1, 2, 1, 1))
    assert np.allclose(plane.spread, plane.points.std(dim=0, correction=0))
    assert np.allclose(plane.center, plane.points.mean(dim=0))


@pytest.mark.parametrize("count", [60, 20])  # more images than numbers in a latent, and fewer
def test_other_latents_are_projected_on_their_principal_axes(count: int) -> None:
    latents = spatial(count)
    plane = fit_plane(made_of(latents))
    deviation = latents.double().numpy().std(axis=(0, 2, 3), keepdims=True)
    scaled = (latents.double().numpy() / deviation).reshape(len(latents), -1)
    scaled -= scaled.mean(axis=0)
    u, s, _ = np.linalg.svd(scaled, full_matrices=False)
    expected = (u * s)[:, :2]
    expected *= np.sign((expected * plane.points.numpy()).sum(axis=0))  # an axis has no sign of its own
    assert plane.kind == "pca"
    assert np.allclose(plane.points.numpy(), expected, atol=1e-3)
    assert np.allclose(plane.explained, s[:2] ** 2 / (s**2).sum())
    assert sum(plane.explained or ()) > 0.95
    assert (plane.axes.gather(1, plane.axes.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_a_point_leads_back_to_itself_and_an_image_of_the_plane_to_its_latent() -> None:
    latents = spatial()
    plane = fit_plane(made_of(latents))
    places = torch.tensor([[0.0, 0.0], [3.0, -2.0], [-40.0, 7.0]])
    assert plane.latent_at(places).shape == (3, 3, 4, 4)
    assert torch.allclose(plane.point_of(plane.latent_at(places)), places, atol=1e-4)
    assert torch.allclose(plane.point_of(latents), plane.points, atol=1e-4)
    assert (plane.latent_at(plane.points) - latents).abs().mean() < 0.2  # all but the noise
    assert (plane.latent_at(plane.points[:1]) - latents[1:2]).abs().mean() > 1


def test_the_same_latents_give_the_same_plane() -> None:
    first, second = fit_plane(made_of(spatial())), fit_plane(made_of(spatial()))
    assert torch.equal(first.points, second.points)


@pytest.mark.parametrize("latents", [vectors(2000), spatial(2000)], ids=["vectors", "spatial"])
def test_the_bounds_hold_99_percent_and_a_margin(latents: torch.Tensor) -> None:
    latents = latents.clone()
    latents[0] = 1e4  # one far away does not make the map a dot
    plane = fit_plane(made_of(latents))
    x0, x1, y0, y1 = plane.bounds
    x, y = plane.points.T
    inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    assert 0.99 <= float(inside.float().mean()) < 1
    kept = x[inside]
    assert x0 < float(kept.quantile(0.005)) - 0.02 * (x1 - x0)


def test_the_nearest_image() -> None:
    plane = fit_plane(made_of(vectors()))
    index, distance = plane.nearest(0.3, 0.9)
    distances = np.linalg.norm(plane.points.numpy() - [0.3, 0.9], axis=1)
    assert index == distances.argmin()
    assert distance == pytest.approx(distances.min(), rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 2, 1, 1), (5, 4, 2, 2), (5, 1, 1, 1)])
def test_latents_that_are_all_the_same_make_a_finite_plane(shape: tuple[int, ...]) -> None:
    plane = fit_plane(made_of(torch.ones(shape)))
    x0, x1, y0, y1 = plane.bounds
    assert x0 < x1
    assert y0 < y1
    assert min(plane.spread) > 0
    assert torch.isfinite(plane.points).all()
    assert torch.isfinite(plane.latent_at(torch.tensor([[1.0, 1.0]]))).all()


def test_a_latent_of_one_number_has_one_axis() -> None:
    latents = torch.linspace(-1, 1, 9).view(9, 1, 1, 1)
    plane = fit_plane(made_of(latents))
    assert plane.explained == pytest.approx((1.0, 0.0), abs=1e-6)
    assert (plane.points[:, 0].diff() > 0).all()
    assert (plane.points[:, 1] == 0).all()
