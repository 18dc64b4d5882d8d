"""What it took to make an autoencoder, over all the runs that it goes back to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldm_vae.autoencoder.ancestry import FILE, earlier_runs


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
