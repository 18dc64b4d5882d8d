"""What a run directory tells of its training, while it runs and afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from ldm_vae.applications.explorer.answers import training_of
from ldm_vae.errors import UserError
from ldm_vae.files import write_json, write_text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """500 steps of a run that is still writing; two alarms, two previews, a health report."""
    folder = tmp_path / "run"
    lines = [
        {"step": step, "loss/l1": 1 / step, "loss/kl": 2.0, "rate/beta": 1e-3, "optim/lr": 1e-3}
        for step in range(1, 501)
    ]
    lines += [{"step": 250, "held_out/l1": 0.5, "held_out/psnr": 20.0, "held_out/nats_per_dim": 2.0}]
    lines += [{"step": 9, "alarm": "nearly nothing is said", "verdict": "posterior_collapse"}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 501, "loss/l'
    write_text(folder / "metrics.jsonl", text)
    write_text(folder / "config.yaml", "rate:\n  mode: target\n  target_nats: 2.5\n")
    for step in (250, 10):
        (folder / "previews").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "previews" / f"step-{step:09d}.webp")
    (folder / "previews" / "step-000000003.webp.tmp").write_bytes(b"")
    write_json(folder / "autoencoder" / "training.json", {"fingerprint": "sha256:1"})
    write_json(folder / "autoencoder" / "config.json", {})
    verdict = {"name": "clamped", "severity": "warn", "sentence": "clamped (warn): 0.2, above 0.01."}
    write_json(folder / "health" / "health.json", {"autoencoder": {"fingerprint": "sha256:1"}, "verdicts": [verdict]})
    return folder


def test_curves_have_units_and_are_of_modest_length(run: Path) -> None:
    found = training_of(run)
    assert found is not None
    loss = found.curves["Reconstruction loss"]
    assert loss["unit"].startswith("L1")
    steps, values = loss["series"]["training"]
    assert len(steps) == len(values) <= 250
    assert steps == sorted(steps)
    assert values[0] > values[-1]
    assert loss["series"]["held out"] == ([250], [0.5])
    rate = found.curves["KL loss, as a rate"]["series"]
    assert rate["training"][1][0] == pytest.approx(2 / math.log(2))
    assert rate["target"][1] == pytest.approx([2.5 / math.log(2)] * 2)
    assert {"Weight of the KL term", "Held-out quality", "Learning rate"} <= found.curves.keys()
    json.dumps([found.curves, found.alarms, found.verdicts])  # nothing of numpy


def test_alarms_verdicts_and_previews(run: Path) -> None:
    found = training_of(run)
    assert found is not None
    assert found.alarms == ({"step": 9, "text": "posterior_collapse: nearly nothing is said"},)
    assert found.verdicts == ({"name": "clamped", "status": "warn", "text": "0.2, above 0.01."},)
    assert [step for step, _ in found.previews] == [10, 250]
    assert all(path.is_file() for _, path in found.previews)


def test_the_autoencoder_in_a_run_leads_to_it_and_nothing_else_does(run: Path, tmp_path: Path) -> None:
    assert training_of(run / "autoencoder") == training_of(run)
    assert training_of(tmp_path) is None
    assert training_of("someone/model") is None


def test_a_checkpoint_may_carry_the_records_of_its_training(run: Path) -> None:
    for file in ("config.json", "training.json"):
        (run / "autoencoder" / file).rename(run / file)
    (run / "autoencoder").rmdir()
    found = training_of(run)
    assert found is not None
    assert len(found.verdicts) == 1


def test_a_report_about_other_weights_is_left_out(run: Path) -> None:
    write_json(run / "autoencoder" / "training.json", {"fingerprint": "sha256:2"})
    found = training_of(run)
    assert found is not None
    assert found.verdicts == ()


def test_a_run_that_has_just_begun_is_empty(run: Path) -> None:
    write_text(run / "metrics.jsonl", "")
    for path in (run / "previews").iterdir():
        path.unlink()
    found = training_of(run)
    assert found is not None
    assert (found.curves, found.alarms, found.previews) == ({}, (), ())


def test_a_damaged_record_is_named(run: Path) -> None:
    write_text(run / "health" / "health.json", "{")
    with pytest.raises(UserError, match=r"health\.json: is not valid JSON"):
        training_of(run)


def test_odd_lines_of_a_running_training_are_passed_over(run: Path) -> None:
    before = training_of(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1e400, "loss/l1": 1}\nnull\n{"step": 251, "alarm": "caf\xc3')  # cut within a letter
    assert training_of(run) == before
    write_text(run / "config.yaml", "rate: nothing\n")
    assert training_of(run) is not None
