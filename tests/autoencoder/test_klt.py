from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_vae.autoencoder.klt import block_moments, fit_klt, solve_klt
from ldm_vae.metrics import psnr
from tests.evaluation.linear_autoencoder import random_fields


@pytest.fixture(scope="module")
def images() -> Tensor:
    return random_fields(count=6)


def test_the_basis_is_orthonormal_and_sorted(images: Tensor) -> None:
    klt = fit_klt([images], block=4)
    torch.testing.assert_close(klt.components @ klt.components.T, torch.eye(48, dtype=torch.float64))
    assert (klt.eigenvalues.diff() <= 0).all()


def test_all_components_give_the_images_back(images: Tensor) -> None:
    klt = fit_klt([images])
    torch.testing.assert_close(klt.reconstruct(images, 192), images, atol=1e-5, rtol=0)


def test_the_discarded_eigenvalues_are_the_error(images: Tensor) -> None:
    klt = fit_klt(images.split(2))
    for components in (1, 4, 16):
        error = (klt.reconstruct(images, components) - images).double().square().mean()
        assert klt.expected_psnr(components) == pytest.approx(float(10 * torch.log10(4 / error)), abs=1e-3)


def test_no_other_linear_code_of_the_block_does_better(images: Tensor) -> None:
    klt = fit_klt([images])
    best = (klt.reconstruct(images, 4) - images).square().mean()
    vectors = torch.nn.functional.pixel_unshuffle(images, 8).permute(0, 2, 3, 1).reshape(-1, 192)
    for seed in range(5):
        tilt = 0.05 * torch.randn(192, 4, generator=torch.Generator().manual_seed(seed))
        basis, _ = torch.linalg.qr(klt.components[:4].T.float() + tilt)
        centerd = vectors - klt.mean.float()
        assert (centerd @ basis @ basis.T - centerd).square().mean() > best


def test_two_factors_of_variation_need_two_components() -> None:
    rng = torch.Generator().manual_seed(1)
    patterns = torch.randn(2, 3, 8, 8, generator=rng)
    weights = torch.randn(40, 2, generator=rng)
    blocks = 0.1 * torch.einsum("nk,kchw->nchw", weights, patterns) + 0.2
    klt = fit_klt([blocks])
    assert float(psnr(klt.reconstruct(blocks, 2), blocks).min()) > 90
    assert float(psnr(klt.reconstruct(blocks, 1), blocks).mean()) < 40


def test_any_size_is_reconstructed_at_its_size(images: Tensor) -> None:
    klt = fit_klt([images])
    odd = images[:1, :, :61, :35]
    reconstruction = klt.reconstruct(odd, 16)
    assert reconstruction.shape == odd.shape
    torch.testing.assert_close(reconstruction[..., :56, :32], klt.reconstruct(odd[..., :56, :32], 16))


def test_gains_shrink_coefficients_towards_the_mean_block(images: Tensor) -> None:
    klt = fit_klt([images])
    torch.testing.assert_close(klt.reconstruct(images, 4, torch.ones(4)), klt.reconstruct(images, 4))
    first, both = klt.reconstruct(images, 1), klt.reconstruct(images, 2)
    torch.testing.assert_close(klt.reconstruct(images, 2, torch.tensor([1.0, 0.25])), first + 0.25 * (both - first))


def test_impossible_requests_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="no images"):
        fit_klt([])
    with pytest.raises(ValueError, match="choose 1 to 192"):
        fit_klt([images]).reconstruct(images, 193)


def test_moments_add_up_to_the_whole(images: Tensor) -> None:
    parts = [block_moments(part) for part in images.split(2)]
    together = solve_klt(parts)
    torch.testing.assert_close(together.eigenvalues, fit_klt([images]).eigenvalues)
    assert sum(part.count for part in parts) == 6 * 64


def test_the_flat_transform_gives_flat_blocks_back_and_is_the_best_that_does(images: Tensor) -> None:
    klt = fit_klt([images], flat=True)
    torch.testing.assert_close(klt.components @ klt.components.T, torch.eye(192, dtype=torch.float64))
    colors = torch.rand(5, 3, 1, 1).expand(5, 3, 16, 16) * 2 - 1
    kept = [index for index, row in enumerate(klt.components) if float(row.view(3, 64).sum(dim=1).abs().max()) > 1e-6]
    assert len(kept) == 3
    torch.testing.assert_close(klt.reconstruct(colors, max(kept) + 1), colors, atol=1e-5, rtol=0)
    plain = fit_klt([images])
    assert float((plain.reconstruct(colors, max(kept) + 1) - colors).abs().max()) > 1e-4
    for components in (max(kept) + 1, 16, 64):
        assert klt.expected_psnr(components) == pytest.approx(plain.expected_psnr(components), abs=0.5)
        assert klt.expected_psnr(components) <= plain.expected_psnr(components)
