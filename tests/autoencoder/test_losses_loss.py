"""Loss terms, the perceptual gradient, KL and its units."""

import math

import pytest
import torch
import torch.nn.functional as F

from ldm_vae.autoencoder.losses import (
    LPIPS,
    LossConfig,
    ReconstructionLoss,
    crop_ms_ssim,
    high_frequency,
    texture_energy,
)
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.autoencoder.rate import bits_per_dimension, bits_per_pixel, kl_divergence
from ldm_vae.errors import UserError


def images(seed: int, size: int = 64) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def reference(random_backbone):
    """`lpips` itself with the same backbone."""
    import lpips
    from safetensors.torch import load_file

    network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    tensors = {key.removeprefix("features."): value for key, value in load_file(random_backbone).items()}
    network.net.load_state_dict({key: tensors[key.split(".", 1)[1]] for key in network.net.state_dict()})
    return network


def test_lpips_equals_the_package(random_backbone, reference):
    ours = LPIPS("squeeze", str(random_backbone))(images(0), images(1))
    assert ours.shape == (2,)
    torch.testing.assert_close(ours, reference(images(0), images(1)).flatten(), rtol=1e-5, atol=1e-6)


def test_the_perceptual_gradient_reaches_the_encoder_and_agrees_with_lpips(random_backbone, reference):
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(preset="pico"))
    loss = ReconstructionLoss(
        LossConfig(l1=0, perceptual=1, perceptual_net="squeeze", perceptual_weights=str(random_backbone))
    )
    weight = model.encoder.stages[0].resample.weight
    target = images(0)

    gradients = []
    for distance in (lambda x: loss(x, target, step=0)[0], lambda x: reference(x, target).mean()):
        model.zero_grad()
        distance(model(target).sample).backward()
        gradients.append(weight.grad.clone())
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))


def test_lpips_never_changes_and_stays_in_eval_mode(random_backbone):
    loss = ReconstructionLoss(
        LossConfig(perceptual=1, perceptual_net="squeeze", perceptual_weights=str(random_backbone))
    )
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.train()
    assert not any(module.training for module in loss.lpips.modules())
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    x = images(0).requires_grad_()
    loss(x, images(1), step=0)[0].backward()
    assert x.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_lpips_is_finite_on_constant_images(random_backbone):
    """Feature vectors that are all zero gave a NaN gradient in lpips 0.1.4."""
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    LPIPS("squeeze", str(random_backbone))(x, torch.zeros(1, 3, 64, 64)).mean().backward()
    assert torch.isfinite(x.grad).all()


def test_missing_or_wrong_backbone_weights_are_refused(tmp_path, random_backbone):
    with pytest.raises(UserError, match="no such file"):
        LPIPS("squeeze", str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="not the backbone of alexnet"):
        LPIPS("alex", str(random_backbone))
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        LPIPS("squeeze", str(tmp_path / "bad.safetensors"))


def test_every_term_is_zero_for_equal_images_and_positive_else(random_backbone):
    config = LossConfig(
        l1=1, mse=1, ms_ssim=1, perceptual=1, random_perceptual=1, high_frequency=1, texture_energy=1,
        perceptual_net="squeeze", perceptual_weights=str(random_backbone),
    )  # fmt: skip
    loss = ReconstructionLoss(config)
    total, same = loss(images(0), images(0), step=0)
    assert set(same) == set(config.weights())
    assert all(float(value) == pytest.approx(0, abs=1e-5) for value in same.values())
    x = (0.5 * images(1) + 0.5 * images(0)).requires_grad_()
    total, different = loss(x, images(0), step=0)
    assert all(float(value.detach()) > 0 for value in different.values())
    torch.testing.assert_close(total, sum(different.values()))
    for name, value in different.items():
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        assert float(gradient.abs().max()) > 0, name


@pytest.mark.parametrize(("side", "scales"), [(200, 5), (96, 3), (32, 2)])
def test_the_ms_ssim_term_is_that_of_torchmetrics(side, scales):
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

    x = F.interpolate(images(0, 16), side, mode="bicubic").clamp(-1, 1)
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales]
    betas = tuple(weight / sum(weights) for weight in weights)
    expected = measure((y + 1) / 2, (x + 1) / 2, sigma=1.0, kernel_size=7, betas=betas, data_range=1.0)
    assert float(crop_ms_ssim(y, x)) == pytest.approx(float(expected), abs=5e-3)  # it counts mirrored borders


def test_the_detail_terms_ignore_constant_offsets():
    x = images(0) * 0.5
    assert float(high_frequency(x + 0.25, x)) == pytest.approx(0, abs=1e-6)
    assert float(texture_energy(x + 0.25, x)) == pytest.approx(0, abs=1e-4)


def test_a_loss_without_weights_is_refused():
    with pytest.raises(UserError, match="every weight is 0"):
        LossConfig(l1=0)


def test_kl_agrees_with_torch_distributions():
    mean, logvar = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, torch.exp(0.5 * logvar)), normal(0.0, 1.0))
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


def test_rate_units():
    assert bits_per_dimension(math.log(2)) == pytest.approx(1)
    assert bits_per_pixel(2.5, latent_channels=4) == pytest.approx(0.2254, abs=1e-4)  # 4 * 2.5 / (64 ln 2)
    # 64x64x4 latents of a 512x512 image hold the same bits either way
    assert bits_per_pixel(1.0, 4) * 512**2 == pytest.approx(bits_per_dimension(1.0) * 64 * 64 * 4)
