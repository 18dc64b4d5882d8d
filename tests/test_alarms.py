"""Every alarm and verdict: silent on curves as healthy trainings have them, raised on curves with its fault.

The curves are simulated. Everything that decides about an alarm is the program's own.
"""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae.autoencoder.gan import AdversarialConfig, AdversarialLoss
from ldm_vae.autoencoder.health import RULES, batch_health
from ldm_vae.autoencoder.rate import kl_divergence
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.autoencoder.training import VaeModel
from ldm_vae.diffusion.validation import StopSuggestion, find_neighbors
from ldm_vae.evaluation.diagnosis import verdicts
from ldm_vae.training.loader import Plan, Span
from ldm_vae.training.monitor import StabilityChecks
from tests.evaluation.linear_autoencoder import LinearAutoencoder, random_fields
from tests.evaluation.test_diagnosis import FAULTS, TARGET, examine, faulty

LOG_EVERY = 20
Posterior = tuple[Tensor, Tensor]
Names = Iterator[str]


# An encoder in training: at each step a KL that follows beta; `VaeModel.alarms` decides.


def posterior(nats: float, step: int) -> Posterior:
    """Means and log-variances (8, 4, 6, 6) of Gaussian channels of so many nats, as a batch has them."""
    variance = math.exp(-2 * nats)
    noise = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(step))
    return math.sqrt(1 - variance) * noise, torch.full_like(noise, math.log(variance))


def learned_kl(beta: float, step: int, youth: float = 80) -> float:
    """The optimal linear channel of a source of variance 1, learned in some `youth` steps."""
    return 0.5 * math.log(1 / min(0.999, 2 * beta)) * (1 - math.exp(-step / youth))


def training(
    steps: int,
    kl: Callable[[float, int], float] = learned_kl,
    change: Callable[[Tensor, Tensor], None] | None = None,
    rate: str = "{mode: target}",
) -> Names:
    """The alarms of a training. `kl`: of (beta, step), once it has settled; `change`: its posteriors, in place."""
    words = ["output=x", "data.source=synthetic", "autoencoder.preset=pico", "training.device=cpu", f"rate={rate}"]
    config = configuration.load(TrainVaeConfig, None, [*words, f"phases=[{{steps: {steps}, crop: 32, batch: 2}}]"])
    model, nats, rng = VaeModel(config, None), 0.01, random.Random(0)
    for step in range(steps):
        beta = float(model.rate.beta(step))
        nats *= (max(kl(beta, step), 1e-3) / nats) ** (1 / 15)
        model.rate.observe(step, torch.full((4,), nats * math.exp(0.03 * rng.gauss(0, 1))))
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            mean, logvar = posterior(nats, step)
            if change is not None:
                change(mean, logvar)
            metrics = {name: float(value) for name, value in batch_health(mean, logvar).items()}
            metrics |= {"rate/nats_per_dim": float(kl_divergence(mean, logvar).mean()), "rate/beta": beta}
            yield from (verdict.name for verdict in model.alarms(step + 1, metrics))


def silent_channel(mean: Tensor, logvar: Tensor) -> None:
    mean[:, 1], logvar[:, 1] = 0.0, 0.0


def hot_position(mean: Tensor, logvar: Tensor) -> None:
    mean[0, 0, 0, 0] = 60.0


# The adversarial stage, losses of updates, held-out losses, previews.


def adversarial(worse: float = 1.0) -> Names:
    """A reconstruction loss with the noise of batches that falls, and becomes `worse` times as high from `engage`."""
    config = AdversarialConfig(loss="hinge", start=100, warmup=100, ramp=50, restore_steps=100)
    loss, rng, holding = AdversarialLoss(config, 1000, seed=0), random.Random(0), 0.0
    for step in range(1000):
        factor = (worse if step >= loss.engage else 1.0) * math.exp(0.1 * rng.gauss(0, 1))
        loss.observe_loss(step, torch.tensor((0.1 + 0.1 * math.exp(-step / 300)) * factor))
        holding += float(loss.holding) / LOG_EVERY
        if (step + 1) % LOG_EVERY == 0:
            yield from (alarm.name for alarm in loss.alarms({"adversarial/holding": holding}))
            holding = 0.0
            if loss.must_restore():
                loss.restored()


