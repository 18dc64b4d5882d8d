from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ldm_vae.evaluation import plots
from ldm_vae.evaluation.plots import Curve, Panel


def curve(values: list[float]) -> Curve:
    return Curve(np.arange(1, len(values) + 1) * 10, np.array(values))


def coordinates(svg: str, name: str) -> list[tuple[float, float]]:
    element = ElementTree.fromstring(svg).find(f".//*[@class='{name}']")
    assert element is not None
    return [(float(x), float(y)) for x, y in (point.split(",") for point in element.attrib["points"].split())]


def test_metrics_survive_a_crash_a_resume_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 10, "loss/l1": 0.5, "loss/kl": None},
        {"step": 20, "loss/l1": 0.4},
        {"step": 20, "loss/l1": 0.3, "held_out/psnr": 21.0},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 30, "loss/l1": NaN}\n{"step": 40, "lo')
    metrics = plots.read_metrics(path)
    assert metrics.keys() == {"loss/l1", "held_out/psnr"}
    assert metrics["loss/l1"].steps.tolist() == [10, 20]
    assert metrics["loss/l1"].values.tolist() == [0.5, 0.3]


def test_no_metrics_file_gives_no_panels(tmp_path: Path) -> None:
    assert plots.autoencoder_panels(plots.read_metrics(tmp_path / "metrics.jsonl")) == []


def test_both_loss_terms_have_their_own_panel_and_the_kl_is_in_bits() -> None:
    metrics = {"loss/l1": curve([0.5, 0.2]), "loss/kl": curve([1.0, 2.0]), "loss/mse": curve([0.1, 0.1])}
    panels = {panel.title: panel for panel in plots.autoencoder_panels(metrics, rate_target_nats=2.5)}
    assert list(panels) == ["Reconstruction loss", "KL loss, as a rate", "MSE loss"]
    rate = panels["KL loss, as a rate"]
    assert rate.train is not None
    assert rate.train.values.tolist() == pytest.approx([1 / math.log(2), 2 / math.log(2)])
    assert rate.target == pytest.approx(2.5 / math.log(2))


def test_diffusion_panel_holds_training_and_held_out_loss() -> None:
    panels = plots.diffusion_panels({"loss/flow": curve([1.0, 0.5]), "held_out/flow": curve([0.8])})
    assert len(panels) == 1
    assert panels[0].train is not None
    assert panels[0].held_out is not None


def test_a_panel_is_valid_svg_with_higher_values_higher_up() -> None:
    svg = plots.render_svg(Panel("A < B", "unit", "", curve([1.0, 3.0, 2.0]), curve([2.0]), target=2.5))
    points = coordinates(svg, "line")
    assert len(points) == 3
    assert points[1][1] < points[2][1] < points[0][1]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert coordinates(svg, "held-out")[0][1] == points[2][1]
    assert 'aria-label="A &lt; B, unit"' in svg


def test_a_noisy_curve_is_drawn_twice_and_a_spike_does_not_set_the_scale() -> None:
    values = [1.0 + 0.01 * (i % 2) for i in range(200)]
    values[100] = 1e6
    svg = plots.render_svg(Panel("t", "u", "", curve(values)))
    calm = [y for x, y in coordinates(svg, "raw") if y > plots.TOP + 1]
    assert len(calm) > 190
    assert len(coordinates(svg, "line")) == 200


def test_long_curves_are_thinned_to_their_mean() -> None:
    svg = plots.render_svg(Panel("t", "u", "", curve([math.sin(i / 500) for i in range(10_000)])))
    assert len(coordinates(svg, "raw")) == plots.MAXIMUM_POINTS
    assert len(svg) < 20_000


def test_values_of_many_magnitudes_get_a_logarithmic_axis() -> None:
    svg = plots.render_svg(Panel("t", "u", "", curve([1.0, 0.1, 0.01]), noisy=False))
    first, second, third = (y for _, y in coordinates(svg, "line"))
    assert second - first == pytest.approx(third - second, abs=0.2)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0, 5.0], [-2.0, 3.0], [0.0, 1e-9], [1e-5, 2e-5]])
def test_degenerate_curves_are_drawn(values: list[float]) -> None:
    svg = plots.render_svg(Panel("t", "u", "", curve(values)))
    assert len(coordinates(svg, "line")) == len(values)
    assert "nan" not in svg


def test_tick_labels_are_the_values_where_they_stand() -> None:
    svg = plots.render_svg(Panel("t", "u", "", curve([0.0, 0.0015]), noisy=False, logarithmic=False))
    labels = [text for text in re.findall(r'text-anchor="end">([^<]+)<', svg) if "e" in text and "step" not in text]
    assert labels == ["5e−4", "1e−3", "1.5e−3"]
    assert plots.round_numbers(0, 1000, 5) == [0, 200, 400, 600, 800, 1000]


def test_the_running_mean_has_no_lag() -> None:
    ramp = np.linspace(0, 1, 400)
    np.testing.assert_allclose(plots.running_mean(ramp), ramp, atol=1e-12)
    noise = np.random.default_rng(0).normal(size=4000)
    assert plots.running_mean(noise)[200:-200].std() < 0.1
