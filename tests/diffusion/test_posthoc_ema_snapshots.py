"""Stored averages: when they are written, that they are what they say, and other lengths made from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm_vae.diffusion.posthoc_ema import copy_to, stored_averages, synthesize_ema
from ldm_vae.diffusion.power_function_ema import EmaConfig, EmaSnapshots, PowerFunctionEma
from ldm_vae.errors import UserError


@dataclass
class Accelerator:
    is_main_process: bool = True


@dataclass
class Engine:
    """What a snapshot asks of the engine."""

    steps: int
    accelerator: Accelerator = field(default_factory=Accelerator)


def train(
    module: nn.Module, snapshots: EmaSnapshots, steps: range, total: int, others: tuple[PowerFunctionEma, ...] = ()
) -> None:
    """Weights that drift and tremble, a function of the step."""
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(1 + step / total + 0.1 * torch.randn(parameter.shape, generator=rng))
        snapshots.update(step, Engine(total))  # type: ignore[arg-type]
        for ema in others:
            ema.update(step)


def network() -> nn.Module:
    return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "snapshots").iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    module = network()
    train(module, EmaSnapshots(EmaConfig(), module, run / "snapshots"), range(200), 200)
    return run


def test_a_file_each_twentieth_of_the_run_in_half_precision(run: Path) -> None:
    assert files(run) == [f"step-{step:09d}.safetensors" for step in range(10, 201, 10)]
    stored = stored_averages(run / "snapshots")
    assert list(stored)[:3] == [(10, 0.05), (10, 0.1), (20, 0.05)]
    assert stored[200, 0.1].stat().st_size < 2 * 2 * 112 + 1000


@pytest.mark.parametrize(("length", "tolerance"), [(0.05, 1e-3), (0.07, 5e-3), (0.1, 1e-3), (0.14, 5e-3)])
def test_any_length_afterwards(run: Path, length: float, tolerance: float) -> None:
    """Against an average of that length that ran along, at the end and in the middle of the run."""
    for step in (200, 120):
        module = network()
        along = PowerFunctionEma(module, length)
        train(module, EmaSnapshots(EmaConfig(snapshots=0), module, None), range(step), 200, (along,))
        average = synthesize_ema(run, length, step)
        assert average.residual < 0.05
        for name, expected in along.tensors.items():
            torch.testing.assert_close(average.weights[name], expected, atol=tolerance, rtol=0)
        copy_to(module, average)
        assert torch.equal(dict(module.named_parameters())["weight"], average.weights["weight"])


def test_half_precision_costs_less_than_a_thousandth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    monkeypatch.setattr(torch.Tensor, "half", torch.Tensor.float)
    module = network()
    train(module, EmaSnapshots(EmaConfig(), module, tmp_path / "snapshots"), range(200), 200)
    for length in (0.05, 0.07, 0.14):
        half, full = (synthesize_ema(where, length).weights["weight"] for where in (run, tmp_path))
        assert not torch.equal(half, full)
        torch.testing.assert_close(half, full, rtol=1e-3, atol=0)


def test_a_run_that_was_broken_off_continues_exactly(run: Path, tmp_path: Path) -> None:
    module = network()
    first = EmaSnapshots(EmaConfig(), module, tmp_path / "snapshots")
    train(module, first, range(95), 200)
    saved = {
        stem: {name: t.clone().contiguous() for name, t in group.items()} for stem, group in first.tensors().items()
    }
    state = {"written": list(first.written)}
    train(module, first, range(95, 118), 200)  # lost, but for its files
    second = EmaSnapshots(EmaConfig(), module, tmp_path / "snapshots")
    second.load_state_dict(state, saved)
    train(module, second, range(95, 200), 200)
    assert files(tmp_path) == files(run)
    assert torch.equal(synthesize_ema(tmp_path, 0.07).weights["weight"], synthesize_ema(run, 0.07).weights["weight"])


def test_files_of_another_attempt_go(tmp_path: Path) -> None:
    """A run of 100 steps broke off at 60 and continues from its checkpoint at 50 as one of 70 steps."""
    module = network()
    first = EmaSnapshots(EmaConfig(snapshots=10), module, tmp_path / "snapshots")
    train(module, first, range(50), 100)
    state = {"written": list(first.written)}
    train(module, first, range(50, 60), 100)
    second = EmaSnapshots(EmaConfig(snapshots=10), module, tmp_path / "snapshots")
    second.load_state_dict(state, first.tensors())
    train(module, second, range(50, 70), 70)
    assert files(tmp_path) == [f"step-{step:09d}.safetensors" for step in (10, 20, 30, 40, 50, 56, 63, 70)]


def test_averages_that_a_checkpoint_lacks_begin_with_its_weights() -> None:
    module = network()
    snapshots = EmaSnapshots(EmaConfig(), module, None)
    snapshots.load_state_dict({}, {})
    snapshots.update(70, Engine(100))  # type: ignore[arg-type]
    for group in snapshots.tensors().values():
        torch.testing.assert_close(group["weight"], module.weight.detach())


def test_none_are_kept_when_none_are_asked_for(tmp_path: Path) -> None:
    module = network()
    snapshots = EmaSnapshots(EmaConfig(snapshots=0), module, tmp_path / "snapshots")
    train(module, snapshots, range(5), 5)
    assert snapshots.tensors() == {}
    assert not any(tmp_path.iterdir())


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    module = network()
    snapshots = EmaSnapshots(EmaConfig(), module, tmp_path / "snapshots")
    snapshots.update(0, Engine(1, Accelerator(is_main_process=False)))  # type: ignore[arg-type]
    assert snapshots.written == [1]
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_is_refused(run: Path, tmp_path: Path) -> None:
    for make, message in (
        (lambda: EmaConfig(lengths=()), "at least one"),
        (lambda: EmaConfig(lengths=(0.1, 0.1)), "different lengths"),
        (lambda: EmaConfig(lengths=(0.3,)), "ema.lengths: 0.3 is not the length"),
        (lambda: EmaConfig(snapshots=-1), "ema.snapshots: -1"),
        (lambda: synthesize_ema(run, 0.5), "length: 0.5 is not the length"),
        (lambda: synthesize_ema(run, 0.1, 57), "no snapshot of step 57; 60 is the nearest of 20"),
        (lambda: synthesize_ema(tmp_path, 0.1), "holds no snapshots"),
        (lambda: copy_to(nn.Linear(2, 2), synthesize_ema(run, 0.1)), "not those of this U-Net"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "step-000000001.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        synthesize_ema(tmp_path, 0.1)
