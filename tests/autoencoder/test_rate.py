"""The rate controller on a problem whose answer is known."""

import json
import math
import random
from collections.abc import Callable

import pytest
import torch

from ldm_vae.autoencoder.rate import RateConfig, RateController, whole_image_rate
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


def test_a_rate_that_whole_images_miss_is_said_with_the_target_that_would_hold_it() -> None:
    """Where the ratio of both rates stays, crops at 2.5 * 2.5 / 2.8 nats mean whole images at 2.5."""
    words = whole_image_rate(2.5, 2.5, 2.8, 512)
    assert "2.50 nats per latent dimension on held-out training crops (target 2.5), 2.80 on whole" in words
    assert words.endswith("512 x 512; for 2.5 nats there, train with about rate.target_nats=2.23")
    assert "train with" not in whole_image_rate(2.5, 2.5, 2.6, 512)


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
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), 370)
    assert before + run(second, 370, 400) == expected


class Encoder:
    """A plant as an encoder is: its KL follows beta after some 15 steps, batches differ by 3 %, and it is young first.

    `kl` is without the noise of the batch, as on held-out images.
    """

    def __init__(self, seed: int) -> None:
        self.rng, self.kl = random.Random(seed), 0.01

    def train(self, controller: RateController, first: int, last: int) -> None:
        for step in range(first, last):
            aim = float(plant(float(controller.beta(step)))) * (1 - math.exp(-step / 80))
            self.kl *= (max(aim, 1e-3) / self.kl) ** (1 / 15)
            controller.observe(step, torch.tensor(self.kl * math.exp(0.03 * self.rng.gauss(0, 1))))


def continued(plans: list[tuple[int, int]], seed: int = 0, kept: Callable[[dict], dict] = dict) -> Encoder:
    """A run that is stopped at the second number of each pair, of so many steps as the first says, and continued.

    `kept`: what of the state is in a checkpoint.
    """
    encoder, state, first = Encoder(seed), None, 0
    for steps, stop in plans:
        controller = RateController(RateConfig(), steps)
        if state is not None:
            controller.load_state_dict(kept(json.loads(json.dumps(state))), first)
        encoder.train(controller, first, stop)
        state, first = controller.state_dict(), stop
    return encoder


def random_plans(seed: int) -> list[tuple[int, int]]:
    """Three plans, each stopped anywhere from step 400 on; shortened, lengthened, by a few steps or by many."""
    rng, plans, stop = random.Random(seed), [], 400
    for number in range(3):
        steps = stop + rng.choice((5, 40, 150, 400, 900))
        stop = steps if number == 2 or rng.random() < 0.3 else rng.randrange(stop, steps)
        plans.append((steps, stop))
    return plans


SHORTENED, LENGTHENED = [(900, 501), (560, 560)], [(900, 900), (1150, 1150)]


@pytest.mark.parametrize("plans", [SHORTENED, LENGTHENED, *map(random_plans, range(10))], ids=str)
def test_the_rate_is_met_after_any_sequence_of_shortening_and_lengthening(plans):
    """Of ln beta, only what was added under the present plan is averaged, and it is divided by how much that is.

    Divided by the length of the window instead, whatever was added, the first sequence ends at 0.001 nats, the second
    at 4.7. Trainings ended at 0.46 nats, and at a beta 90 times too small.
    """
    assert continued(plans).kl == pytest.approx(2.5, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_the_rate_is_met_after_many_more_sequences(seed):
    assert continued(random_plans(seed), seed).kl == pytest.approx(2.5, rel=0.03)


@pytest.mark.parametrize("plans", [SHORTENED, LENGTHENED, [(900, 800), (900, 900)], [(900, 850), (900, 900)],
                                   [(900, 800), (1000, 1000)], [(900, 850), (880, 880)]], ids=str)  # fmt: skip
def test_a_checkpoint_of_an_earlier_release_has_the_sum_alone(plans):
    only_sum = lambda state: {name: value for name, value in state.items() if name not in ("averaged", "steps")}  # noqa: E731
    found = continued(plans, kept=only_sum).kl
    assert found == pytest.approx(2.5, rel=0.03)
    if plans[0][0] == plans[1][0]:
        assert found == continued(plans).kl  # to the last bit, where the plan is the same


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
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())), 50)
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
