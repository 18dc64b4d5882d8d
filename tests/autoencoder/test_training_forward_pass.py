"""The training pass: sampling, nested channels, shrinking with antialiasing."""

from __future__ import annotations

import math

import torch

from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.autoencoder.training import ForwardPass, channel_masks, shrink


def model(**settings):
    torch.manual_seed(0)
    return build_autoencoder(AutoencoderConfig(preset="pico", **settings))


def test_without_noise_the_pass_is_encode_and_decode_and_the_noise_has_the_posteriors_width():
    autoencoder = model()
    images, zero = torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, 4, 4, 4)
    trained = ForwardPass(autoencoder)
    made = trained(images, zero)
    torch.testing.assert_close(made.reconstruction, autoencoder.decode(made.mean).sample)
    noisy = trained(images, zero + 1)
    expected = autoencoder.decode(made.mean + (0.5 * made.logvar).exp()).sample
    torch.testing.assert_close(noisy.reconstruction, expected)
    assert made.indices is None
    assert made.losses == {}


def test_a_disturbance_reaches_the_decoder_and_not_the_posterior():
    autoencoder = model()
    images, zero = torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, 4, 4, 4)
    disturbance = torch.randn(2, 4, 4, 4)
    made = ForwardPass(autoencoder)(images, zero, disturbance=disturbance)
    torch.testing.assert_close(made.reconstruction, autoencoder.decode(made.mean + disturbance).sample)
    torch.testing.assert_close(made.mean, autoencoder.encode(images).latent_dist.mean)


def test_shrunk_latents_are_compared_with_shrunk_images_and_shrinking_is_antialiased():
    trained = ForwardPass(model())
    made = trained(torch.rand(2, 3, 64, 64) * 2 - 1, torch.zeros(2, 4, 8, 8), None, 4)
    assert made.reconstruction.shape == (2, 3, 32, 32)
    assert made.mean.shape == (2, 4, 8, 8)  # the rate is that of the whole latent
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 1, 32, 32)
    assert float(shrink(stripes, 8)[..., 2:-2].abs().max()) < 0.1  # the finest stripes vanish, they do not alias


def test_half_of_the_images_keep_the_first_channels_only():
    masks = channel_masks([4, 8, 12], 16, torch.linspace(0, 1 - 1e-6, 6000))
    kept = masks.flatten(1).sum(dim=1)
    assert [int((kept == count).sum()) for count in (4, 8, 12, 16)] == [1000, 1000, 1000, 3000]
    assert torch.equal(masks, masks.cummin(dim=1).values)  # the kept ones come first


def test_a_masked_pass_is_that_of_the_narrow_autoencoder():
    autoencoder = model(latent_channels=8)
    images, zero = torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(1, 8, 4, 4)
    mask = channel_masks([4], 8, torch.zeros(1))
    made = ForwardPass(autoencoder)(images, zero, mask)
    narrow = autoencoder.narrow(4)
    torch.testing.assert_close(narrow.decode(narrow.encode(images).latent_dist.mean).sample, made.reconstruction)


def test_a_frozen_encoder_gets_no_gradient_and_a_free_one_does():
    for frozen in (True, False):
        trained = ForwardPass(model(), encoder_frozen=frozen)
        trained(torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 4, 4)).reconstruction.sum().backward()
        gradient = trained.autoencoder.encoder.head.weight.grad
        assert (gradient is None) == frozen
        assert math.isfinite(float(trained.autoencoder.decoder.head.weight.grad.sum()))
