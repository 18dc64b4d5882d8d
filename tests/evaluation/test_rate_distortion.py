from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from ldm_vae import cli, metrics
from ldm_vae import config as configuration
from ldm_vae.errors import EXIT_INTERRUPTED, UserError
from ldm_vae.evaluation.rate_distortion import (
    NO_KNEE,
    Frontier,
    FrontierConfig,
    frontier,
    knees_of,
    markdown,
    recommend,
    theory,
)
from ldm_vae.evaluation.sweep import is_training
from tests.evaluation.test_sweep import EVALUATE, RECIPE, InProcess

EIGENVALUES = [10.0 * 0.8**i for i in range(192)]


def record(nats: float, psnr: float, channels: int = 4, verdicts: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A point as `record_of` makes it."""
    bits = channels * nats / (64 * 0.6931471805599453)
    value = {"mean": psnr, "low": psnr - 0.1, "high": psnr + 0.1}
    return {
        "name": f"c{channels}-{nats:g}-nats",
        "channels": channels,
        "target_nats": nats,
        "rate": {"nats_per_dim": nats, "bits_per_dim": nats / 0.6931, "bits_per_pixel": bits, "kind": "KL to N(0, 1)"},
        "metrics": {"psnr": value, "ssim": {"mean": 0.7, "low": 0.6, "high": 0.8}},
        "gain_over_linear_db": value,
        "verdicts": verdicts or [],
        "diagnosed": True,
        "steps": 10,
        "seconds": 3.0,
        "images": 8,
        "resolution": 64,
        "fingerprint": "sha256:0",
    }


FAILING = {"name": "posterior_collapse", "severity": "fail", "sentence": "posterior_collapse (fail): nothing is said."}


def images_of(points: list[dict[str, Any]], spread: float = 0.0, count: int = 40) -> dict[str, dict[str, float]]:
    """PSNR by point and image: images differ by decibels, alike at every rate but for `spread`."""
    rng = np.random.default_rng(0)
    level = rng.normal(0, 3, count)
    found = {}
    for point in points:
        own = rng.normal(0, spread, count) if spread else np.zeros(count)
        values = point["metrics"]["psnr"]["mean"] + level - level.mean() + own - own.mean()
        found[point["name"]] = {f"{number}.png": float(value) for number, value in enumerate(values)}
    return found


def test_the_knee_is_the_first_point_without_a_worthwhile_step_after_it() -> None:
    nats = [1.0, 1.5, 2.0, 2.5, 3.5]
    curves = [
        [24.0, 24.5, 24.8, 24.85, 24.9],  # 0.05 dB per half nat after 2.0
        [24.0, 24.5, 25.0, 25.5, 26.5],  # rises to the end
        [24.0, 24.01, 25.0, 25.01, 25.02],  # a plateau before a step is no knee
        [24.0, 23.9, 23.8, 23.7, 23.6],
    ]
    assert knees_of(nats, np.array(curves)).tolist() == [2, NO_KNEE, 2, 0]
    assert knees_of([1.0, 1.5], np.array([[24.0, 24.1 + 1e-6]])).tolist() == [NO_KNEE]  # the limit itself
    assert knees_of([1.0, 2.0], np.array([[24.0, 24.199]])).tolist() == [0]  # counted per nat, not per step


def test_the_recommendation_is_in_words_and_needs_three_healthy_points() -> None:
    points = [record(1.0, 24.0), record(2.0, 25.0), record(3.0, 25.05), record(4.0, 25.1)]
    images = images_of(points)
    assert recommend(points, images) == [
        "4 channels: 2 nats (2.00 measured, 0.180 bits per pixel, 25.00 dB); a higher rate gains less than 0.1 dB per "
        "0.5 nats. Over resampled images: 2 nats in 100%, 95 % interval 2 nats to 2 nats (40 images)."
    ]
    sick = [points[0], {**points[1], "verdicts": [FAILING]}, points[2]]
    assert recommend(sick, images) == ["4 channels: no recommendation, only 2 healthy point(s) of the 3 needed."]
    missed = [{**p, "verdicts": [{**FAILING, "name": "rate_miss"}]} for p in points]
    assert recommend(missed, images) == recommend(points, images)  # the measured rate is what counts
    rising = [record(1.0, 24.0), record(2.0, 25.0), record(3.0, 26.0)]
    assert "no knee up to 3.00 nats" in recommend(rising, images_of(rising))[0]
    two = recommend([*points, record(1.0, 20.0, channels=8)], images)
    assert [sentence[:10] for sentence in two] == ["4 channels", "8 channels"]


def test_a_knee_that_the_images_do_not_settle_has_a_wide_interval() -> None:
    """Known answer: with a spread of s decibels over n images the last slope is N(0.12, 2 s^2 / n), the limit 0.2."""
    points = [record(1.0, 24.0), record(2.0, 25.0), record(3.0, 25.12)]
    sentence = recommend(points, images_of(points, spread=1.0))[0]
    assert sentence.startswith("4 channels: 2 nats")
    share = int(re.search(r"2 nats in (\d+)%", sentence).group(1)) / 100  # type: ignore[union-attr]
    psnr = images_of(points, spread=1.0)
    last = np.array(list(psnr["c4-3-nats"].values())) - np.array(list(psnr["c4-2-nats"].values()))
    expected = norm.cdf((0.2 - 0.12) / (last.std() / np.sqrt(len(last))))
    assert share == pytest.approx(expected, abs=0.04)
    assert "95 % interval 2 nats to no knee" in sentence
    assert recommend(points, images_of(points))[0].endswith("95 % interval 2 nats to 2 nats (40 images).")


def test_the_linear_lines_are_those_of_the_eigenvalues() -> None:
    points = [record(2.0, 25.0), record(3.0, 26.0, channels=8)]
    lines = theory(EIGENVALUES, 8, points)
    rate, psnr = lines["reverse_water_filling"][-1]
    assert rate == pytest.approx(1.3 * points[1]["rate"]["bits_per_pixel"], rel=1e-4)
    assert psnr == pytest.approx(metrics.water_filling_at(EIGENVALUES, 8, rate).psnr)
    for channels in ("4", "8"):
        for (rate, limited), (_, filled) in zip(lines["limited_channels"][channels], lines["reverse_water_filling"]):
            assert limited <= filled + 1e-6
            nats = rate * 64 * 0.6931471805599453 / int(channels)
            assert limited == pytest.approx(metrics.limited_channels(EIGENVALUES, 8, int(channels), nats).psnr)
    assert points[0]["linear_components"] < points[1]["linear_components"]


def test_the_page_and_the_table_mark_what_failed_and_what_is_missing(tmp_path: Path) -> None:
    points = [record(1.0, 24.0, verdicts=[FAILING]), record(2.0, 25.0), record(3.0, 25.05)]
    found = {
        "points": points,
        "missing": [{"name": "c4-4-nats", "status": "failed", "detail": "exit code 2: <broken>"}],
        "linear": theory(EIGENVALUES, 8, points),
        "recommendation": recommend(points, images_of(points)),
    }
    study = Frontier(FrontierConfig(output=str(tmp_path), vae="vae.yaml"))
    with study.lock():
        study.commit(found)
    text = (tmp_path / "frontier.md").read_text()
    assert text == markdown(found)
    assert "| 4 | 1 | 1.000 | 0.090 | 24.000 [23.900, 24.100] |" in text
    assert "posterior_collapse (fail): nothing is said." in text
    assert "c4-4-nats is missing (failed): exit code 2" in text
    page = (tmp_path / "index.html").read_text()
    assert "&lt;broken&gt;" in page
    assert page.count("<svg") == 1
    assert not re.search(r"""(src|href)=["']?http|url\(http|@import""", page)  # loads nothing
    svg = (tmp_path / "frontier.svg").read_text()
    assert "1 nats, c4" in svg
    assert "reverse water-filling" in svg
    healthy = [{**p, "verdicts": []} for p in points]
    study.commit({**found, "points": healthy})
    crosses = svg.count("#a8433e"), (tmp_path / "frontier.svg").read_text().count("#a8433e")
    assert crosses[0] > crosses[1]


def test_every_point_has_the_recipe_with_its_rate_and_channels(tmp_path: Path) -> None:
    (tmp_path / "vae.yaml").write_text(RECIPE)
    config = FrontierConfig(
        output=str(tmp_path / "out"), vae=str(tmp_path / "vae.yaml"), targets_nats=[3.0, 1.0], channels=[4, 8],
        overrides=["loss.mse=2"], steps=16, evaluate=EVALUATE,
    )  # fmt: skip
    points = Frontier(config, InProcess()).plan()
    assert [point.name for point in points] == ["c4-1-nats", "c4-3-nats", "c8-1-nats", "c8-3-nats"]
    assert [p.train.rate.target_nats for p in points] == [1.0, 3.0, 1.0, 3.0]
    assert {p.train.autoencoder.latent_channels for p in points[2:]} == {8}
    assert all(p.train.loss.mse == 2.0 and sum(x.steps for x in p.train.phases) == 16 for p in points)
    assert all(p.evaluate.data == p.train.data and p.evaluate.resolution == 64 for p in points)
    assert [p.name for p in Frontier(replace(config, channels=[]), InProcess()).plan()] == ["c4-1-nats", "c4-3-nats"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"targets_nats": []}, "targets_nats"),
        ({"targets_nats": [1.0, 1.0]}, "names a value twice"),
        ({"steps": 5, "seconds": 5.0}, "only one of them can be the budget"),
        ({"seconds": 0.0}, "seconds: 0.0 is not positive"),
        ({"parallel": 0}, "parallel: 0 is not positive"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        FrontierConfig(output="a", vae="b", **settings)


def test_a_frontier_from_training_to_page_and_a_rerun(tmp_path: Path) -> None:
    (tmp_path / "vae.yaml").write_text(RECIPE)
    config = FrontierConfig(
        output=str(tmp_path / "out"), vae=str(tmp_path / "vae.yaml"), targets_nats=[2.0], steps=4,
        evaluate=[*EVALUATE, "count=4"],
    )  # fmt: skip
    run = InProcess()
    found = frontier(config, run)
    assert run.names == ["train-vae", "evaluate", "diagnose"]
    assert [point["name"] for point in found["points"]] == ["c4-2-nats"]
    assert found["missing"] == []
    assert json.loads((tmp_path / "out" / "frontier.json").read_text()) == json.loads(json.dumps(found))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"] is True
    again = InProcess()
    assert frontier(config, again)["points"] == found["points"]
    assert "train-vae" not in again.names
    assert "evaluate" not in again.names
    with pytest.raises(UserError, match="with other settings: overrides"):
        frontier(replace(config, overrides=["loss.mse=3"]), again)


def test_no_finished_point_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "vae.yaml").write_text(RECIPE)
    config = FrontierConfig(output=str(tmp_path / "out"), vae=str(tmp_path / "vae.yaml"), targets_nats=[2.0])
    with pytest.raises(UserError, match=r"no point is finished \(c4-2-nats: exit code 2"):
        frontier(config, lambda words, log: 2)


