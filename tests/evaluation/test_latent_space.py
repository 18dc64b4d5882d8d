"""Known answers of what a latent space is like: paths between images, samples of the prior."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.klt import fit_klt
from ldm_vae.evaluation import latent_space


class Blocks(Autoencoder):
    """A lossless autoencoder without training: the latent is the 2x2 pixel-unshuffled image, exactly known."""

    config, dtype = SimpleNamespace(latent_channels=12, block_out_channels=(1, 1)), torch.float32

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        mean = self.gain * nn.functional.pixel_unshuffle(x, 2)
        return DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, -20.0)], dim=1))

    def image(self, z: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(z / self.gain, 2)


class Jumping(Blocks):
    """Decodes the nearer end only: the path stands still, jumps once, stands still."""

    def image(self, z: Tensor) -> Tensor:
        return super().image(torch.where(z < 0, -0.6 * torch.ones_like(z), 0.6 * torch.ones_like(z)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return (0.3 * torch.randn(6, 3, 32, 32, generator=rng)).clamp(-0.9, 0.9)


def test_a_cross_fade_is_known(images: Tensor) -> None:
    pair = images[:2]
    found = latent_space.interpolation(Blocks(), pair)
    middle = pair.mean(0, keepdim=True)

    def contrast(x: Tensor) -> float:
        return float(x.diff(dim=-1).abs().sum() + x.diff(dim=-2).abs().sum())

    expected = contrast(middle) / (0.5 * (contrast(pair[:1]) + contrast(pair[1:])))
    assert found.midpoint_sharpness == pytest.approx(expected, abs=0.01)  # 8-bit rounding
    assert 1.0 <= found.unevenness < 2.0
    assert (found.pairs, found.distance) == (1, "1 - SSIM")


def test_a_path_that_jumps_once_has_the_highest_unevenness() -> None:
    ends = torch.stack([torch.full((3, 32, 32), -0.4), torch.full((3, 32, 32), 0.6)])
    assert latent_space.interpolation(Jumping(), ends).unevenness == pytest.approx(8.0)


def test_pairs_do_not_overlap_and_one_image_is_too_few(images: Tensor) -> None:
    assert latent_space.interpolation(Blocks(), images[:5]).pairs == 2
    with pytest.raises(ValueError, match="at least 2"):
        latent_space.interpolation(Blocks(), images[:1])


def test_the_distance_is_lpips_where_it_is_given(images: Tensor, random_backbone: Path) -> None:
    from ldm_vae.autoencoder.losses import LPIPS

    large = nn.functional.interpolate(images[:2], size=64)
    found = latent_space.interpolation(Blocks(), large, LPIPS("squeeze", str(random_backbone)))
    assert found.distance == "LPIPS"
    large = nn.functional.interpolate(images[:2], size=168)
    assert latent_space.interpolation(Blocks(), large).distance == "1 - MS-SSIM"


def test_prior_samples_of_a_lossless_code_are_known() -> None:
    """White noise is its own prior: sampled latents give the statistics of the images, and every cycle closes."""
    images = (0.3 * torch.randn(8, 3, 160, 160, generator=torch.Generator().manual_seed(0))).clamp(-0.9, 0.9)
    klt = fit_klt([images])
    found = latent_space.prior_samples(Blocks(), images, klt)
    assert found.cycle_error < 0.05
    assert found.cycle_error_real < 0.05
    assert found.frechet_reconstructions < 1e-3
    assert found.frechet < 0.05  # finitely many blocks: an estimate of equal distributions is not exactly 0
    assert found == latent_space.prior_samples(Blocks(), images, klt)
    smooth = nn.functional.interpolate(images[..., ::8, ::8], size=160, mode="bicubic").clamp(-1, 1)
    structured = latent_space.prior_samples(Blocks(), smooth, fit_klt([smooth]))
    assert structured.frechet > 0.3  # neighboring pixels agree, independent draws do not
    scaled = latent_space.prior_samples(Blocks(gain=50.0), images, klt)
    assert scaled.cycle_error == pytest.approx(found.cycle_error, abs=0.01)  # in units of the latent's deviation


def test_block_frechet_is_zero_for_the_same_images_and_sees_a_shift(images: Tensor) -> None:
    klt = fit_klt([images])
    assert latent_space.block_frechet(images, images, klt) == pytest.approx(0, abs=1e-9)
    shift = 0.05
    blocks = nn.functional.pixel_unshuffle(images, 8).permute(0, 2, 3, 1).reshape(-1, 192).double()
    basis = klt.components[:16]
    variance = torch.cov((blocks @ basis.T).T, correction=0).trace()
    expected = (basis @ torch.full((192,), shift, dtype=torch.float64)).square().sum() / variance
    assert latent_space.block_frechet(images + shift, images, klt) == pytest.approx(float(expected), rel=1e-4)
