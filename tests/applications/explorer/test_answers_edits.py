"""Moved latents: nothing moved changes no pixel, everything else moves what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_vae.applications.directions.fitting import Direction, Directions
from ldm_vae.applications.explorer.answers import along, edited_reconstruction, path_strip
from ldm_vae.applications.explorer.explored import Explored
from ldm_vae.applications.explorer.plane import fit_plane
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.errors import UserError
from tests.applications.explorer.models import Toy, made_of


@pytest.fixture(scope="module")
def explored() -> Explored:
    torch.manual_seed(0)
    autoencoder = build_autoencoder(AutoencoderConfig(preset="pico")).eval()
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    empty = made_of(torch.zeros(6, 4, 4, 4), autoencoder, images)
    mean, logvar = empty.encode(images)
    found = [Direction("light/probe", np.array([1.0, -0.5, 0.25, 0.0]), "light", {})]
    return made_of(mean, autoencoder, images, logvar=logvar, directions=Directions(found, "", {}, {}))


def test_nothing_moved_is_the_decoded_mean_to_the_bit(explored: Explored) -> None:
    plain = explored.decode(explored.mean[2:3])[0]
    assert torch.equal(edited_reconstruction(explored, 2, sample=False), plain)
    assert torch.equal(edited_reconstruction(explored, 2, noise=0.0), plain)
    still = edited_reconstruction(explored, 2, sample=False, offsets={0: 0.0}, directions={"light/probe": 0.0})
    assert torch.equal(still, plain)
    assert not torch.equal(edited_reconstruction(explored, 2), plain)
    assert explored.channel_deviation is explored.channel_deviation  # not measured anew for every slider's move


def test_noise_is_scaled_and_follows_from_its_seed(explored: Explored) -> None:
    mean = explored.mean[1:2]
    once, twice = explored.latent(1, 1.0) - mean, explored.latent(1, 2.0) - mean
    assert torch.allclose(twice, 2 * once, atol=1e-5)
    assert torch.equal(explored.latent(1, 1.0, seed=3), explored.latent(1, 1.0, seed=3))
    assert not torch.equal(explored.latent(1, 1.0, seed=3), explored.latent(1, 1.0, seed=4))
    ratio = once / torch.exp(0.5 * explored.logvar[1:2])
    assert 0.6 < float(ratio.std()) < 1.4  # a standard normal draw


def test_a_point_has_no_noise(explored: Explored) -> None:
    plain = made_of(explored.mean, explored.autoencoder, explored.images, deterministic=True)
    assert torch.equal(plain.latent(0, 3.0), explored.mean[:1])


def test_a_channel_moves_by_its_own_deviations(explored: Explored) -> None:
    latent = explored.mean[3:4].clone()
    latent[:, 1] += 2 * explored.mean[:, 1].std(correction=0)
    moved = edited_reconstruction(explored, 3, sample=False, offsets={1: 2.0})
    assert (moved.int() - explored.decode(latent)[0].int()).abs().max() <= 1
    assert not torch.equal(moved, edited_reconstruction(explored, 3, sample=False))
    for channel in (-1, 4):
        with pytest.raises(UserError, match=f"channels: {channel} is not between 0 and 3"):
            edited_reconstruction(explored, 3, offsets={channel: 1.0})


def test_a_direction_is_added_everywhere(explored: Explored) -> None:
    move = torch.tensor([1.0, -0.5, 0.25, 0.0]).view(1, 4, 1, 1)
    expected = explored.decode(explored.mean[3:4] - 1.5 * move)[0]
    assert torch.equal(edited_reconstruction(explored, 3, sample=False, directions={"light/probe": -1.5}), expected)
    with pytest.raises(UserError, match="'dark' is unknown"):
        edited_reconstruction(explored, 3, directions={"dark": 1.0})
    bare = made_of(explored.mean, explored.autoencoder, explored.images)
    with pytest.raises(UserError, match="with directions=FOLDER"):
        edited_reconstruction(bare, 3, directions={"light/probe": 1.0})


def test_images_are_left_as_they_were(explored: Explored) -> None:
    before = explored.mean.clone()
    edited_reconstruction(explored, 0, sample=False, offsets={0: 3.0}, directions={"light/probe": 3.0})
    assert torch.equal(explored.mean, before)


def test_a_path_begins_and_ends_where_it_says() -> None:
    latents = torch.randn(50, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    explored = made_of(latents, Toy())
    plane = fit_plane(explored)
    points = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [2.0, 2.0]])
    strip = path_strip(explored, plane, points, 7)
    assert strip.dtype == torch.uint8
    assert strip.shape == (3, 8, 7 * 8)
    for frame, point in ((0, points[0]), (4, points[1]), (6, points[2])):
        decoded = explored.decode(plane.latent_at(point[None]))[0]
        assert torch.equal(strip[:, :, frame * 8 : (frame + 1) * 8], decoded)


def test_points_along_a_path_are_evenly_spaced() -> None:
    corner = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 0.0], [3.0, 1.0]])
    expected = [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [3.0, 1.0]]
    assert torch.allclose(along(corner, 5), torch.tensor(expected))
    for points in (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0], [1.0, 2.0]])):
        assert torch.equal(along(points, 3), torch.tensor([[1.0, 2.0]] * 3))
