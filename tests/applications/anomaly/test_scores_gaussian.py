"""The shrunk Gaussian against a covariance worked by hand, and where a plain one cannot be inverted."""

from __future__ import annotations

import pytest
import torch

from ldm_vae.applications.anomaly.scores import fit_gaussian, shrunk_covariance

ROWS = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)


def test_the_shrunk_covariance_of_a_case_worked_by_hand():
    """Each row twice: S = diag(3, 1/2), m = 7/4, |S - mI|² = 25/8; the mean of |x|⁴ is 45/2, so the error of S is
    (45/2 - 37/4) / 8 = 53/32 and the share of the identity 53/32 / (25/8) = 0.53."""
    found = shrunk_covariance(ROWS.repeat(2, 1))
    expected = torch.diag(torch.tensor([0.47 * 3 + 0.53 * 1.75, 0.47 * 0.5 + 0.53 * 1.75], dtype=torch.float64))
    torch.testing.assert_close(found, expected)


def test_four_rows_say_too_little_for_any_direction():
    torch.testing.assert_close(shrunk_covariance(ROWS), 1.75 * torch.eye(2, dtype=torch.float64))


def test_many_rows_are_hardly_shrunk_and_the_distance_is_one_on_average():
    rng = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[2.0, 0.0, 0.0], [1.5, 0.5, 0.0], [0.0, 0.0, 30.0]])
    rows = torch.randn(4000, 3, generator=rng) @ mixing.T + torch.tensor([5.0, -1.0, 100.0])
    gaussian = fit_gaussian(rows)
    assert float(gaussian.distance(rows).mean()) == pytest.approx(1.0, abs=0.02)
    true = torch.linalg.inv((mixing @ mixing.T).double())
    point = torch.tensor([[9.0, -1.0, 40.0]])
    away = (point - torch.tensor([5.0, -1.0, 100.0])).double()
    expected = float((away @ true @ away.T).squeeze()) / 3
    assert float(gaussian.distance(point)) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    "rows",
    [
        torch.ones(5, 3),  # nothing differs
        torch.randn(3, 40, generator=torch.Generator().manual_seed(0)),  # fewer rows than features
        torch.linspace(0, 1, 9)[:, None].expand(9, 2),  # features that repeat each other
    ],
    ids=["constant", "few", "repeated"],
)
def test_every_gaussian_can_be_inverted(rows):
    gaussian = fit_gaussian(rows)
    assert bool(gaussian.precision.isfinite().all())
    assert bool((gaussian.distance(rows + 3.0) > gaussian.distance(rows)).all())
