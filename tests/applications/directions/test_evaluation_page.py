"""The drawing of what directions change."""

from __future__ import annotations

from ldm_vae.applications.directions.evaluation import matrix_svg


def test_names_from_tables_are_no_formulas() -> None:
    results = {"changes": {"price=$\\frac$/probe": [0.1, 0.2]}, "attributes": ["$^$", "<b>"]}
    drawn = matrix_svg(results)
    assert "$\\frac$" in drawn
    assert "$^$" in drawn
    assert "<b>" not in drawn
