"""`anomaly evaluate` and `anomaly score` end to end: what they write, what they refuse."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_vae import cli
from ldm_vae import config as configuration
from ldm_vae.applications.anomaly.detector import FitDetectorConfig, fit_detector
from ldm_vae.applications.anomaly.evaluation import EvaluateDetectorConfig, evaluate_detector
from ldm_vae.applications.anomaly.scoring import ScoreImagesConfig, score_images
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from tests.applications.anomaly.conftest import SYNTHETIC
from tests.evaluation.test_report import Page

TEST = [
    "data.synthetic.seed=1",
    "data.synthetic.count=28",
    "data.synthetic.resolution=64",
    "data.synthetic.defects=0.5",
]


@pytest.fixture(scope="module")
def plain(autoencoder_directory, tmp_path_factory) -> Path:
    """A detector of a tiny autoencoder alone."""
    folder = tmp_path_factory.mktemp("plain") / "detector"
    words = [f"autoencoder={autoencoder_directory}", "resolution=64", "false_positive_rate=0.1", *SYNTHETIC]
    fit_detector(configuration.load(FitDetectorConfig, None, [*words, f"output={folder}"]))
    return folder


@pytest.fixture
def labeled(plain, autoencoder_directory, tmp_path) -> list[str]:
    """Words of `anomaly evaluate` with it."""
    networks = [f"detector={plain}", f"autoencoder={autoencoder_directory}", "device=cpu"]
    return [*networks, *TEST, f"output={tmp_path / 'out'}"]


@pytest.fixture(scope="module")
def evaluated(detector_folder, models, tmp_path_factory) -> Path:
    """The report of the detector of every score."""
    output = tmp_path_factory.mktemp("evaluated") / "report"
    words = [f"detector={detector_folder}", *models, *TEST, f"output={output}"]
    assert cli.main(["anomaly", "evaluate", *words]) == 0
    return output


def test_the_report_holds_every_score_its_figures_and_a_reason(evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    assert len(results["scores"]) == 19
    for name, found in results["scores"].items():
        assert 0 <= found["auroc_low"] <= found["auroc"] <= found["auroc_high"] <= 1, name
        assert name == "png_size" or found["reason"].startswith(("fails", "separates"))
    assert results["scores"]["l1"]["aupro"] is not None
    assert results["l1_inside_over_outside"] > 0
    images = results["protocol"]["images"]
    assert images["normal"] + images["anomalous"] == len(results["images"]) == 28
    assert images["masks"]
    assert results["detector"]["false_positive_rate"] == 0.1


@pytest.mark.slow
def test_a_baseline_of_the_same_weights_has_the_same_figures(evaluated, detector_folder, models, tmp_path):
    """But for the flow scores, which it has no pipeline for: so it was fitted to the same images."""
    same = next(word.partition("=")[2] for word in models if word.startswith("autoencoder="))
    words = [f"detector={detector_folder}", *models, *TEST, f"baseline={same}", f"output={tmp_path / 'out'}"]
    results = evaluate_detector(configuration.load(EvaluateDetectorConfig, None, words))
    baseline = results["baseline"]["scores"]
    assert not any(name.startswith("flow") for name in baseline)
    for name, found in baseline.items():
        assert found == results["scores"][name], name
    assert results["scores"] == json.loads((evaluated / "results.json").read_text())["scores"]
    assert "\n- Baseline, `" in (tmp_path / "out" / "results.md").read_text()
    for part, what in ((results["baseline"]["autoencoder"], "baseline"), (results["protocol"]["images"], "images")):
        part["fingerprint"] = "another"
        (tmp_path / "out" / "results.json").write_text(json.dumps(results))
        with pytest.raises(UserError, match=rf"holds the result of (an)?other {what}"):
            evaluate_detector(configuration.load(EvaluateDetectorConfig, None, words))


def test_the_pages_can_be_read(evaluated):
    page = Page((evaluated / "index.html").read_text())
    assert all(source.startswith("data:image/webp") for source in page.images)
    text = (evaluated / "results.md").read_text()
    assert text.startswith("| score | AUROC | AUPR | FPR@95 |")
    assert "| `l1_peak` | 0." in text
    assert "choose a score on other images" in text
    with Image.open(evaluated / "grid.png") as grid:
        assert grid.width > 900
    assert json.loads((evaluated / "run.json").read_text())["images"] == 28


@pytest.mark.slow
def test_a_finished_report_is_read_and_one_of_other_settings_refused(evaluated, detector_folder, models):
    words = [f"detector={detector_folder}", *models, *TEST, f"output={evaluated}"]
    before = (evaluated / "results.md").stat().st_mtime_ns
    evaluate_detector(configuration.load(EvaluateDetectorConfig, None, words))
    assert (evaluated / "results.md").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds the result of prevalence"):
        evaluate_detector(configuration.load(EvaluateDetectorConfig, None, [*words, "prevalence=0.5"]))


def test_images_that_the_detector_was_fitted_to_are_left_out(labeled, capsys):
    same = ["data.synthetic.seed=0", "data.synthetic.count=40", "data.synthetic.defects=0.3"]
    assert cli.main(["anomaly", "evaluate", *labeled, *same]) == EXIT_USER_ERROR
    assert "0 normal images after" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.synthetic.defects=0"], "all 28 images are normal, and an evaluation compares both"),
        (["data.synthetic.count=12"], ", fewer than 10; add images"),
        (["count=3"], "count: 3 is under 10 a class"),
        (["prevalence=1"], "prevalence: 1.0 is not between 0 and 1"),
        (["pipeline=checkpoints/ldm-emoji-512"], "model: has no effect"),
        (["detector=none"], "detector: none: no such folder"),
        (["data.synthetic.resolution=40"], "has a short side of 40 pixels, fewer than 64"),
    ],
)
def test_an_evaluation_that_cannot_be_is_one_sentence(labeled, changes, message, tmp_path, capsys):
    assert cli.main(["anomaly", "evaluate", *labeled, *changes]) == EXIT_USER_ERROR
    said = capsys.readouterr().err.strip().replace("\r", "\n").splitlines()[-1]
    assert said.startswith("ldm-vae anomaly evaluate: ")
    assert message in said
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.fixture
def scoring(plain, autoencoder_directory, image_folder, tmp_path) -> list[str]:
    """Words of `anomaly score` for 24 images and one that is small."""
    shutil.copytree(image_folder, tmp_path / "images")
    Image.fromarray(np.full((40, 40, 3), 7, np.uint8)).save(tmp_path / "images" / "small.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"none")
    return [f"detector={plain}", f"autoencoder={autoencoder_directory}", "data.source=folder", "device=cpu",
            f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'out'}"]  # fmt: skip


def test_images_of_ones_own_are_scored_and_sorted(scoring, tmp_path, capsys):
    assert cli.main(["anomaly", "score", *scoring, "shown=3"]) == 0
    said = capsys.readouterr().out
    assert "of 25 images found anomalous by l1_peak (of normal ones about 2 would be called so)" in said
    assert "1 image smaller than the detector's crop, and enlarged" in said
    results = json.loads((tmp_path / "out" / "scores.json").read_text())
    rows = results["images"]
    values = [row["score"] for row in rows]
    assert values == sorted(values, reverse=True)
    for row in rows:
        assert row["verdict"] == ("anomalous" if row["score"] > results["threshold"] else "normal")
        assert row["score"] == row["scores"]["l1_peak"]
        assert (row["percentile"] == 100.0) == (row["p_value"] == 1 / (results["held_out"] + 1))
    assert [row["id"] for row in rows if row["enlarged"]] == ["small.png"]
    assert results["rejected"] == [{"id": "broken.png", "reason": "unknown_format"}]
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["id"] for row in table] == [row["id"] for row in rows]
    assert float(table[0]["kl"]) == rows[0]["scores"]["kl"]
    page = Page((tmp_path / "out" / "index.html").read_text())
    assert all(source.startswith("data:image/webp") for source in page.images)
    assert len(page.images) == 6
    (tmp_path / "images" / "small.png").unlink()
    assert cli.main(["anomaly", "score", *scoring, "shown=3"]) == EXIT_USER_ERROR
    assert "holds the result of other images" in capsys.readouterr().err


def test_images_that_the_detector_was_fitted_to_are_said_to_be(plain, autoencoder_directory, tmp_path, capsys):
    words = [f"detector={plain}", f"autoencoder={autoencoder_directory}", *SYNTHETIC, "data.synthetic.count=48"]
    assert cli.main(["anomaly", "score", *words, f"output={tmp_path / 'out'}", "shown=1"]) == 0
    assert "the detector was fitted to 40 of them, whose percentiles mean little" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["images"]
    assert sum(row["seen"] for row in rows) == 40


@pytest.mark.slow
def test_another_score_orders_otherwise_and_replaces_the_result_only_when_asked(scoring):
    first = score_images(configuration.load(ScoreImagesConfig, None, scoring))
    words = [*scoring, "by=mahalanobis_pooled", "shown=1"]
    with pytest.raises(UserError, match=r"holds the result of by \(null -> mahalanobis_pooled\)"):
        score_images(configuration.load(ScoreImagesConfig, None, words))
    other = score_images(configuration.load(ScoreImagesConfig, None, words), overwrite=True)
    assert [row["id"] for row in first["images"]] != [row["id"] for row in other["images"]]
    assert other["images"][0]["score"] == other["images"][0]["scores"]["mahalanobis_pooled"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["by=l1_paek"], "by: 'l1_paek' is not a score here; did you mean l1_peak?"),
        (["by=flow_t0.3"], "it needs pipeline when a detector is fitted"),
        (["autoencoder={saved}"], "was fitted with another autoencoder than"),
        (["batch=0"], "batch: 0 is not positive"),
        (["data.include=[broken*]"], "none of the 1 images can be read (unknown format, for example"),
    ],
)
def test_scoring_that_cannot_be_is_one_sentence(scoring, saved, changes, message, capsys):
    words = [word.format(saved=saved / "autoencoder") for word in changes]
    assert cli.main(["anomaly", "score", *scoring, *words]) == EXIT_USER_ERROR
    said = capsys.readouterr().err.strip().replace("\r", "\n").splitlines()[-1]
    assert said.startswith("ldm-vae anomaly score: ")
    assert message in said


@pytest.mark.slow
def test_a_result_of_another_detector_at_the_same_place_is_not_taken_for_this_one(scoring, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "detector")
    words = [f"detector={tmp_path / 'detector'}", *scoring[1:]]
    score_images(configuration.load(ScoreImagesConfig, None, words))
    fitted = json.loads((plain / "detector.json").read_text())["config"]
    again = ["resolution=64", "false_positive_rate=0.2", *SYNTHETIC, f"output={tmp_path / 'detector'}"]
    fit_detector(
        configuration.load(FitDetectorConfig, None, [f"autoencoder={fitted['autoencoder']}", *again]), overwrite=True
    )
    with pytest.raises(UserError, match="holds the result of another detector"):
        score_images(configuration.load(ScoreImagesConfig, None, words))
