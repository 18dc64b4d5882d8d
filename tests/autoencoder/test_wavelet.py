"""The Haar transform, the wavelet autoencoder, and the diffusers interface."""

import pytest
import torch
from diffusers import AutoencoderKL

from ldm_vae.autoencoder.base import DETERMINISTIC_LOGVAR
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.autoencoder.wavelet import haar_forward, haar_inverse, soft_clamp
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.errors import UserError

PICO = AutoencoderConfig(architecture="wavelet", preset="pico")
PICO_AE = AutoencoderConfig(architecture="wavelet", preset="pico", kind="ae")
SD_TINY = AutoencoderConfig(architecture="sd", preset="tiny")


@pytest.fixture(params=[PICO, PICO_AE, SD_TINY], ids=["wavelet", "wavelet-ae", "sd"])
def autoencoder(request):
    torch.manual_seed(0)
    return build_autoencoder(request.param).eval().requires_grad_(False)


def test_haar_is_orthonormal_and_inverts():
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    y = haar_forward(x)
    assert y.shape == (2, 12, 8, 12)
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    torch.testing.assert_close(haar_inverse(y), x)
    basis = haar_forward(torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4)).reshape(16, 16)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16, dtype=torch.float64))


def test_haar_of_a_constant_is_all_in_the_low_band():
    y = haar_forward(torch.full((1, 1, 4, 4), 0.5))
    assert torch.equal(y[:, 0], torch.ones(1, 2, 2))
    assert torch.equal(y[:, 1:], torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("size", [64, 256, 512])
def test_encode_and_decode_shapes(autoencoder, size):
    if size == 512 and isinstance(autoencoder, AutoencoderKL):
        size = 128  # the attention of the SD architecture is costly in a test
    mean, logvar = autoencoder.encode_moments(torch.zeros(1, 3, size, size))
    assert mean.shape == logvar.shape == (1, 4, size // 8, size // 8)
    assert autoencoder.decode_images(mean).shape == (1, 3, size, size)


@pytest.mark.parametrize(("height", "width"), [(61, 77), (8, 100), (129, 64)])
def test_sizes_that_8_does_not_divide_are_padded_and_cropped_back(autoencoder, height, width):
    images = torch.rand(2, 3, height, width) * 2 - 1
    assert autoencoder.encode_moments(images)[0].shape[-2:] == (-(-height // 8), -(-width // 8))
    assert autoencoder.reconstruct(images).shape == images.shape
    # the padding only adds: where 8 divides the size, nothing is done to it
    whole = torch.rand(1, 3, 64, 64) * 2 - 1
    direct = autoencoder.decode(autoencoder.encode(whole).latent_dist.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(autoencoder.reconstruct(whole), direct)


def test_reconstruct_samples_the_posterior_with_its_generator():
    model = build_autoencoder(PICO).eval()
    images = torch.rand(1, 3, 32, 32)
    first, again, other = (model.reconstruct(images, sample=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_constant_latent_decodes_to_a_constant_image():
    """No grid: pixel-shuffle and wavelet heads leave a standard deviation of about 0.02 here."""
    model = build_autoencoder(PICO).eval()
    image = model.decode_images(torch.randn(1, 4, 1, 1).expand(1, 4, 16, 16))
    assert float(image.std(dim=(2, 3)).max()) < 1e-5


def test_the_decoder_is_translation_equivariant():
    model = build_autoencoder(PICO).eval()
    latents = torch.randn(1, 4, 24, 24)
    whole, part = model.decode_images(latents), model.decode_images(latents[..., 4:])
    torch.testing.assert_close(whole[..., 16 * 8 :], part[..., 12 * 8 :], rtol=0, atol=1e-5)


def test_logvar_stays_softly_inside_its_bounds_with_a_gradient():
    raw = torch.tensor([-60.0, -7.0, 0.0, 60.0], requires_grad=True)
    clamped = soft_clamp(raw, -7.0)
    assert clamped.min() >= -7.0
    assert clamped.max() <= 2.001
    assert abs(float(clamped[2])) < 0.2
    clamped[1:3].sum().backward()
    assert float(raw.grad[1]) > 0.4


def test_save_and_load_is_exact(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path / "model")
    loaded = load_autoencoder(tmp_path / "model")
    assert fingerprint(loaded) == fingerprint(autoencoder)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded.reconstruct(images), autoencoder.reconstruct(images))
    assert loaded.downsampling == 8


def test_diffusers_itself_loads_the_sd_autoencoder(tmp_path):
    model = build_autoencoder(SD_TINY).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path).eval()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).sample, model(images).sample, rtol=1e-4, atol=1e-5)


def test_the_fingerprint_sees_one_changed_weight_and_the_architecture():
    torch.manual_seed(0)
    model = build_autoencoder(PICO)
    before = fingerprint(model)
    assert before == fingerprint(model)
    with torch.no_grad():
        model.decoder.head.bias[0] += 1e-6
    assert fingerprint(model) != before


def test_the_fingerprint_sees_settings_but_not_those_that_a_later_release_adds():
    torch.manual_seed(0)
    model = build_autoencoder(PICO)
    before = fingerprint(model)
    model.register_to_config(scaling_factor=1.0)  # its default
    assert fingerprint(model) == before
    model.register_to_config(logvar_floor=-9.0)  # same weights, other latents
    assert fingerprint(model) != before


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = build_autoencoder(PICO)
    images = torch.rand(1, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        if enable:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(images).sample.square().mean().backward()
        gradients.append(model.encoder.stages[0].blocks[0].first.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_a_directory_without_a_model_is_refused_with_advice(tmp_path):
    with pytest.raises(UserError, match="is empty; give a finished run"):
        load_autoencoder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_autoencoder(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"_class_name": "os.system"}')
    with pytest.raises(UserError, match="not an autoencoder"):
        load_autoencoder(tmp_path)


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="choose one of pico, nano"):
        AutoencoderConfig(preset="giant")


def test_a_plain_autoencoder_has_points_for_latents():
    torch.manual_seed(0)
    model = build_autoencoder(PICO_AE)
    mean, logvar = model.encode_moments(torch.rand(1, 3, 32, 32))
    assert model.encoder.head.out_channels == 4
    assert torch.equal(logvar, torch.full_like(mean, DETERMINISTIC_LOGVAR))
    sample = model.encode(torch.rand(1, 3, 32, 32)).latent_dist.sample()
    assert sample.shape == mean.shape
    assert model.deterministic
    assert not build_autoencoder(PICO).deterministic
    assert not build_autoencoder(SD_TINY).deterministic
    model(torch.rand(1, 3, 32, 32)).sample.mean().backward()
    assert float(model.encoder.head.weight.grad.norm()) > 0


@pytest.mark.parametrize("kind", ["kl", "ae"])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_narrow_channels_is_the_full_autoencoder_with_a_tail_of_zeros(kind, channels, tmp_path):
    torch.manual_seed(0)
    full = build_autoencoder(AutoencoderConfig(preset="pico", kind=kind, latent_channels=6), logvar_floor=-5.0).eval()
    with torch.no_grad():  # fresh biases would hide rows that were mixed up
        full.encoder.head.bias.add_(torch.randn_like(full.encoder.head.bias))
    narrow = full.narrow(channels)
    assert (narrow.config.latent_channels, narrow.config.logvar_floor) == (channels, full.config.logvar_floor)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    for kept, whole in zip(narrow.encode_moments(images), full.encode_moments(images)):
        torch.testing.assert_close(kept, whole[:, :channels], rtol=1e-5, atol=1e-6)
    latents = torch.randn(2, 6, 4, 6)
    tail_of_zeros = latents.clone()
    tail_of_zeros[:, channels:] = 0
    torch.testing.assert_close(
        narrow.decode_images(latents[:, :channels]), full.decode_images(tail_of_zeros), rtol=1e-4, atol=1e-5
    )
    narrow.save_pretrained(tmp_path)
    assert fingerprint(load_autoencoder(tmp_path)) == fingerprint(narrow)
    assert (fingerprint(narrow) == fingerprint(full)) == (channels == 6)
    with torch.no_grad():
        narrow.decoder.head.bias.add_(1)  # the full one keeps its own weights
    assert not torch.equal(narrow.decoder.head.bias, full.decoder.head.bias)


def test_channels_that_cannot_be_cut_are_refused():
    with pytest.raises(UserError, match="between 1 and the 4 channels"):
        build_autoencoder(PICO).narrow(5)
    with pytest.raises(UserError, match="channels: this autoencoder cannot be cut"):
        build_autoencoder(SD_TINY).narrow(2)
