"""The ELBO is that of a Gaussian decoder; regret is what a better posterior would gain, image by image."""

from __future__ import annotations

import math

import pytest
import torch

from ldm_vae.applications.anomaly.scores import likelihood_regret, negative_elbo
from ldm_vae.autoencoder.rate import kl_divergence
from tests.evaluation.linear_autoencoder import LinearAutoencoder, random_fields

VARIANCE = 0.01


def test_the_elbo_of_a_gaussian_decoder():
    images, decoded = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    kl = torch.rand(2, 4, 1, 1)
    likelihood = torch.distributions.Normal(decoded, math.sqrt(0.3)).log_prob(images).flatten(1).sum(dim=1)
    expected = -(likelihood - kl.flatten(1).sum(dim=1)) / (3 * 64)
    torch.testing.assert_close(negative_elbo(images, decoded, kl, 0.3), expected)


def test_the_mean_squared_error_is_the_variance_with_the_best_elbo():
    """Rybkin et al.: no other variance explains the errors better."""
    images, decoded, kl = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.zeros(4, 1, 1, 1)
    best = float((images - decoded).square().mean())
    at = [float(negative_elbo(images, decoded, kl, best * factor).mean()) for factor in (0.9, 1.0, 1.1)]
    assert at[1] < min(at[0], at[2])


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return random_fields(8)


def regret(images: torch.Tensor, moved: float, steps: int = 5) -> torch.Tensor:
    """Of an autoencoder whose posterior means are `moved` by so many of their standard deviations."""
    autoencoder = LinearAutoencoder(random_fields(48))
    mean, logvar = autoencoder.moments(images)
    mean = mean + moved * torch.exp(0.5 * logvar)
    noise = torch.randn(1, *mean.shape[1:], generator=torch.Generator().manual_seed(0))
    return likelihood_regret(autoencoder, images, mean, logvar, noise, VARIANCE, steps)


def test_a_bad_posterior_is_regretted(images):
    good, bad = regret(images, 0.0), regret(images, 3.0)
    assert bool((good >= 0).all())
    assert bool((bad > good + 0.01).all())


def test_more_steps_never_regret_less_and_no_step_regrets_nothing(images):
    found = torch.stack([regret(images, 2.0, steps) for steps in (0, 1, 4, 12)])
    assert float(found[0].abs().max()) == 0.0
    assert bool((found.diff(dim=0) >= -1e-6).all())
    assert bool((found[-1] > 0).all())


def test_images_do_not_affect_each_other_and_no_gradient_is_left(images):
    together, alone = regret(images, 1.0), torch.cat([regret(image[None], 1.0) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        inside = regret(images, 1.0)
    torch.testing.assert_close(inside, together)
    assert not together.requires_grad


def test_the_first_value_is_the_elbo_of_the_encoder(images):
    """Regret and ELBO are the same quantity: the lowest negative ELBO is the first less the regret."""
    autoencoder = LinearAutoencoder(random_fields(48))
    mean, logvar = autoencoder.moments(images)
    kl = kl_divergence(mean, logvar)
    noise = torch.zeros(1, *mean.shape[1:])
    first = negative_elbo(images, autoencoder.decode(mean).sample, kl, VARIANCE)
    found = likelihood_regret(autoencoder, images, mean, logvar, noise, VARIANCE, 30)
    assert bool((found <= first - 0.5 * math.log(2 * math.pi * VARIANCE)).all())  # what is left is an error, so >= 0


def test_what_a_step_makes_worse_is_not_taken(images):
    """At the prior, under a decoder that knows nothing, every move costs KL."""
    mean = torch.zeros(len(images), 4, 8, 8)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    autoencoder = LinearAutoencoder(random_fields(48))
    found = likelihood_regret(autoencoder, images, mean, torch.zeros_like(mean), noise, 1e6, 3)
    assert found.tolist() == pytest.approx([0.0] * len(images), abs=1e-6)
