"""Ways between images: a linear autoencoder's is known, noise comes back, priors have their statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_vae import metrics
from ldm_vae.applications import interpolation
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.errors import UserError
from tests.diffusion.conftest import pipeline as pipeline  # a fixture
from tests.evaluation.linear_autoencoder import LinearAutoencoder, random_fields


class Linear(LinearAutoencoder):
    device = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return random_fields(8, 64)


@pytest.fixture(scope="module")
def linear(images: Tensor) -> Linear:
    return Linear(random_fields(16, 64, seed=1))


def test_a_linear_autoencoder_cross_fades_what_it_reconstructs(linear: Linear, images: Tensor) -> None:
    pair = 0.5 * images[:2]  # far from where decoding clamps
    frames = interpolation.through_latents(linear, pair, 5)
    ends = linear.decode_images(linear.encode_moments(pair)[0])
    torch.testing.assert_close(frames, interpolation.cross_fade(ends, 5), atol=0.01, rtol=0)
    figures = interpolation.measure_way(frames, pair)
    assert figures.end_psnr_db == pytest.approx(float(metrics.psnr(frames[[0, -1]], pair).mean()))
    assert figures.fade_psnr_db > figures.end_psnr_db  # errors of both ends half cancel


def test_figures_of_the_cross_fade_itself(images: Tensor) -> None:
    figures = interpolation.measure_way(interpolation.cross_fade(images[:2], 5), images[:2])
    assert (figures.end_psnr_db, figures.distance) == (100.0, "1 - SSIM")
    assert figures.fade_psnr_db > 45  # 8-bit rounding
    assert 1 <= figures.unevenness < 3
    assert figures.perceptual_length > 0


def test_through_noise_and_back_the_ends_stay(pipeline: LatentDiffusionPipeline, images: Tensor) -> None:
    frames = interpolation.through_inversion(pipeline, images[:2], 3, steps=10)
    means = torch.cat([pipeline.autoencoder.encode_moments(image[None])[0] for image in images[:2]])
    assert float(metrics.psnr(frames[[0, -1]], pipeline.autoencoder.decode_images(means)).min()) > 30
    assert frames.shape == (3, 3, 64, 64)


def test_noised_latents_forget_as_much_as_is_asked_for(pipeline: LatentDiffusionPipeline, images: Tensor) -> None:
    means = torch.cat([pipeline.autoencoder.encode_moments(image[None])[0] for image in images[:2]])
    plain = pipeline.autoencoder.decode_images(means)

    def kept(strength: float) -> float:
        frames = interpolation.through_noising(pipeline, images[:2], 3, 6, strength, 0)
        return float(metrics.psnr(frames[[0, -1]], plain).mean())

    assert kept(0.2) > kept(1.0)
    whole = interpolation.through_noising(pipeline, images[:2], 3, 4, 1.0, 0)
    torch.testing.assert_close(whole[0], whole[2], atol=0.01, rtol=0)  # all noise: nothing is left of the images


def test_priors_have_the_statistics_that_their_names_say(linear: Linear, images: Tensor) -> None:
    shifted = (0.4 * images + 0.3).clamp(-1, 1)
    plain, own, posterior = interpolation.draw_priors(linear, shifted, 6, seed=0)
    assert [draws.title for draws in (plain, own, posterior)] == ["N(0, 1)", "channel statistics", "posterior samples"]
    assert own.images.mean() == pytest.approx(float(shifted.mean()), abs=0.05)
    assert abs(float(plain.images.mean() - shifted.mean())) > 0.15
    assert posterior.round_trip < own.round_trip + 0.05
    assert plain.images.shape == (6, 3, 64, 64)
    again = interpolation.draw_priors(linear, shifted, 6, seed=0)[0]
    assert torch.equal(again.images, plain.images)


def test_the_model_draws_images_of_the_size_asked_for(pipeline: LatentDiffusionPipeline) -> None:
    drawn = interpolation.draw_model(pipeline, torch.zeros(1, 3, 60, 64), 2, steps=2, seed=0)
    assert drawn.images.shape == (2, 3, 60, 64)


def test_latents_that_are_not_finite_are_refused(linear: Linear, images: Tensor) -> None:
    broken = images[:2].clone()
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="latents: some are not finite"):
        interpolation.through_latents(linear, broken, 3)
    with pytest.raises(UserError, match="latents: some are not finite"):
        interpolation.draw_priors(linear, broken, 1, 0)
