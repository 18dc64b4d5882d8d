from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from benchmarks import codec as script
from benchmarks import roof


def arguments(direction: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    script.add_arguments(parser)
    small = {"size": 64, "rounds": 2, "slow-rounds": 2, "batch": 2, "sd-preset": "tiny", "preset": "pico"}
    found = parser.parse_args([f"--{name}={value}" for name, value in small.items()])
    found.subject = direction
    return found


@pytest.fixture(autouse=True)
def smallest_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small presets and short turns only: the measured code is the same."""
    monkeypatch.setattr(script, "OTHER_PRESETS", ("nano",))
    monkeypatch.setattr(script, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(roof, "SIDE", 8)


@pytest.mark.parametrize("direction", ["encode", pytest.param("decode", marks=pytest.mark.slow)])
def test_a_direction_is_measured_and_told(direction: str) -> None:
    found = script.measure(arguments(direction), lambda words: None)
    assert found["same_weights"]["fp32"]["largest_difference"] < script.EQUAL_DIFFERENCE
    assert script.EQUAL_DECIBELS < found["same_weights"]["bf16"]["decibels"] < 80
    rows = found["architectures"]["bf16"]["rows"]
    assert list(rows) == ["pico", "nano", "AutoencoderTiny", "sd"]
    assert all(row["seconds"] > 0 for row in rows.values())
    assert len(found["bars"]) == 8
    page = script.text(found)
    assert page.startswith("# Encoding at 64 x 64" if direction == "encode" else "# Decoding at 64 x 64")
    assert "| `AutoencoderTiny` |" in page
    assert "Where we lose" in page


def test_the_usual_loop_is_of_the_plain_network_and_ours_is_not() -> None:
    plain = script.sd_autoencoder(arguments("decode"))
    ours = script.prepared(plain, "fp32")
    upsampling = {"Upsample2D", "FoldedUpsample2D"}
    found = [upsampling & {type(layer).__name__ for layer in model.modules()} for model in (plain, ours)]
    assert found == [{"Upsample2D"}, {"FoldedUpsample2D"}]
    assert plain.decoder.conv_in.weight.is_contiguous()
    assert ours.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_work_is_that_of_the_network_as_written() -> None:
    """Whether our way leaves multiplications out or not."""
    chosen = arguments("decode")
    task, plain = script.make_task(chosen), script.sd_autoencoder(chosen)
    work = script.nominal_gigamacs(task, plain)
    assert work == pytest.approx(script.nominal_gigamacs(task, script.prepared(plain, "fp32")))
    from ldm_vae.runtime import gigamacs

    one = script.Task("decode", task.inputs[:1])
    assert gigamacs(lambda: one.usual(plain)) == pytest.approx(work)
    assert gigamacs(lambda: one.ours(script.prepared(plain, "fp32"))) < 0.9 * work


def test_a_faster_way_with_another_output_does_not_reach_its_bar() -> None:
    way = {"ratio": {"median": 3.0}, "largest_difference": 1.0, "decibels": 20.0}
    one: dict[str, Any] = {
        "over_sd": {"median": 60.0},
        "over_tiny": {"median": 4.0},
        "rows": {"nano": {"of_roof": 0.7}},
    }
    found = script.bars({"bf16": way, "fp32": way | {"largest_difference": 1e-6}}, {"fp32": one}, "nano")
    assert [line["reached"] for line in found] == [False, True, True, False, True]
    found = script.bars({"bf16": way | {"decibels": 40.0}, "fp32": way}, {"fp32": one}, "nano")
    assert [line["reached"] for line in found[:2]] == [True, False]
