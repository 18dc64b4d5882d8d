from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm_vae import cli
from ldm_vae.autoencoder.train_config import Phase
from ldm_vae.errors import EXIT_INTERRUPTED, UserError
from ldm_vae.evaluation import sweep
from ldm_vae.evaluation.reconstruction import evaluate
from ldm_vae.evaluation.sweep import Point

RECIPE = """
data: {source: synthetic, held_out: 0.5, synthetic: {count: 32, resolution: 64}}
autoencoder: {architecture: wavelet, preset: pico, latent_channels: 4}
rate: {mode: target, target_nats: 3.0, integral_gain: 0.1}
phases: [{steps: 6, crop: 32, batch: 4}, {steps: 2, crop: 64, batch: 2}]
training: {learning_rate: 1.5e-3, warmup_steps: 1, workers: 0, log_every: 4, ema_decay: 0.9, tracker: none, device: cpu}
held_out_resolution: 64
held_out_images: 2
"""
EVALUATE = ["resolution=64", "count=8", "baseline_images=8", "examples=2", "codecs=[]"]


class InProcess:
    """The real commands without the start of a Python process each; remembers what it was asked for."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, words: Sequence[str], log: Path) -> int:
        self.commands.append(list(words))
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            return cli.main(words)

    @property
    def names(self) -> list[str]:
        return [words[0] for words in self.commands]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "vae.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> tuple[Point, InProcess, list[sweep.Outcome]]:
    """One point, trained and measured by the real commands."""
    point = sweep.plan_point(tmp_path_factory.mktemp("sweep"), "one", str(recipe), [], EVALUATE, steps=4)
    run = InProcess()
    return point, run, sweep.run_points([point], 1, run)


def test_a_point_is_trained_measured_and_diagnosed_by_the_users_commands(
    finished: tuple[Point, InProcess, list[sweep.Outcome]],
) -> None:
    point, run, outcomes = finished
    assert [(o.name, o.status) for o in outcomes] == [("one", "finished")], point.log.read_text()
    assert run.names == ["train-vae", "evaluate", "diagnose"]
    assert (point.autoencoder / "autoencoder" / "config.json").is_file()
    results = sweep.read_results(point)
    assert results is not None
    assert sweep.is_trained(point)
    assert sweep.is_evaluated(point)
    fingerprint = json.loads((point.autoencoder / "autoencoder" / "training.json").read_text())["fingerprint"]
    assert results["autoencoder"]["fingerprint"] == fingerprint
    assert sweep.is_diagnosed(point), point.log.read_text()
    assert (
        sweep.verdicts_of(point, results)
        == json.loads((point.folder / "health" / "health.json").read_text())["verdicts"]
    )


def test_a_finished_point_is_not_made_again(finished: tuple[Point, InProcess, list[sweep.Outcome]]) -> None:
    point, _, _ = finished
    again = InProcess()
    assert sweep.run_points([point], 1, again)[0].status == "finished"
    assert again.names == []


def test_other_settings_of_the_measurement_measure_again_only(
    finished: tuple[Point, InProcess, list[sweep.Outcome]],
) -> None:
    point, _, _ = finished
    again = InProcess()
    changed = replace(point, evaluate=replace(point.evaluate, count=4))
    assert sweep.run_points([changed], 1, again)[0].status == "finished"
    assert again.names == ["evaluate"]
    assert len((sweep.read_results(changed) or {})["images"]) == 4
    sweep.run_points([point], 1, again)


def test_a_result_whose_figures_were_computed_differently_is_measured_again(
    finished: tuple[Point, InProcess, list[sweep.Outcome]],
) -> None:
    point, _, _ = finished
    file = point.folder / "evaluation" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 1}))
    with pytest.raises(UserError, match="of another version of ldm_vae, whose figures are computed differently; give"):
        evaluate(point.evaluate)
    again = InProcess()
    assert sweep.run_points([point], 1, again)[0].status == "finished"
    assert again.names == ["evaluate"]


def test_a_point_that_another_launch_holds_is_left_to_it(
    finished: tuple[Point, InProcess, list[sweep.Outcome]],
) -> None:
    point, _, _ = finished
    never = InProcess()
    with sweep.point_lock(point.folder) as held:
        assert held
        assert sweep.run_point(point, never).status == "busy"
    with open(point.autoencoder / "run.lock", "a+") as training:
        fcntl.flock(training, fcntl.LOCK_EX)
        assert sweep.run_point(point, never).status == "busy"
    assert never.names == []
    assert sweep.run_point(point, never).status == "finished"


def test_failures_and_interruptions_are_told_apart(tmp_path: Path, recipe: Path) -> None:
    point = sweep.plan_point(tmp_path, "one", str(recipe), [], EVALUATE)

    def failing(words: Sequence[str], log: Path) -> int:
        log.write_text("10%|#  | 1/8 [00:01, 1.0it/s]\rldm-vae train-vae: data: something is wrong\n")
        return 2

    outcome = sweep.run_point(point, failing)
    assert outcome.status == "failed"
    assert "exit code 2: ldm-vae train-vae: data: something is wrong" in outcome.detail
    assert sweep.run_point(point, lambda words, log: EXIT_INTERRUPTED).status == "interrupted"

    def locked(words: Sequence[str], log: Path) -> int:
        point.autoencoder.mkdir()
        descriptor = os.open(point.autoencoder / "run.lock", os.O_CREAT | os.O_RDWR)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return 2

    with contextlib.ExitStack() as stack:
        assert sweep.run_point(point, locked).status == "busy"
    stopped = threading.Event()
    stopped.set()
    assert sweep.run_point(point, failing, stopped).status == "interrupted"


def test_commands_run_as_processes_with_a_log_and_can_be_ended(tmp_path: Path) -> None:
    commands = sweep.Commands(parallel=2)
    assert commands(["--version"], tmp_path / "log.txt") == 0
    text = (tmp_path / "log.txt").read_text()
    assert text.splitlines()[0] == "$ ldm-vae --version"
    assert sweep.last_line(tmp_path / "log.txt").startswith("ldm_vae ")
    commands.stop()
    assert commands(["--version"], tmp_path / "log.txt") == EXIT_INTERRUPTED


@pytest.mark.parametrize(
    ("steps", "expected"), [(100, [80, 20]), (5, [4, 1]), (2, [1, 1]), (3, [2, 1]), (1000, [800, 200])]
)
def test_phases_keep_their_proportions_and_their_sum(steps: int, expected: list[int]) -> None:
    phases = [Phase(steps=400), Phase(steps=100, crop=128)]
    scaled = sweep.scaled_phases(phases, steps)
    assert [phase.steps for phase in scaled] == expected
    assert scaled[1].crop == 128


def test_more_phases_than_steps_are_refused() -> None:
    with pytest.raises(UserError, match="fewer than the recipe's 2 phases"):
        sweep.scaled_phases([Phase(), Phase()], 1)


def test_a_wrong_setting_names_the_point(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(UserError, match=r"^wrong: .*latent_chanels"):
        sweep.plan_point(tmp_path, "wrong", str(recipe), ["autoencoder.latent_chanels=4"], [])
    with pytest.raises(UserError, match=r"^wrong: evaluate: .*resolutoin"):
        sweep.plan_point(tmp_path, "wrong", str(recipe), [], ["resolutoin=4"])


def test_a_folder_of_something_else_is_refused(tmp_path: Path, recipe: Path) -> None:
    from ldm_vae.evaluation.comparison import CompareConfig, Comparison
    from ldm_vae.evaluation.rate_distortion import Frontier, FrontierConfig

    config = FrontierConfig(output=str(tmp_path / "a"), vae=str(recipe))
    with Frontier(config).lock():
        Frontier(config).load()
    Frontier(replace(config, parallel=2)).load()
    with pytest.raises(UserError, match=r"holds a frontier with other settings: vae .*another output"):
        Frontier(replace(config, vae="other.yaml")).load()
    with pytest.raises(UserError, match="holds other files but no compare"):
        Comparison(CompareConfig(output=config.output, vae=str(recipe))).load()


def test_a_budget_in_seconds_becomes_steps_from_the_measured_speed(tmp_path: Path, recipe: Path) -> None:
    point = sweep.plan_point(tmp_path, "one", str(recipe), [], EVALUATE)

    # the recipe takes 6 * 4 / 100 + 2 * 2 / 10 = 0.64 s for 8 steps
    assert sweep.steps_for(point, 6.4, lambda train: [100.0, 10.0]) == 80

    def failing(train: object) -> list[float]:
        raise UserError("data: something is wrong")

    assert sweep.steps_for(point, 6.4, failing) == 80  # kept: a rerun has the same plan
    with pytest.raises(UserError, match=r"its speed could not be measured \(data: something is wrong\)"):
        sweep.steps_for(point, 7.0, failing)


def test_the_real_dry_run_gives_a_budget(tmp_path: Path, recipe: Path) -> None:
    point = sweep.plan_point(tmp_path, "one", str(recipe), [], EVALUATE)
    assert sweep.steps_for(point, 60.0) > 2


def test_without_a_health_report_the_rate_is_judged(tmp_path: Path, recipe: Path) -> None:
    point = sweep.plan_point(tmp_path, "one", str(recipe), [], EVALUATE)
    record: dict[str, Any] = {"rate": {"mode": "target", "target_nats": 2.0, "pinned_share": 0.2}}
    (point.autoencoder / "autoencoder").mkdir(parents=True)
    (point.autoencoder / "autoencoder" / "training.json").write_text(json.dumps(record))

    def found(nats: float | None) -> list[dict[str, Any]]:
        return sweep.verdicts_of(point, {"rate": {"kind": "KL to N(0, 1)", "nats_per_dim": nats}})

    def names(nats: float | None) -> list[str]:
        return [verdict["name"] for verdict in found(nats)]

    assert names(2.0) == ["rate_unreachable"]
    assert names(0.01) == ["rate_unreachable", "posterior_collapse", "rate_miss"]
    assert names(None) == []
    record["rate"]["beta_path"] = [[20, 1e-3, 0.5], [60, 1e-3, 1.0]]
    (point.autoencoder / "autoencoder" / "training.json").write_text(json.dumps(record))
    assert {verdict["severity"] for verdict in found(1.0)} == {"info"}  # no rate is held in 60 steps
