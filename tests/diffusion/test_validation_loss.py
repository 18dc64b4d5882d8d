"""The held-out loss at known values, and when it suggests to stop."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from ldm_vae.diffusion import flow
from ldm_vae.diffusion.validation import StopSuggestion, validation_losses, validation_metrics
from ldm_vae.random import generator


class Linear(nn.Module):
    """The best velocity of Gaussian latents of variance a."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = a

    def forward(self, noisy, times, labels):
        t = flow.as_column(times, noisy)
        return (t - (1 - t) * self.a) / ((1 - t) ** 2 * self.a + t**2) * noisy

    def velocity_target(self, clean, noise, times):
        return flow.velocity_target(clean, noise)


def test_the_loss_at_each_time_is_the_known_one() -> None:
    """What no network can foresee of v: a / ((1 - t)^2 a + t^2) for Gaussian latents of variance a."""
    a, shift = 0.5, 2.0
    latents = math.sqrt(a) * torch.randn(64, 4, 32, 32, generator=generator(0, "gaussian"))
    losses = validation_losses(Linear(a), latents, None, shift)
    expected = [flow.shift_times(torch.tensor((n + 0.5) / 8), shift).item() for n in range(8)]
    assert list(losses) == pytest.approx(expected)
    for t, loss in losses.items():
        assert loss == pytest.approx(a / ((1 - t) ** 2 * a + t**2), rel=0.02)
    assert losses == validation_losses(Linear(a), latents, None, shift)
    logged = validation_metrics(losses, {t: loss - 0.25 for t, loss in losses.items()})
    assert logged["held_out/flow"] == pytest.approx(sum(losses.values()) / 8)
    assert logged["held_out/gap"] == pytest.approx(0.25)
    assert len(logged) == 10
    assert logged["held_out/flow_t0.118"] == losses[next(iter(losses))]


def run(suggestion: StopSuggestion, train: list[float], held_out: list[float]) -> list[int]:
    """The steps at which it speaks, of 100; one loss of each kind every 5 steps, the held-out one after the other."""
    said = []
    for number, (a, b) in enumerate(zip(train, held_out), start=1):
        suggestion.update_training(a)
        if suggestion.alarm(100) is not None:
            said.append(5 * number)
        suggestion.update_held_out(5 * number, b)
    return said


FALLING = [1 - 0.04 * number for number in range(20)]
TURNING = [1 - 0.04 * number if number < 8 else 0.72 + 0.01 * (number - 8) for number in range(20)]


def test_it_speaks_once_when_the_held_out_loss_turns() -> None:
    assert run(StopSuggestion(0.2), FALLING, TURNING) == [65]
    assert run(StopSuggestion(0.4), FALLING, TURNING) == [85]


def test_it_is_silent_while_the_held_out_loss_improves_or_the_training_loss_does_not_fall() -> None:
    assert run(StopSuggestion(0.2), FALLING, FALLING) == []
    assert run(StopSuggestion(0.2), [1.0] * 20, TURNING) == []
    level = FALLING[:8] + [0.72 + 0.003 * (number % 2) for number in range(12)]
    assert run(StopSuggestion(0.2), FALLING, level) == []


def test_it_speaks_again_after_an_improvement() -> None:
    twice = TURNING[:13] + [0.5] + [0.6] * 12
    assert run(StopSuggestion(0.2), [1 - 0.03 * number for number in range(26)], twice) == [65, 95]


def test_the_sentence_has_the_figures() -> None:
    suggestion = StopSuggestion(0.2)
    for number in range(12):
        suggestion.update_training(FALLING[number])
        suggestion.update_held_out(5 * (number + 1), TURNING[number])
    alarm = suggestion.alarm(100)
    assert alarm is not None
    for words in ("best at step 40 (0.72, now 0.75)", "fell from 0.9", "stop, use more images"):
        assert words in alarm.sentence()


def test_the_last_word_names_the_best_step_and_how_to_get_it() -> None:
    suggestion = StopSuggestion(0.2)
    assert suggestion.summary(100, []) == "no latents were held out"
    run(suggestion, FALLING[:8], TURNING[:8])
    assert (
        suggestion.summary(40, [20, 40]) == "the held-out loss was best at the end (0.72): a longer run may be better"
    )
    suggestion.update_held_out(100, 0.9)
    said = suggestion.summary(100, [15, 30, 45, 60])
    assert said.startswith(
        "the held-out loss was best at step 40 (0.72, now 0.9): `ldm-vae model ema RUN lengths=0.05 step=45 "
    )
    assert suggestion.summary(100, []) == "the held-out loss was best at step 40 (0.72, now 0.9)"


def test_its_memory_survives_json_exactly() -> None:
    for losses in ([], FALLING[:9]):
        first, second = StopSuggestion(0.2), StopSuggestion(0.2)
        run(first, losses, TURNING)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert vars(first) == vars(second)
