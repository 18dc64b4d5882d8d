"""The reason that a report gives follows from what was measured, and every way to fail has its own."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.applications.anomaly.evaluation import PNG_SIZE, ScoreMeasurements, reason, score_metrics

COUNT = 60


def table(values: dict[str, np.ndarray], png_bytes: np.ndarray | None = None) -> ScoreMeasurements:
    """`values`: normal images first, as many anomalous ones after them."""
    sizes = np.full(2 * COUNT, 1000) if png_bytes is None else png_bytes
    kinds = ["normal"] * COUNT + ["blob", "scratch"] * (COUNT // 2)
    return ScoreMeasurements(
        [str(i) for i in range(2 * COUNT)], kinds, sizes.tolist(), {k: v.tolist() for k, v in values.items()}
    )


def judged(values: dict[str, np.ndarray], png_bytes: np.ndarray | None = None, ratio: float | None = None) -> str:
    found = score_metrics(table(values, png_bytes), dict.fromkeys(values, 2.0), 0.1)
    return reason(next(iter(values)), found, ratio)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=2 * COUNT)


def shifted(noise: np.ndarray, by: float) -> np.ndarray:
    return noise + by * (np.arange(2 * COUNT) >= COUNT)


def test_a_score_that_separates(noise):
    assert judged({"l1": shifted(noise, 3.0)}) == "separates well, not by complexity"
    assert judged({"l1": shifted(noise, 1.5)}) == "separates partly, not by complexity"


def test_a_score_that_separates_and_yet_finds_few_at_its_threshold(noise):
    found = score_metrics(table({"l1": shifted(noise, 1.5)}), {"l1": 3.0}, 0.1)
    assert reason("l1", found, None) == "separates partly, not by complexity, but finds few of them at its threshold"


def test_a_score_that_separates_by_complexity_only():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(6, np.where(np.arange(2 * COUNT) < COUNT, 7.0, 9.0)))
    said = judged({"l1": np.log(sizes) + 0.01 * rng.normal(size=2 * COUNT)}, sizes)
    assert said.startswith("separates, largely by complexity: AUROC 0.")


def test_a_score_that_ranks_simple_images_as_normal():
    rng = np.random.default_rng(0)
    sizes = np.exp(shifted(rng.normal(size=2 * COUNT), -2.0))
    said = judged({"elbo": np.log(sizes) + 0.1 * rng.normal(size=2 * COUNT)}, sizes)
    assert said.startswith("fails: it ranks simple images as normal")
    assert said.endswith("and the anomalous ones are simpler here")
    said = judged({"kl": np.log(sizes)}, 1 / sizes)
    assert said.startswith("fails: it ranks complex images as normal")
    assert judged({"kl": -np.log(sizes)}, sizes).startswith("separates")


def test_a_score_that_is_inverted_without_complexity(noise):
    assert judged({"kl": shifted(noise, -2.0)}) == (
        "fails: it finds the anomalous images more normal than the normal ones"
    )


def test_an_autoencoder_that_reconstructs_the_anomalies(noise):
    assert judged({"l1": noise}) == "fails: the autoencoder reconstructs the anomalies as well as normal images"
    assert judged({"l1": noise}, ratio=1.1) == (
        "fails: the autoencoder reconstructs the anomalies too; its L1 within the defects is 1.1 times that around them"
    )
    assert "L1 within them is 3.4 times that around" in judged({"ms_ssim": noise}, ratio=3.4)


def test_a_mean_that_hides_what_its_peak_shows(noise):
    said = judged({"l1": noise, "l1_peak": shifted(noise, 3.0)})
    assert said.startswith("fails: the anomalies are too small for a mean over the image (AUROC 0.")


def test_other_scores_fail_in_their_own_words(noise):
    assert "latents of the anomalies are as usual" in judged({"mahalanobis": noise})
    assert "the encoder serves the anomalies" in judged({"regret": noise})
    assert "the diffusion model explains" in judged({"flow_t0.3": noise})


def test_the_figures_of_a_score(noise):
    values = shifted(noise, 1.0)
    found = score_metrics(table({"l1": values}), {"l1": 1.0}, 0.1)
    assert list(found) == ["l1", PNG_SIZE]
    score = found["l1"]
    assert score["false_positive_rate"] == (noise[:COUNT] > 1.0).mean()
    assert score["true_positive_rate"] == (values[COUNT:] > 1.0).mean()
    assert score["auroc_low"] < score["auroc"] < score["auroc_high"]
    assert set(score["kinds"]) == {"blob", "scratch"}
    assert np.mean(list(score["kinds"].values())) == pytest.approx(score["auroc"])
    assert score["png_correlation"] is None  # all sizes are equal
    assert score["aupro"] is None
    assert found[PNG_SIZE]["auroc"] == 0.5
