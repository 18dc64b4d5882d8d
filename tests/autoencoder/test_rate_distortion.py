"""The rate controller on a linear Gaussian problem, whose rate-distortion function is known in closed form."""

import math

import pytest
import torch
from torch import nn

from ldm_vae.autoencoder.rate import RateConfig, RateController, kl_divergence

VARIANCES = torch.tensor([4.0, 2.0, 1.0, 0.3, 0.01])
STEPS = 3000


def reverse_water_filling(variances: torch.Tensor, mean_nats: float) -> torch.Tensor:
    """Nats per component, max(0, ln(variance / level) / 2), at the level that spends `mean_nats` on average."""
    low, high = 1e-6, float(variances.max())
    for _ in range(200):
        level = math.sqrt(low * high)
        nats = (0.5 * (variances / level).log()).clamp(min=0)
        low, high = (level, high) if float(nats.mean()) > mean_nats else (low, level)
    return nats


@pytest.mark.parametrize("target", [0.6, 1.2])
def test_the_target_is_met_and_the_channels_follow_reverse_water_filling(target):
    torch.manual_seed(0)
    size = len(VARIANCES)
    encoder, decoder = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
    for layer in (encoder, decoder):  # turning onto the axes is slow and not what is tested
        layer.weight.data = torch.eye(size) + 0.1 * torch.randn(size, size)
    logvar = nn.Parameter(torch.full((size,), -1.0))
    parameters = [*encoder.parameters(), *decoder.parameters(), logvar]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    controller = RateController(RateConfig(target_nats=target), STEPS, channels=size)
    tail = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * step / STEPS)) + 1e-4
        data = torch.randn(512, size) * VARIANCES.sqrt()
        mean = encoder(data)
        kl = kl_divergence(mean, logvar.expand_as(mean)).mean(dim=0)
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        loss = (decoder(latents) - data).square().mean() + controller.penalty(step, kl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.observe(step, kl.detach())
        if step >= 0.95 * STEPS:
            tail.append(kl.detach())
    found = torch.stack(tail).mean(dim=0)
    assert float(found.mean()) == pytest.approx(target, rel=0.02)
    expected = reverse_water_filling(VARIANCES, target)
    torch.testing.assert_close(found.sort(descending=True).values, expected, atol=0.06, rtol=0)
    assert float(controller.pinned_share) == 0
