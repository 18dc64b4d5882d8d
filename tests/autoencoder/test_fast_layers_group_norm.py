from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae.autoencoder.fast_layers import BlockedGroupNorm, use_blocked_group_norm
from ldm_vae.autoencoder.models import AutoencoderConfig
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.autoencoder.training import VaeModel


def layer(groups: int, channels: int) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def images(channels: int, dtype: torch.dtype, format: torch.memory_format = torch.channels_last) -> Tensor:
    x = torch.randn(2, channels, 40, 24, generator=torch.Generator().manual_seed(1)) + 0.5
    return x.to(dtype).contiguous(memory_format=format).requires_grad_()


def gradients(norm: nn.Module, x: Tensor, given: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = norm(x)
    return y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), given)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_the_gradient_is_that_of_float64(
    dtype: torch.dtype, tolerance: float, format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks, the last one not full; the incoming gradient in either layout."""
    monkeypatch.setattr("ldm_vae.autoencoder.fast_layers.BLOCK_ELEMENTS", 1 << 13)
    norm, x = layer(16, 64), images(64, dtype)
    given = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype).contiguous(memory_format=format)
    blocked = copy.deepcopy(norm)
    use_blocked_group_norm(blocked)
    assert type(blocked) is BlockedGroupNorm
    exact, wide = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    expected = torch.autograd.grad(exact(wide), (wide, exact.weight, exact.bias), given.double())
    values, *found = gradients(blocked, x, given)
    assert "_Blocked" in type(blocked(x).grad_fn).__name__
    assert torch.equal(values, gradients(norm, x, given)[0])
    for one, true in zip(found, expected, strict=True):
        assert (one.double() - true).norm() < tolerance * true.norm()
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[0].dtype == dtype


def test_where_torch_is_as_fast_it_stays() -> None:
    for channels, dtype, format in (
        (64, torch.float32, torch.contiguous_format),
        (512, torch.bfloat16, torch.channels_last),
        (128, torch.float32, torch.channels_last),
    ):
        norm, x = layer(16, channels), images(channels, dtype, format)
        given = torch.randn_like(x)
        blocked = copy.deepcopy(norm)
        use_blocked_group_norm(blocked)
        assert all(map(torch.equal, gradients(norm, x, given), gradients(blocked, x, given)))


def test_without_gradient_and_frozen_it_is_the_plain_layer() -> None:
    norm, x = layer(16, 64), images(64, torch.float32)
    blocked = copy.deepcopy(norm).requires_grad_(False)
    use_blocked_group_norm(blocked)
    with torch.no_grad():
        assert torch.equal(blocked(x), norm(x))
    (gradient,) = torch.autograd.grad(blocked(x).square().sum(), x)  # the weights ask for none
    (expected,) = torch.autograd.grad(norm(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_a_stable_diffusion_autoencoder_is_trained_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainVaeConfig(output="unused", autoencoder=AutoencoderConfig(architecture="sd", preset="tiny"))
    model: Any = VaeModel(config, None)
    kinds = {type(module) for module in model.autoencoder.modules() if isinstance(module, nn.GroupNorm)}
    assert kinds == {BlockedGroupNorm}
    x = torch.rand(1, 3, 32, 32)

    def gradient() -> Tensor:
        made = model.autoencoder(x).sample
        model.autoencoder.zero_grad()
        F.mse_loss(made, x).backward()
        return model.autoencoder.encoder.conv_in.weight.grad.clone()

    found = gradient()
    monkeypatch.setattr("ldm_vae.autoencoder.fast_layers.MOST_CHANNELS", {})
    expected = gradient()
    assert 0 < (found - expected).norm() < 1e-4 * expected.norm()
