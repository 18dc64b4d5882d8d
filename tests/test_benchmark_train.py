from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train as script
from benchmarks.peer_step import peer_step

SMALL = ["--widths", "8", "8", "--preset", "pico", "--crop", "48", "--batch", "1", "--rounds", "2", "--wait-steps", "3"]
SMALL += ["--perceptual", "squeeze"]


@pytest.mark.slow
def test_both_sides_take_a_step_and_everything_is_told(tmp_path: Path) -> None:
    output = tmp_path / "output"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "train", str(output), *SMALL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((output / "results.json").read_text())
    assert {name: len(values) for name, values in found["seconds"].items()} == {
        "ours, bf16": 2,
        "ours, fp32": 2,
        script.EXAMPLE: 2,
        script.REPAIRED: 2,
    }
    whole, plain = found["roof"]
    assert whole["gigaflops"] > whole["lpips_gigaflops"] > 0 == plain["lpips_gigaflops"]
    assert whole["host_synchronisations"] == plain["host_synchronisations"] == 0
    assert found["waits"]["steps"] == 2
    assert "| share of the roof, L1, KL |" in (output / "results.md").read_text()


def test_a_read_number_is_a_synchronisation() -> None:
    numbers = torch.arange(3.0)
    assert script.host_synchronisations(lambda: numbers.sum()) == 0
    assert script.host_synchronisations(lambda: float(numbers.sum()) + numbers[1].item()) == 2


def test_the_example_trains_both_networks() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    autoencoder: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    before = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    step = peer_step(autoencoder, lambda made, targets: (made - targets).square().mean((1, 2, 3), True), images)
    step()
    after = autoencoder.state_dict()
    assert all(
        not torch.equal(before[name], after[name]) for name in ("encoder.conv_in.weight", "decoder.conv_out.bias")
    )
    assert all(parameter.grad is None for parameter in autoencoder.parameters())


def test_a_missed_limit_is_called_missed() -> None:
    row = {
        "terms": "L1, KL", "gigaflops": 10.0, "lpips_gigaflops": 0.0, "step_seconds": 1.0,
        "roof_gigaflops_per_second": {"bf16": 20.0, "fp32": 10.0}, "fraction": {"median": 0.5},
        "fraction_of_bf16": {"median": 0.5}, "host_synchronisations": 1,
    }  # fmt: skip
    found = {
        "widths": [8], "preset": "pico", "perceptual": "vgg", "crop": 48, "batch": 1, "rounds": 2, "device": "cpu",
        "threads": 1,
        "seconds": {"ours, bf16": [1.0, 1.0], "ours, fp32": [2.0, 2.0]}
        | {script.EXAMPLE: [2.2, 2.2], script.REPAIRED: [3.0, 3.0]},
        "roof": [row], "waits": {"steps": 2, "waited_seconds": 0.01, "share": 0.01},
    }  # fmt: skip
    lines = script.text(found).splitlines()
    assert sum(line.endswith("**missed** |") for line in lines) == 3  # 1.1x in fp32, half of the roof, the wait
    assert any(line.startswith(f"| {script.EXAMPLE}, over ours, bf16 | 2.2x") for line in lines)


@pytest.mark.parametrize("whole", [True, False])
def test_a_step_is_the_package_s_own_update(tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm_vae.autoencoder.models import AutoencoderConfig
    from ldm_vae.autoencoder.training import VaeModel

    script.write_networks(tmp_path, [8], "squeeze")
    steps: list[int] = []
    update = VaeModel.update

    def counted(self: VaeModel, step: int, *given: Any) -> dict[str, torch.Tensor]:
        steps.append(step)
        return update(self, step, *given)

    monkeypatch.setattr(VaeModel, "update", counted)
    ours = {"autoencoder": AutoencoderConfig(preset="pico")}
    found: Any = script.our_step(tmp_path, ours, "fp32", 48, 1, "cpu", whole)()
    assert steps == [0, 1]
    assert ("loss/adversarial" in found) is ("loss/perceptual" in found) is whole
