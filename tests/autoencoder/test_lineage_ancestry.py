"""What it took to make an autoencoder, over all the runs that it goes back to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldm_vae import config as configuration
from ldm_vae.autoencoder.lineage import FILE, earlier_runs, read_runs, runs_of, runs_text
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.errors import UserError


def write_run(folder: Path, fingerprint: str, started_from: tuple[str, str | None] | None = None) -> Path:
    """A run with the two records that count; `started_from`: a path and the fingerprint of what lay there."""
    (folder / "autoencoder").mkdir(parents=True)
    initial = None if started_from is None else dict(zip(("path", "fingerprint"), started_from))
    record: dict[str, Any] = {"fingerprint": fingerprint, "initial": initial}
    (folder / "autoencoder" / "training.json").write_text(json.dumps(record))
    (folder / "run.json").write_text(json.dumps({"command": [folder.name], "seconds": 5, "metrics": {}}))
    return folder


def names(folder: Path) -> list[str]:
    return [run["name"] for run in earlier_runs(folder)]


@pytest.fixture
def third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "first", "f1")
    write_run(tmp_path / "runs" / "second", "f2", ("runs/first", "f1"))
    return write_run(tmp_path / "runs" / "third", "f3", ("runs/second/autoencoder", "f2"))


def test_runs_are_followed_to_the_first_and_told_in_their_order(third: Path) -> None:
    assert earlier_runs(third) == [
        {"name": "first", "command": ["first"], "seconds": 5},
        {"name": "second", "command": ["second"], "seconds": 5},
    ]
    assert names(third.parent / "first") == []


def test_a_model_given_away_brings_the_list_along(third: Path) -> None:
    given = write_run(third.parents[1] / "given", "f3", ("runs/second", "f2"))
    (given / FILE).write_text(json.dumps({"format_version": 1, "runs": earlier_runs(third)}))
    fourth = write_run(third.parent / "fourth", "f4", (str(given), "f3"))
    assert names(given) == ["first", "second"]
    assert names(fourth) == ["first", "second", "given"]


def test_another_model_in_the_place_of_the_first_is_none_of_them(third: Path) -> None:
    (third.parent / "first" / "autoencoder" / "training.json").write_text('{"fingerprint": "other", "initial": null}')
    assert names(third) == ["second"]
    write_run(third.parent / "unknown", "f5", ("runs/second", None))
    assert names(third.parent / "unknown") == []


def test_runs_in_a_circle_end(third: Path) -> None:
    record = {"fingerprint": "f1", "initial": {"path": str(third), "fingerprint": "f3"}}
    (third.parent / "first" / "autoencoder" / "training.json").write_text(json.dumps(record))
    assert names(third) == ["first", "second"]


def test_the_run_that_made_a_model_is_the_last_of_those_that_made_it(third: Path) -> None:
    assert [run["name"] for run in runs_of(third, "f3")] == ["first", "second", "third"]
    assert runs_of(third / "autoencoder", "f3") == runs_of(third, "f3")
    assert runs_of(third, "other") == []


def test_of_the_settings_those_are_told_that_are_not_the_defaults(third: Path) -> None:
    given = {
        "phases": [{"steps": 7}, {"steps": 2, "crop": 128}],
        "loss": {"mse": 2.0},
        "repeat": {"a/*.x": 2},
        "data": {"source": "folder", "path": "images", "held_out": 0.25},
    }
    chosen = third.parents[1] / "chosen.yaml"
    chosen.write_text(json.dumps(given))
    settings = configuration.load(TrainVaeConfig, chosen, ["output=runs/first"])
    first = third.parent / "first"
    (first / "config.yaml").write_text(configuration.to_yaml(settings))
    (told,) = [run["settings"] for run in earlier_runs(third) if "settings" in run]
    expected = {"data.source": "folder", "data.path": "images", "data.held_out": 0.25, "loss.mse": 2.0}
    assert told.pop("phases") == configuration.to_dict(settings)["phases"]
    assert told == expected | {"repeat": {"a/*.x": 2}}
    (first / "config.yaml").write_text("loss: {mse: 2.0, l1: 1.0}\n")  # of a version that knew less
    assert earlier_runs(third)[0]["settings"] == {"loss.mse": 2.0}


def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert read_runs(tmp_path / FILE) == []
    (tmp_path / FILE).write_text(runs_text([{"name": "first"}]))
    assert read_runs(tmp_path / FILE) == [{"name": "first"}]
    for text, message in (('{"format_version": 2, "runs": []}', "version 2, .*update"), ("[1]", "restore it from a")):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=message):
            earlier_runs(tmp_path)
