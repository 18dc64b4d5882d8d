"""A network that starts as the best linear code of its images, and adds to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_vae.autoencoder.klt import fit_klt
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.autoencoder.wavelet import LINEAR_PATH_MARGIN, AutoencoderWavelet
from ldm_vae.errors import UserError
from tests.evaluation.linear_autoencoder import random_fields

CONFIG = AutoencoderConfig(preset="pico", latent_channels=8, linear_path=True)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return random_fields(count=24)


@pytest.fixture
def autoencoder(images: Tensor) -> AutoencoderWavelet:
    torch.manual_seed(0)
    model = build_autoencoder(CONFIG)
    model.fit_statistics(images.split(8))
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("channels", [8, 5])
def test_it_starts_as_the_block_klt_at_every_channel_count(
    channels: int, autoencoder: AutoencoderWavelet, images: Tensor
) -> None:
    expected = fit_klt([images], flat=True).reconstruct(images, channels).clamp(-1, 1)
    narrow = autoencoder.narrow(channels)
    torch.testing.assert_close(narrow.reconstruct(images), expected, atol=2e-5, rtol=0)


def test_latents_start_at_variance_1_and_the_noise_falls_with_the_variance(
    autoencoder: AutoencoderWavelet, images: Tensor
) -> None:
    mean, _ = autoencoder.encode_moments(images)
    torch.testing.assert_close(mean.var(dim=(0, 2, 3), unbiased=False), torch.ones(8), atol=1e-3, rtol=0)
    noise = autoencoder.encoder.head.bias[8:]
    variances = fit_klt([images], flat=True).eigenvalues[:8].float()
    assert (noise.diff() >= -1e-6).all()
    free = noise > autoencoder.config.logvar_floor + 1 + 1e-4
    level = (noise + variances.log())[free]  # the water level: the same for every channel that is off the clamp
    assert len(level) > 4
    torch.testing.assert_close(level, level[:1].expand_as(level))


def test_a_flat_image_stays_flat(autoencoder: AutoencoderWavelet) -> None:
    flat = torch.tensor([0.5, -0.3, 0.1]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    torch.testing.assert_close(autoencoder.reconstruct(flat), flat, atol=1e-5, rtol=0)


def test_a_pattern_with_the_period_of_the_block_passes_and_without_the_path_it_cannot(images: Tensor) -> None:
    """The reason for the path: upsampling and convolutions make a constant of constant latents."""
    wave = torch.sin(torch.arange(64) * torch.pi / 4).expand(1, 3, 64, 64)
    with_path = build_autoencoder(CONFIG)
    with_path.fit_statistics([torch.cat([images, 0.5 * wave])])
    without_path = build_autoencoder(AutoencoderConfig(preset="pico", latent_channels=8))
    latents = with_path.encode_moments(wave)[0]
    inside = latents[..., 2:6, 2:6]
    torch.testing.assert_close(inside, inside[..., :1, :1].expand_as(inside), atol=1e-4, rtol=0)
    with torch.no_grad():
        drawn, constant = (model.decode(latents).sample[..., 24:40, 24:40] for model in (with_path, without_path))
    assert float(drawn.std()) > 0.3
    assert float(constant[0, 0].std()) < 1e-4


def test_every_part_learns(autoencoder: AutoencoderWavelet, images: Tensor) -> None:
    """The last layers start at zero, so that what lies before them has a gradient from the second step on."""
    autoencoder.train().requires_grad_(True)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=1e-4)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (autoencoder(images[:4]).sample - images[:4]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    unused = {"encoder.head.bias"}  # half of it makes the noise, which this loss does not see
    for name, parameter in autoencoder.named_parameters():
        assert parameter.grad is not None, name
        assert name in unused or float(parameter.grad.abs().max()) > 0, name
    assert losses[-1] < losses[0]


def test_it_is_saved_and_loaded_whole(autoencoder: AutoencoderWavelet, images: Tensor, tmp_path: Path) -> None:
    autoencoder.save_pretrained(tmp_path)
    again = load_autoencoder(tmp_path)
    torch.testing.assert_close(again.reconstruct(images), autoencoder.reconstruct(images), atol=0, rtol=0)
    assert again.encoder_fingerprint() == autoencoder.encoder_fingerprint()
    assert again.config.logvar_floor == -7.0 - LINEAR_PATH_MARGIN
    with torch.no_grad():
        again.encoder.analysis.spread[0] *= 2
    assert again.encoder_fingerprint() != autoencoder.encoder_fingerprint()


def test_a_plain_autoencoder_can_have_it(images: Tensor) -> None:
    model = build_autoencoder(AutoencoderConfig(preset="pico", latent_channels=4, kind="ae", linear_path=True))
    model.fit_statistics([images])
    expected = fit_klt([images], flat=True).reconstruct(images, 4).clamp(-1, 1)
    torch.testing.assert_close(model.eval().reconstruct(images), expected, atol=2e-5, rtol=0)


def test_without_images_or_for_another_kind_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        build_autoencoder(CONFIG).fit_statistics([])
    with pytest.raises(UserError, match=r"linear_path: has no effect with .* and autoencoder\.kind=vq"):
        AutoencoderConfig(kind="vq", linear_path=True)
    with pytest.raises(UserError, match="latent_channels: 193 are more than the 192 numbers of a block"):
        AutoencoderConfig(latent_channels=193, linear_path=True)