def updates(plan: Plan, at: dict[int, tuple[float, float]] | None = None) -> Names:
    """Losses that fall, with the noise of batches; `at`: step -> factor of its loss, and its gradient norm.

    In a later span it is six times as high, as where LPIPS is added.
    """
    checks, rng = StabilityChecks(["autoencoder"], starts=plan.starts), random.Random(0)
    for step in range(1, plan.steps + 1):
        factor, norm = (at or {}).get(step, (1.0, 0.5))
        level = (0.1 + math.exp(-step / 100)) * (6 if plan.span(step - 1)[0] is not plan.spans[0] else 1)
        loss = level * math.exp(0.1 * rng.gauss(0, 1)) * factor
        checks.add("autoencoder", step, torch.tensor(loss), torch.tensor(norm))
        if step % LOG_EVERY == 0:
            checks.collect(lambda value: value)
            yield from (alarm.name for alarm in checks.take_alarms())


def held_out(
    steps: int, validate_every: int, held_out: Callable[[float], float], train: Callable[[float], float]
) -> Names:
    """Losses by the share of the run that is behind it; alarms come before the validation of the same step."""
    suggestion, rng = StopSuggestion(0.2), random.Random(0)
    for step in range(LOG_EVERY, steps + 1, LOG_EVERY):
        suggestion.update_training(train(step / steps) * math.exp(0.03 * rng.gauss(0, 1)))
        alarm = suggestion.alarm(steps)
        if alarm is not None:
            yield alarm.name
        if step % validate_every == 0 or step == steps:
            suggestion.update_held_out(step, held_out(step / steps) * (1 + 0.002 * rng.gauss(0, 1)))


def falling(share: float) -> float:
    return 0.5 + math.exp(-3 * share)


def level(share: float) -> float:
    return 0.5 + max(0.0, 0.5 - 2 * share)


def turning(share: float) -> float:
    return 0.6 + abs(share - 0.4)


def preview(copied: int) -> Names:
    """Samples of which so many are training latents, with a little noise."""
    training, samples = torch.randn(500, 4, 8, 8), torch.randn(10, 4, 8, 8)
    samples[:copied] = training[:copied] + 0.05 * samples[:copied]
    yield from ["copies"] if find_neighbors(samples, training[:, None]).copies else []


# The health report.


@cache
def fields() -> Tensor:
    return random_fields()


@cache
def healthy_figures() -> dict[str, Any]:
    """The linear autoencoder's, and 2 dB more than a linear code, as a trained network has."""
    figures = dict(examine(LinearAutoencoder(fields()), fields()).figures)
    figures["decoder"] = figures["decoder"] | {"linear_margin_db": 2.0}
    return figures


def report(*path: str | int, value: float | None = None, **record: float) -> Names:
    """The verdicts on the healthy figures, one of which has another value; `record`: of the training."""
    figures: Any = copy.deepcopy(healthy_figures())
    inner = figures
    for key in path[:-1]:
        inner = inner[key]
    if path:
        inner[path[-1]] = value
    yield from (verdict.name for verdict in verdicts(figures, TARGET | record))


def faulty_report(name: str) -> Names:
    figures = examine(faulty(name, fields()), fields()).figures
    yield from (verdict.name for verdict in verdicts(figures, {}))


ONE_PHASE, TWO_PHASES = Plan((Span(600, 8, 8),)), Plan((Span(300, 8, 8), Span(300, 8, 8)))
SLOW = partial(learned_kl, youth=600)