@pytest.mark.slow
def test_the_command_trains_points_at_once_as_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vae.yaml").write_text(RECIPE)
    words = [f"vae={tmp_path / 'vae.yaml'}", f"output={tmp_path / 'out'}", "targets_nats=[1,2,3]", "parallel=2"]
    assert cli.main(["frontier", *words, "steps=4", f"evaluate=[{','.join(EVALUATE[:4])}]"]) == 0
    assert "| 4 | 3 |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "frontier.json").read_text())["points"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 2])
def test_a_stopped_command_saves_and_the_same_command_continues(tmp_path: Path, parallel: int) -> None:
    (tmp_path / "vae.yaml").write_text(RECIPE)
    root = Path(__file__).parents[2]
    config = FrontierConfig(
        output=str(tmp_path / "out"), vae=str(tmp_path / "vae.yaml"), targets_nats=[2.0], steps=4000,
        parallel=parallel, evaluate=EVALUATE, overrides=["training.save_every=2"],
    )  # fmt: skip
    (tmp_path / "frontier.yaml").write_text(configuration.to_yaml(config))
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ldm_vae.cli", "frontier", str(tmp_path / "frontier.yaml")]
    job = subprocess.Popen(command, env=environment)
    point = tmp_path / "out" / "points" / "c4-2-nats"
    deadline = time.monotonic() + 240
    while not list((point / "vae" / "checkpoints").glob("step*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    job.terminate()
    assert job.wait(240) == EXIT_INTERRUPTED
    assert not is_training(point / "vae")  # the training has left too
    saved = max(int(re.findall(r"\d+", path.name)[0]) for path in (point / "vae" / "checkpoints").glob("step*"))
    run = InProcess()
    found = frontier(replace(config, parallel=1, steps=saved + 2), run)
    assert found["missing"] == []
    assert f"continuing from step {saved}" in (point / "log.txt").read_text()
