"""Known answers for posterior statistics, batch scalars and training alarms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_vae.autoencoder.health import (
    RULES,
    Limit,
    PosteriorStatistics,
    batch_health,
    by_severity,
    check_rule,
    effective_rank,
    training_alarms,
)
from ldm_vae.autoencoder.rate import kl_divergence


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(mean: Tensor, logvar: Tensor, parts: int = 1) -> PosteriorStatistics:
    found = PosteriorStatistics(mean.shape[1])
    for m, s in zip(mean.chunk(parts), logvar.chunk(parts)):
        found.add(m, s)
    return found


def test_a_gaussian_channel_has_the_textbook_quantities() -> None:
    sigma = math.exp(-2.5)
    mean = normal(64, 2, 16, 16)
    mean[:, 1] = 2.0 * mean[:, 1] + 1.0
    logvar = torch.full_like(mean, 2 * math.log(sigma))
    found = statistics(mean, logvar, parts=4).result()
    assert found["nats"] == pytest.approx(kl_divergence(mean, logvar).mean(dim=(0, 2, 3)).tolist(), rel=1e-5)
    assert found["mean"] == pytest.approx([0.0, 1.0], abs=0.04)
    assert found["variance"] == pytest.approx([1.0, 4.0], rel=0.03)
    assert found["noise"] == pytest.approx([sigma**2] * 2)
    assert found["capacity_bits"][0] == pytest.approx(0.5 * math.log2(1 + 1 / sigma**2), abs=0.02)
    assert found["information_nats"][0] == pytest.approx(0.5 * math.log(1 + 1 / sigma**2), abs=0.02)
    assert found["information_nats"][1] == pytest.approx(0.5 * math.log(1 + 4 / sigma**2), abs=0.02)
    assert found["image_variance"][0] == pytest.approx(found["variance"][0] * 63 / 64, rel=0.01)
    assert found["skewness"] == pytest.approx([0.0, 0.0], abs=0.05)
    assert found["kurtosis"] == pytest.approx([0.0, 0.0], abs=0.1)
    assert found["neighbour_correlation"] == pytest.approx([0.0, 0.0], abs=0.02)


def test_moments_beyond_the_second_of_an_exponential_distribution() -> None:
    mean = -torch.rand(200, 1, 32, 32, generator=torch.Generator().manual_seed(0)).log()
    found = statistics(mean, torch.zeros_like(mean)).result()
    assert found["skewness"][0] == pytest.approx(2.0, abs=0.1)
    assert found["kurtosis"][0] == pytest.approx(6.0, abs=0.7)
    farthest = float((mean - mean.mean()).abs().max() / mean.std())
    assert found["hot_sigmas"][0] == pytest.approx(farthest, rel=1e-3)


def test_what_is_the_same_in_all_images_is_static_and_smooth_maps_correlate_with_their_neighbors() -> None:
    ramp = torch.linspace(-1, 1, 16).expand(8, 1, 16, 16)
    found = statistics(torch.cat([ramp, normal(8, 1, 16, 16)], dim=1), torch.zeros(8, 2, 16, 16)).result()
    assert found["static_share"][0] == pytest.approx(1.0)
    assert found["static_share"][1] == pytest.approx(1 / 8, abs=0.02)
    assert found["neighbour_correlation"][0] > 0.9


@pytest.mark.parametrize("image", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("place", [0.0, 1.0, 3.0])
def test_information_is_about_the_image_and_not_about_the_position(image: float, place: float) -> None:
    """Closed form: z = a + b + s noise with a of variance A for image and position, b of variance B for the position.

    I(image; z | position) = ln(1 + A / s^2) / 2 whatever B is; nats - marginal_nats is ln(1 + (A + B) / s^2) / 2.
    """
    mean = math.sqrt(image) * normal(256, 1, 16, 16) + math.sqrt(place) * normal(1, 1, 16, 16, seed=1)
    sigma = 0.2
    found = statistics(mean, torch.full_like(mean, 2 * math.log(sigma)), parts=4).result()
    assert found["information_nats"][0] == pytest.approx(0.5 * math.log(1 + image / sigma**2), abs=0.01)
    place = place * float(normal(1, 1, 16, 16, seed=1).var(correction=0))
    with_place = 0.5 * math.log(1 + (image + place) / sigma**2)
    assert found["nats"][0] - found["marginal_nats"][0] == pytest.approx(with_place, abs=0.05)


def test_shares_of_passive_and_clamped_positions_and_the_median() -> None:
    logvar = torch.full((4, 1, 10, 10), -3.0)
    logvar[:, :, 0] = 0.0
    logvar[:, :, 1, :5] = -29.95
    found = statistics(torch.zeros_like(logvar), logvar)
    assert found.result()["passive_share"] == pytest.approx([0.1])
    assert found.result()["clamp_share"] == pytest.approx([0.05])
    assert found.summary()["median_logvar"] == pytest.approx(-3.0, abs=0.03)
    assert not found.deterministic
    assert statistics(logvar, torch.full_like(logvar, -30.0)).deterministic


def test_batches_and_processes_add_up_to_the_whole() -> None:
    mean, logvar = normal(12, 3, 8, 8), normal(12, 3, 8, 8, seed=1) - 4
    whole = statistics(mean, logvar)
    one, other = statistics(mean[:5], logvar[:5], parts=2), statistics(mean[5:], logvar[5:])
    theirs: list[Tensor] = []
    other.all_reduce(lambda tensor, kind: theirs.append(tensor) or tensor)  # type: ignore[func-returns-value]
    combine = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
    one.all_reduce(lambda tensor, kind: combine[kind](tensor, theirs.pop(0)))
    assert not theirs
    for name, values in whole.result().items():
        assert one.result()[name] == pytest.approx(values, rel=1e-9, abs=1e-12)
    assert one.summary() == pytest.approx(whole.summary())
    torch.testing.assert_close(one.correlation(), whole.correlation())


def test_another_size_is_refused() -> None:
    found = statistics(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"latents of \(2, 4, 8\) after \(2, 8, 8\); give images of one size"):
        found.add(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_effective_rank_of_two_correlated_channels(correlation: float) -> None:
    first, other = normal(64, 1, 32, 32), normal(64, 1, 32, 32, seed=1)
    mean = torch.cat([first, correlation * first + math.sqrt(1 - correlation**2) * other], dim=1)
    matrix = statistics(mean, torch.zeros_like(mean)).correlation()
    assert float(matrix[0, 1]) == pytest.approx(correlation, abs=0.01)
    weights = [(1 + correlation) / 2, (1 - correlation) / 2]
    assert effective_rank(matrix) == pytest.approx(math.exp(-sum(w * math.log(w) for w in weights)), abs=0.01)


def test_a_silent_channel_correlates_with_nothing() -> None:
    mean = normal(8, 2, 8, 8)
    mean[:, 1] = 0.0
    correlation = statistics(mean, torch.zeros_like(mean)).correlation()
    torch.testing.assert_close(correlation, torch.eye(2, dtype=torch.float64))


def test_batch_scalars_agree_with_the_sums() -> None:
    mean, logvar = normal(16, 4, 8, 8), torch.full((16, 4, 8, 8), -4.0)
    mean[:, 2], logvar[:, 2] = 0.01 * mean[:, 2], 0.0
    mean[3, 0, 1, 1] = 40.0
    scalars = {name: float(value) for name, value in batch_health(mean, logvar).items()}
    found = statistics(mean, logvar)
    assert scalars["health/least_channel_nats"] == pytest.approx(min(found.result()["nats"]), abs=1e-6)
    assert scalars["health/dead_channels"] == 1.0
    assert scalars["health/passive_share"] == pytest.approx(0.25)
    assert scalars["health/median_logvar"] == pytest.approx(-4.0)
    assert scalars["health/hottest_sigmas"] == pytest.approx(max(found.result()["hot_sigmas"]), rel=1e-4)
    assert scalars["health/noise_share"] == pytest.approx(found.summary()["noise_share"], rel=1e-4)


HEALTHY = {
    "rate/nats_per_dim": 2.5,
    "health/least_channel_nats": 1.0,
    "health/dead_channels": 0.0,
    "health/median_logvar": -5.0,
    "health/hottest_sigmas": 6.0,
}
TARGET: dict[str, Any] = {
    "rate_mode": "target",
    "target_nats": 2.5,
    "beta": 1e-3,
    "pinned_share": 0.0,
    "locked": True,
    "steps": 5000,
}
FIXED = TARGET | {"rate_mode": "fixed"}


@pytest.mark.parametrize(
    ("metrics", "state", "names"),
    [
        ({}, TARGET, []),
        ({"rate/nats_per_dim": 0.01, "health/dead_channels": 4.0}, FIXED, ["posterior_collapse"]),
        ({"health/dead_channels": 0.9, "health/least_channel_nats": 0.001}, TARGET, ["dead_channel"]),
        ({"health/dead_channels": 0.2, "health/least_channel_nats": 0.001}, TARGET, []),
        ({"health/median_logvar": -14.0, "rate/nats_per_dim": 8.0}, FIXED, ["kl_inactive"]),
        ({"health/median_logvar": -14.0, "rate/nats_per_dim": 8.0}, FIXED | {"beta": 0.0}, []),
        ({"health/median_logvar": -14.0, "rate/nats_per_dim": 7.1}, TARGET | {"target_nats": 7.0}, []),
        ({"health/hottest_sigmas": 25.0}, TARGET, ["smuggling"]),
        ({"health/hottest_sigmas": 11.0}, TARGET, []),
        ({"rate/nats_per_dim": 1.5}, TARGET | {"pinned_share": 0.2}, ["rate_unreachable"]),
        ({"rate/nats_per_dim": 1.5}, TARGET, ["rate_miss"]),
        ({"rate/nats_per_dim": 1.5}, TARGET | {"locked": False}, []),
        ({"rate/nats_per_dim": 1.5}, TARGET | {"steps": 600}, []),
        ({"rate/nats_per_dim": 1.5}, TARGET | {"steps": 600, "pinned_share": 0.2}, []),
        ({"rate/nats_per_dim": 1.5}, FIXED | {"pinned_share": 0.2}, []),
        ({"rate/nats_per_dim": math.nan, "health/hottest_sigmas": math.inf}, TARGET, []),
    ],
)
def test_training_alarms(metrics: dict[str, float], state: dict[str, Any], names: list[str]) -> None:
    assert [verdict.name for verdict in training_alarms(HEALTHY | metrics, **state)] == names


def test_missing_metrics_raise_no_alarm() -> None:
    assert training_alarms({}, **TARGET) == []


def test_a_verdict_is_one_sentence_with_value_threshold_cause_and_knob() -> None:
    verdict = check_rule("dead_channel", {"nats": 0.001, "passive_share": 0.5}, channel=2)
    assert verdict is not None
    sentence = verdict.sentence()
    assert sentence.startswith("dead_channel (fail): channel 2, KL in nats per dimension: 0.001, below 0.02. ")
    assert RULES["dead_channel"].knob in sentence
    assert "\n" not in sentence
    assert verdict.to_dict()["sentence"] == sentence


def test_a_verdict_is_as_severe_as_its_worst_metric_and_failures_come_first() -> None:
    smuggling = check_rule("smuggling", {"hot_sigmas": 9.0, "tail_share": 0.2})
    assert smuggling is not None
    assert (smuggling.severity, smuggling.value, smuggling.threshold) == ("fail", 0.2, 0.10)
    border = check_rule("border", {"border_ratio": 2.0})
    assert border is not None
    assert by_severity([border, smuggling]) == [smuggling, border]


def test_limits_pass_over_what_is_absent_or_no_number() -> None:
    limit = Limit("x", fail=2.0, warn=1.0)
    assert [limit.crossed(value) for value in (None, math.nan, 1.0, 1.5, 3.0)] == [
        None, None, None, ("warn", 1.0), ("fail", 2.0),
    ]  # fmt: skip
    assert Limit("x", fail=0.5, below=True).crossed(0.4) == ("fail", 0.5)
