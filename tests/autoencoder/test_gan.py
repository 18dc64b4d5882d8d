"""The adversarial loss: losses in closed form, no gradient across, when it weighs what, what the guard does."""

import json
import math

import pytest
import torch
from torch import nn

from ldm_vae.autoencoder.gan import (
    TIMES,
    AdversarialConfig,
    AdversarialLoss,
    PatchDiscriminator,
    augment,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from ldm_vae.errors import UserError


def config(**settings) -> AdversarialConfig:
    return AdversarialConfig(**({"loss": "hinge", "start": 10, "warmup": 20, "ramp": 10, "width": 4} | settings))


def test_losses_of_known_logits():
    fake, real = torch.tensor([[[[-2.0, 0.5]]]]), torch.tensor([[[[3.0, 0.5]]]])
    hinge, relativistic = config(), config(loss="relativistic")
    assert float(generator_loss(hinge, fake, None)) == pytest.approx(0.75)
    assert float(discriminator_loss(hinge, fake, real)) == pytest.approx(0.5 * (0.75 + 0.25))
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    assert float(discriminator_loss(relativistic, fake, real)) == pytest.approx((softplus(-5) + softplus(0)) / 2)
    assert float(generator_loss(relativistic, fake, real)) == pytest.approx((softplus(5) + softplus(0)) / 2)


def test_the_gradient_penalty_of_a_linear_patch_discriminator():
    discriminator = nn.Conv2d(1, 1, 2, stride=2, bias=False)  # patches do not overlap: |gradient of a patch|^2 = |w|^2
    images = torch.randn(3, 1, 8, 8, requires_grad=True)
    penalty = gradient_penalty(discriminator(images), images)
    assert float(penalty.detach()) == pytest.approx(0.5 * float(discriminator.weight.detach().square().sum()), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(discriminator.weight.grad, discriminator.weight.detach())


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_the_decoders_step_gives_the_discriminator_no_gradient(loss):
    adversarial, discriminator = AdversarialLoss(config(loss=loss), 100, seed=0), PatchDiscriminator(4)
    output, real = torch.rand(2, 3, 48, 48, requires_grad=True), torch.rand(2, 3, 48, 48)
    adversarial.decoder_term(discriminator, output, real, adversarial.chance(0, 2, torch.device("cpu"))).backward()
    assert float(output.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_the_discriminators_step_gives_the_decoder_no_gradient(loss):
    adversarial, discriminator = AdversarialLoss(config(loss=loss), 100, seed=0), PatchDiscriminator(4)
    decoder = nn.Conv2d(3, 3, 1)
    fake, real = decoder(torch.rand(2, 3, 48, 48)), torch.rand(2, 3, 48, 48)
    terms = adversarial.discriminator_terms(
        discriminator, fake, real, adversarial.chance(0, 2, torch.device("cpu")), step=0
    )
    assert set(terms) == {"discriminator", "r1", "logit_gap"}
    adversarial.discriminator_total(terms).backward()
    assert decoder.weight.grad is None
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in discriminator.parameters() if parameter.ndim > 1)
    assert "r1" not in adversarial.discriminator_terms(
        discriminator, fake, real, adversarial.chance(1, 2, torch.device("cpu")), step=1
    )


def test_the_discriminator_learns_alone_then_the_calibrated_weight_ramps_up_and_stays():
    adversarial = AdversarialLoss(config(strength=0.2), 100, seed=0)
    assert (adversarial.start, adversarial.engage, adversarial.ramp_end) == (10, 30, 40)
    assert [adversarial.learns(step) for step in (9, 10)] == [False, True]
    measured = [step for step in range(100) if adversarial.measures(step)]
    assert measured == list(range(20, 30))
    for step in range(100):
        adversarial.observe_loss(step, torch.tensor(1.0))
        if adversarial.measures(step):
            adversarial.observe_ratio(torch.tensor([16.0, 1.0]))  # squared norms: the ratio of the gradients is 4
        if step < 30:
            assert float(adversarial.weight(step)) == 0
    assert float(adversarial.weight(35)) == pytest.approx(0.4)
    assert [float(adversarial.weight(step)) for step in range(40, 100)] == pytest.approx([0.8] * 60)


def test_the_adaptive_weight_follows_the_ratio():
    adversarial = AdversarialLoss(config(weight="adaptive", strength=0.5), 100, seed=0)
    for step in range(100):
        adversarial.observe_loss(step, torch.tensor(1.0))
        if adversarial.measures(step):
            adversarial.observe_ratio(torch.tensor([9.0 if step < 60 else 36.0, 1.0]))
    assert float(adversarial.weight(99)) == pytest.approx(0.5 * 6, rel=0.1)


@pytest.mark.promise(8)
@pytest.mark.parametrize("weight", ["calibrated", "adaptive"])
@pytest.mark.parametrize("norms", [[float("nan"), 1.0], [float("inf"), 1.0], [1.0, float("inf")]])
def test_a_measurement_that_is_not_finite_counts_for_nothing(weight, norms):
    """Its update is left out; the weight would stay NaN and with it every update after that."""
    losses = [AdversarialLoss(config(weight=weight, strength=0.5), 100, seed=0) for _ in range(2)]
    for step in range(60):
        for adversarial, faulty in zip(losses, (False, True)):
            adversarial.observe_loss(step, torch.tensor(float("nan") if faulty and step in (3, 25, 45) else 1.0))
            if adversarial.measures(step):
                adversarial.observe_ratio(torch.tensor([16.0, 1.0]))
                if faulty and step in (20, 25, 45):
                    adversarial.observe_ratio(torch.tensor(norms))
    assert float(losses[1].weight(60)) == pytest.approx(float(losses[0].weight(60)), rel=1e-6)
    assert float(losses[1].weight(60)) > 0


def test_the_guard_holds_then_restores_and_is_part_of_the_state():
    adversarial = AdversarialLoss(config(weight="fixed", strength=0.5, restore_steps=20), 1000, seed=0)
    for step in range(50):
        adversarial.observe_loss(step, torch.tensor(1.0))
    assert float(adversarial.weight(50)) == 0.5
    for step in range(50, 62):
        adversarial.observe_loss(step, torch.tensor(2.0))
    assert float(adversarial.weight(62)) == 0  # held: 15 % worse
    assert not adversarial.must_restore()
    for step in range(62, 100):
        adversarial.observe_loss(step, torch.tensor(2.0))
    assert adversarial.must_restore()
    again = AdversarialLoss(adversarial.config, 1000, seed=0)
    again.load_state_dict(json.loads(json.dumps(adversarial.state_dict())), 100)
    assert again.must_restore()
    assert torch.equal(again.weight(100), adversarial.weight(100))
    assert [alarm.name for alarm in adversarial.alarms({"adversarial/holding": 0.9})] == ["adversarial_held"]
    factor = float(adversarial._state["factor"])
    assert 0.99**100 < factor < 0.99**30  # what is held loses weight
    adversarial.restored()
    assert [alarm.name for alarm in adversarial.alarms({})] == ["adversarial_restored"]
    assert float(adversarial.weight(100)) == pytest.approx(0.5 * factor / 4)
    assert not adversarial.must_restore()


@pytest.mark.parametrize(("bands", "side"), [(False, 70), (True, 72)])
def test_a_logit_sees_70_pixels_as_in_patchgan_and_72_with_the_haar_bands(bands, side):
    """Closed form: kernels of 4 at strides 2, 2, 2, 1, 1 see 1 + 3 (1 + 2 + 4 + 8 + 8) pixels (arXiv:1611.07004)."""
    discriminator = PatchDiscriminator(4)
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    steps = [math.prod(layer.stride[0] for layer in convolutions[:index]) for index in range(len(convolutions))]
    assert 1 + sum((layer.kernel_size[0] - 1) * step for layer, step in zip(convolutions, steps)) == 70
    for layer in convolutions:
        nn.init.ones_(layer.weight)  # nothing cancels
    if not bands:
        nn.init.zeros_(convolutions[0].weight[:, 3:])
    images = torch.rand(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = images.grad[0].abs().amax(0) > 0
    assert int(seen.any(0).sum()) == int(seen.any(1).sum()) == side


SHARES = {"start": 0.6, "warmup": 0.1, "ramp": 0.1}


def adversarial_run(steps: int, first: int, last: int, state: dict | None = None) -> AdversarialLoss:
    """The stage of a run of so many steps, from step `first` to `last`; the ratio of the gradients is 4."""
    adversarial = AdversarialLoss(config(strength=0.2, **SHARES), steps, seed=0)
    if state is not None:
        adversarial.load_state_dict(json.loads(json.dumps(state)), first)
    for step in range(first, last):
        if step == adversarial.engage:  # what was measured before it is all there
            assert float(adversarial._state["reference"]) == pytest.approx(1.0)
            assert float(adversarial._state["ratio_count"]) == adversarial.engage - adversarial.measure_from > 0
        adversarial.observe_loss(step, torch.tensor(1.0))
        if adversarial.measures(step):
            adversarial.observe_ratio(torch.tensor([16.0, 1.0]))
        if step < adversarial.engage:
            assert float(adversarial.weight(step)) == 0
    return adversarial


@pytest.mark.parametrize(
    ("before", "stop", "after", "times"),
    [
        (1000, 500, 1000, (600, 700, 800)),  # the same plan
        (1000, 650, 1000, (600, 700, 800)),
        (1000, 500, 2000, (1200, 1400, 1600)),  # it lies ahead in both
        (1000, 650, 2000, (1200, 1400, 1600)),  # begun, and ahead again: measured again
        (1000, 1000, 1100, (600, 700, 800)),  # begun, and it goes on
        (1000, 650, 900, (600, 700, 800)),
        (1000, 550, 700, (550, 620, 690)),  # it should have begun at 420: now
        (1000, 550, 600, None),  # too little is left of it
        (1000, 650, 690, None),
    ],
)
def test_the_stage_of_a_run_that_becomes_longer_or_shorter(before, stop, after, times):
    """It is never felt uncalibrated, without a reference for its guard, or from a discriminator that did not learn."""
    state = adversarial_run(before, 0, stop).state_dict()
    if times is None:
        with pytest.raises(UserError, match="ask for more steps"):
            adversarial_run(after, stop, after, state)
        return
    adversarial = adversarial_run(after, stop, after, state)
    assert (adversarial.start, adversarial.engage, adversarial.ramp_end) == times
    assert float(adversarial.weight(after)) == pytest.approx(0.8)
    again = AdversarialLoss(adversarial.config, after, seed=0)
    again.load_state_dict(adversarial.state_dict(), after)
    assert again.state_dict() == adversarial.state_dict()


def test_a_stage_saved_by_an_earlier_release_opens():
    """Its times are not in the checkpoint: they are those of the plan, unless nothing was measured yet."""
    for stop, times in ((650, (600, 700, 800)), (500, (600, 700, 800))):
        state = {k: v for k, v in adversarial_run(1000, 0, stop).state_dict().items() if k not in TIMES}
        adversarial = adversarial_run(1000, stop, 1000, state)
        assert (adversarial.start, adversarial.engage, adversarial.ramp_end) == times
        assert float(adversarial.weight(1000)) == pytest.approx(0.8)
    late = adversarial_run(700, 500, 700, state)
    assert (late.start, late.engage, late.ramp_end) == (500, 570, 640)


def test_an_adversarial_loss_that_never_begins_is_refused():
    with pytest.raises(UserError, match="never"):
        AdversarialLoss(config(start=0.97, warmup=0.05), 100, seed=0)
    with pytest.raises(UserError, match="hold_above"):
        config(hold_above=1.5, restore_above=1.2)


def test_augmentation_is_neutral_at_the_middle_but_for_its_hole_and_passes_the_gradient():
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    chance = torch.full((2, 7), 0.5)
    chance[:, 5:] = torch.tensor([0.25, 0.75])
    seen = augment(images, chance)
    hole = seen == 0
    torch.testing.assert_close(seen[~hole], images[~hole])
    assert 0.05 < float(hole.float().mean()) < 0.08  # a square of a quarter of the side
    seen.sum().backward()
    assert float(images.grad.abs().sum()) > 0


def test_equal_images_get_equal_treatment_whatever_the_split():
    adversarial = AdversarialLoss(config(), 100, seed=0)
    chance = adversarial.chance(3, 4, torch.device("cpu"))
    images = torch.rand(4, 3, 48, 48)
    parts = torch.cat([adversarial.augmented(images[:1], chance[:1]), adversarial.augmented(images[1:], chance[1:])])
    torch.testing.assert_close(adversarial.augmented(images, chance), parts)
    discriminator = PatchDiscriminator(4)
    torch.testing.assert_close(discriminator(images), torch.cat([discriminator(images[:1]), discriminator(images[1:])]))
