"""The rate controller on a problem whose answer is known."""

import json
import math

import pytest
import torch

from ldm_vae.autoencoder.rate import RateConfig, RateController
from ldm_vae.errors import UserError


def plant(beta: float) -> torch.Tensor:
    """A Gaussian of variance 1 coded through the optimal linear channel: KL = 0.5 ln(1 / (c beta)) nats."""
    return torch.tensor(max(1e-3, 0.5 * math.log(1 / min(0.999, 2.0 * beta))))


def run(controller: RateController, first: int, last: int) -> list[float]:
    betas = []
    for step in range(first, last):
        beta = float(controller.beta(step))
        betas.append(beta)
        controller.observe(step, plant(beta))
    return betas


@pytest.mark.parametrize("target", [1.0, 2.5])
def test_the_target_is_met_and_beta_is_locked_at_the_end(target):
    controller = RateController(RateConfig(target_nats=target), steps=4000)
    betas = run(controller, 0, 4000)
    assert float(plant(betas[-1])) == pytest.approx(target, rel=0.02)
    assert len(set(betas[3600:])) == 1


def test_a_saved_controller_continues_exactly():
    whole, first, second = (RateController(RateConfig(), steps=400) for _ in range(3))
    expected = run(whole, 0, 400)
    before = run(first, 0, 370)  # inside the stretch that the lock averages
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + run(second, 370, 400) == expected


def test_a_young_encoder_does_not_wind_the_integral_down():
    controller = RateController(RateConfig(), steps=10_000)
    for step in range(1500):  # it spends next to nothing yet
        controller.observe(step, torch.tensor(0.01))
    assert float(controller.beta(1500)) == pytest.approx(1e-3 * math.exp(-0.5), rel=0.01)


def test_an_unreachable_target_is_noticed_and_the_integral_does_not_wind_up_at_the_bound():
    controller = RateController(RateConfig(), steps=100_000)
    for step in range(30_000):  # a KL far below the target for good: beta goes to its minimum
        controller.observe(step, torch.tensor(0.01))
    assert float(controller.beta(30_000)) == pytest.approx(1e-7, rel=0.01)
    assert float(controller.pinned_share) > 0.05
    for step in range(30_000, 30_400):
        controller.observe(step, torch.tensor(50.0))
    assert float(controller.beta(30_400)) > 1e-6


def test_free_bits_leave_a_poor_channel_alone():
    controller = RateController(RateConfig(mode="free_bits", beta=0.1, free_nats=0.25), steps=100, channels=2)
    for step in range(50):
        controller.observe(step, torch.tensor([0.1, 1.0]))
    kl = torch.tensor([0.1, 1.0], requires_grad=True)
    controller.penalty(50, kl).backward()
    assert kl.grad is not None
    assert kl.grad.tolist() == pytest.approx([0.0, 0.05])
    again = RateController(controller.config, steps=100, channels=2)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert torch.equal(again.penalty(50, kl), controller.penalty(50, kl))


def test_a_kl_that_is_not_finite_leaves_beta_finite():
    controller = RateController(RateConfig(), steps=1000)
    for step in range(200):
        controller.observe(step, torch.tensor(float("nan")))
    assert math.isfinite(float(controller.beta(200)))


def test_fixed_mode_is_constant_and_settings_without_effect_are_refused():
    controller = RateController(RateConfig(mode="fixed", beta=0.0), steps=10)
    controller.observe(0, torch.tensor(9.0))
    assert float(controller.beta(1)) == 0.0
    with pytest.raises(UserError, match="has no effect"):
        RateConfig(mode="target", beta=0.1)
    with pytest.raises(UserError, match="needs a weight"):
        RateConfig(mode="fixed")