HEALTHY: dict[str, Callable[[], Names]] = {
    **{f"a training of {steps} steps": partial(training, steps) for steps in (12, 100, 300, 600, 1000, 3000)},
    **{f"{steps} steps of a slow encoder": partial(training, steps, SLOW) for steps in (100, 600, 4000)},
    "a fixed weight": partial(training, 1500, rate="{mode: fixed, beta: 0.002}"),
    "beta = 0": partial(training, 1500, lambda beta, step: 9.0, rate="{mode: fixed, beta: 0}"),
    "an adversarial stage": adversarial,
    "one phase": partial(updates, ONE_PHASE),
    "two phases": partial(updates, TWO_PHASES),
    "a falling held-out loss, two validations": partial(held_out, 1000, 500, falling, falling),
    "a falling held-out loss, few validations": partial(held_out, 1000, 250, falling, falling),
    "a falling held-out loss, many validations": partial(held_out, 10_000, 200, falling, falling),
    "a held-out loss that has reached its level": partial(held_out, 10_000, 200, level, level),
    "samples that are no copies": partial(preview, 0),
    "a report": report,
    "a report after a short training": partial(report, beta_path=[[20, 1e-3, 2.5]]),  # type: ignore[arg-type]
}

UNHEALTHY: dict[str, list[Callable[[], Names]]] = {
    "rate_miss": [
        partial(training, 2000, lambda beta, step: learned_kl(beta, step) * (0.6 if step > 1850 else 1)),
        partial(report, "rate", "nats_per_dim", value=3.5),
    ],
    "rate_unreachable": [partial(training, 2000, lambda beta, step: 1.0), partial(report, pinned_share=0.2)],
    "posterior_collapse": [
        partial(training, 2000, lambda beta, step: 0.01, rate="{mode: fixed, beta: 1}"),
        partial(faulty_report, "posterior_collapse"),
    ],
    "dead_channel": [partial(training, 2000, change=silent_channel), partial(faulty_report, "dead_channel")],
    "kl_inactive": [
        partial(training, 2000, lambda beta, step: 9.0, rate="{mode: fixed, beta: 1e-9}"),
        partial(faulty_report, "kl_inactive"),
    ],
    "smuggling": [partial(training, 2000, change=hot_position), partial(faulty_report, "smuggling")],
    "near_linear": [partial(report, "decoder", "linear_margin_db", value=0.5)],
    "prior_hole": [partial(report, "decoder", "cycle_ratio", value=5.0)],
    "non_gaussian": [partial(report, "channels", 0, "skewness", value=-2.0)],
    **{
        name: [partial(faulty_report, name)]
        for name in FAULTS
        if name not in ("posterior_collapse", "dead_channel", "kl_inactive", "smuggling")
    },
    "adversarial_held": [partial(adversarial, 1.4)],
    "adversarial_restored": [partial(adversarial, 1.6)],
    "update_skipped": [partial(updates, ONE_PHASE, {300: (1.0, math.nan)})],
    "loss_spike": [
        partial(updates, ONE_PHASE, {300: (20.0, 0.5)}),
        partial(updates, TWO_PHASES, {290: (20.0, 0.5)}),
        partial(updates, TWO_PHASES, {450: (20.0, 0.5)}),
    ],
    "overfitting": [
        partial(held_out, 1000, 100, turning, falling),
        partial(held_out, 10_000, 500, turning, falling),
    ],
    "copies": [partial(preview, 3)],
}


@pytest.mark.parametrize("curve", HEALTHY)
def test_nothing_is_raised_on_a_healthy_curve(curve: str) -> None:
    assert list(HEALTHY[curve]()) == []


@pytest.mark.parametrize("name", UNHEALTHY)
def test_each_is_raised_on_a_curve_with_its_fault(name: str) -> None:
    for curve in UNHEALTHY[name]:
        assert name in list(curve())


def test_no_alarm_is_left_out() -> None:
    """Those of the table of rules, and those that have a name of their own where they are made."""
    named = set(RULES)
    for path in (Path(__file__).parents[1] / "ldm_vae").rglob("*.py"):
        text = path.read_text()
        if "def sentence(" in text or "def alarms(" in text:
            named |= set(re.findall(r'^ +name(?:: str)? = "(\w+)"$', text, re.MULTILINE))
    assert named == set(UNHEALTHY)
