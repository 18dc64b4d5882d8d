"""Verdicts of edits with known effects."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.applications.directions.evaluation import (
    DirectionRow,
    assess,
    monotonicity,
    row_cells,
    slopes,
    verdict_sentences,
)
from ldm_vae.applications.directions.fitting import Direction

STRENGTHS = [-2.0, -1.0, 0.0, 1.0, 2.0]
NAMES = ["brightness", "contrast", "warmth"]


def values(*effects: float, images: int = 12, noise: float = 0.0) -> np.ndarray:
    """(n, s, k): attribute k changes by effects[k] for a strength of 1."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((images, 1, len(effects)))
    return base + np.multiply.outer(STRENGTHS, effects) + noise * rng.standard_normal((images, 5, len(effects)))


def judged(
    *effects: float, told: float = 0.9, attribute: str | None = "brightness", noise: float = 0.0, together: float = 0.0
) -> DirectionRow:
    correlations = np.eye(3)
    correlations[0, 1] = correlations[1, 0] = together
    direction = Direction(f"{attribute}/probe", np.ones(2), attribute, {"measure": "R2", "value": told})
    return assess(direction, NAMES, values(*effects, noise=noise), STRENGTHS, np.ones(3), correlations)


def test_slopes_are_changes_for_a_strength_of_one() -> None:
    np.testing.assert_allclose(slopes(values(0.5, -1.0), STRENGTHS, np.array([1.0, 2.0])), [[0.5, -0.5]] * 12)


def test_monotonicity_is_a_rank_correlation() -> None:
    assert monotonicity(np.array([[1.0, 2, 4, 8, 16]]), STRENGTHS) == pytest.approx(1.0)
    assert monotonicity(np.array([[5.0, 4, 3, 2, 1], [1, 1, 1, 1, 1]]), STRENGTHS) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (judged(0.8, 0.1, 0.0), "works"),
        (judged(0.8, 1.5, 0.0), "entangled"),
        (judged(0.8, 1.5, 0.0, together=0.9), "works"),
        (judged(0.5, 0.0, 0.0, noise=2.0), "unsteady"),
        (judged(0.02, 0.0, 0.0, told=0.05), "not told"),
        (judged(0.02, 0.0, 0.0, told=0.9), "not moved"),
        (judged(-0.8, 0.0, 0.0), "wrong way"),
        (judged(0.8, 0.0, 0.0, attribute="age"), "unread"),
        (judged(0.1, -0.9, 0.2, attribute=None), "unnamed"),
    ],
)
def test_verdicts(row: DirectionRow, verdict: str) -> None:
    assert row.verdict == verdict
    assert row_cells(row)[-1] == verdict
    assert verdict_sentences([row])[0].startswith(f"{verdict}: ")


def test_without_labels_the_target_is_what_changes_most() -> None:
    row = judged(0.1, -0.9, 0.2, attribute=None)
    assert (row.target, row.change) == ("contrast", pytest.approx(-0.9))
    assert row.worst == ("warmth", pytest.approx(0.2))


def test_what_goes_together_is_named_and_is_no_drift() -> None:
    row = judged(0.8, 1.5, 0.1, together=0.9)
    assert (row.along, list(row.drift)) == (["contrast"], ["warmth"])
