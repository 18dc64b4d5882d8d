from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ldm_vae.evaluation import plots
from ldm_vae.evaluation.plots import Curve, Panel, RecordedAlarm

SVG = "{http://www.w3.org/2000/svg}"


def curve(values: list[float]) -> Curve:
    return Curve(np.arange(1, len(values) + 1) * 10, np.array(values))


def drawn(svg: str, name: str) -> list[list[tuple[float, float]]]:
    """The points of every path in the groups of a class."""
    groups = ElementTree.fromstring(svg).findall(f".//{SVG}g[@class='{name}']")
    paths = [path for group in groups for path in group.findall(f"{SVG}path")]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path.attrib["d"])] for path in paths
    ]


def coordinates(svg: str, name: str) -> list[tuple[float, float]]:
    (points,) = drawn(svg, name)
    return points


def labels(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_metrics_survive_a_crash_a_resume_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 10, "loss/l1": 0.5, "loss/kl": None},
        {"step": 20, "loss/l1": 0.4},
        {"step": 20, "loss/l1": 0.3, "held_out/psnr": 21.0},
        {"step": 20, "alarm": "dead_channel (fail): ...", "verdict": "dead_channel", "locked": True},
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


def test_the_path_of_beta_and_the_health_of_the_latents_are_among_the_panels() -> None:
    keys = ("rate/beta", "health/least_channel_nats", "health/hottest_sigmas", "optim/lr")
    alarm = RecordedAlarm(10, "smuggling", "smuggling (warn): ...")
    panels = plots.autoencoder_panels({key: curve([1.0, 2.0]) for key in keys}, alarms=[alarm])
    titles = [panel.title for panel in panels]
    assert titles == ["Weight of the KL term", "Quietest channel", "Hottest position", "Learning rate"]
    assert all(panel.alarms == (alarm,) for panel in panels)


def test_alarms_are_read_in_order_and_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    late = {"step": 30, "alarm": "smuggling (warn): x", "verdict": "smuggling"}
    early = {"step": 20, "alarm": "dead_channel (fail): y", "verdict": "dead_channel"}
    path.write_text(
        "\n".join(map(json.dumps, [{"step": 10, "loss/l1": 1.0}, late, early, late])) + '\n{"step": 40, "al'
    )
    assert plots.read_alarms(path) == [
        RecordedAlarm(20, "dead_channel", "dead_channel (fail): y"),
        RecordedAlarm(30, "smuggling", "smuggling (warn): x"),
    ]
    assert plots.read_alarms(tmp_path / "absent.jsonl") == []


def test_a_panel_is_valid_svg_with_higher_values_higher_up() -> None:
    svg = plots.render_svg(Panel("A < B", "unit", "", curve([1.0, 3.0, 2.0]), curve([2.0]), target=2.5))
    points = coordinates(svg, "line")
    assert len(points) == 3
    assert points[1][1] < points[2][1] < points[0][1]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    (target,) = drawn(svg, "target")
    assert target[0][1] == target[1][1] == pytest.approx((points[1][1] + points[2][1]) / 2, abs=0.01)
    held_out = ElementTree.fromstring(svg).find(f".//{SVG}g[@class='held-out']//{SVG}use")
    assert held_out is not None
    assert float(held_out.attrib["y"]) == pytest.approx(points[2][1], abs=0.01)
    assert 'aria-label="A &lt; B, unit"' in svg
    assert {"training", "held out", "target"} <= set(labels(svg))


def test_a_noisy_curve_is_drawn_twice_and_a_spike_does_not_set_the_scale() -> None:
    values = [1.0 + 0.01 * (i % 2) for i in range(110)]
    values[50] = 1e6
    svg = plots.render_svg(Panel("t", "u", "", curve(values), noisy=True))
    heights = [y for _, y in coordinates(svg, "raw")[:40]]
    assert max(heights) - min(heights) > 50  # points of about 200: the alternation fills the panel
    assert len(coordinates(svg, "line")) >= 90
    plain = plots.render_svg(Panel("t", "u", "", curve(values), noisy=False))
    assert drawn(plain, "raw") == []


def test_alarms_are_marks_at_their_steps_with_the_names_of_their_verdicts() -> None:
    alarms = (
        RecordedAlarm(20, "smuggling", "a"),
        RecordedAlarm(20, "dead_channel", "b"),
        RecordedAlarm(999, "grid", "outside"),
    )
    svg = plots.render_svg(Panel("t", "u", "", curve([1.0, 2.0, 3.0]), noisy=False, alarms=alarms))
    (mark,) = drawn(svg, "alarm")
    assert mark[0][0] == mark[1][0] == pytest.approx(coordinates(svg, "line")[1][0], abs=0.01)
    assert "dead_channel, smuggling" in labels(svg)
    assert "grid" not in labels(svg)


def test_many_panels_on_a_page_share_no_id() -> None:
    svgs = [plots.render_svg(Panel(title, "u", "", curve([1.0, 2.0]), curve([2.0]))) for title in ("one", "two")]
    first, second = ({*re.findall(r'id="([^"]+)"', svg)} for svg in svgs)
    assert first
    assert not first & second


def test_long_curves_are_thinned_to_their_mean() -> None:
    svg = plots.render_svg(Panel("t", "u", "", curve([math.sin(i / 500) for i in range(10_000)])))
    assert 20 < len(coordinates(svg, "raw")) <= plots.MAXIMUM_POINTS
    assert len(svg) < 30_000


def test_values_of_many_magnitudes_get_a_logarithmic_axis() -> None:
    svg = plots.render_svg(Panel("t", "u", "", curve([1.0, 0.1, 0.01]), noisy=False))
    first, second, third = (y for _, y in coordinates(svg, "line"))
    assert second - first == pytest.approx(third - second, abs=0.2)
    assert {"1", "0.1", "0.01"} <= set(labels(svg))
    linear = plots.render_svg(Panel("t", "u", "", curve([1.0, 0.1, 0.01]), noisy=False, logarithmic=False))
    first, second, third = (y for _, y in coordinates(linear, "line"))
    assert second - first == pytest.approx(10 * (third - second), rel=0.01)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0, 5.0], [-2.0, 3.0], [0.0, 1e-9], [1e-5, 2e-5]])
def test_degenerate_curves_are_drawn(values: list[float]) -> None:
    svg = plots.render_svg(Panel("t", "u", "", curve(values), noisy=False))
    assert len(drawn(svg, "line")) == 1
    assert "nan" not in svg


def test_tick_labels_are_the_values_where_they_stand() -> None:
    svg = plots.render_svg(Panel("t", "u", "", curve([0.0, 0.0015]), noisy=False, logarithmic=False))
    assert {"0", "5e−4", "1e−3", "1.5e−3"} <= set(labels(svg))
    assert plots.step_label(0) == "step 0"
    assert plots.step_label(2500) == "2.5k"


def test_the_running_mean_has_no_lag() -> None:
    ramp = np.linspace(0, 1, 400)
    np.testing.assert_allclose(plots.running_mean(ramp), ramp, atol=1e-12)
    noise = np.random.default_rng(0).normal(size=4000)
    assert plots.running_mean(noise)[200:-200].std() < 0.1
