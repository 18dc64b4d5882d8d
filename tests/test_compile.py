"""`torch.compile` finds one graph in every network of a training: a break would cost the speed, without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm_vae.autoencoder.fast_layers import use_blocked_group_norm
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.diffusion.unet import UNetConfig, build_unet


def compiled(function: Any) -> Any:
    """One graph or an error; "eager" leaves out the code generation, which takes a minute."""
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True)


@pytest.mark.parametrize(("architecture", "preset"), [("wavelet", "pico"), ("sd", "tiny")])
@pytest.mark.parametrize("training", [True, False])
def test_an_autoencoder_is_one_graph(architecture: Any, preset: Any, training: bool) -> None:
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(architecture, preset)).train(training)
    if training:
        use_blocked_group_norm(model)
    images = (torch.rand(1, 3, 64, 64) * 2 - 1).contiguous(memory_format=torch.channels_last)

    def there_and_back(images: torch.Tensor) -> torch.Tensor:
        return model.decode(model.encode(images).latent_dist.mean).sample

    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(there_and_back)(images), there_and_back(images), rtol=1e-3, atol=1e-4)


def test_the_unet_is_one_graph() -> None:
    torch.manual_seed(0)
    unet = build_unet(UNetConfig("tiny", prediction="velocity"), 4)
    noisy, times = torch.randn(1, 4, 16, 16), torch.tensor([0.5])
    torch.testing.assert_close(compiled(unet)(noisy, times), unet(noisy, times), rtol=1e-3, atol=1e-4)


def test_a_break_would_be_noticed() -> None:
    def with_a_break(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(Exception, match=r"(?i)graph break|data-dependent|unsupported"):
        compiled(with_a_break)(torch.ones(3))
