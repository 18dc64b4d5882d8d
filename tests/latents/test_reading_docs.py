"""`docs/how-to/reading-latents.md`: its code runs, and does what the page says of it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
READING, TRAINER = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "how-to" / "reading-latents.md").read_text(), re.DOTALL
)


def small_settings(latents: Path, autoencoder: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """24 latents of 3x4x4 in 3 batches an epoch, and a network to match."""
    network = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
    return {
        "LATENTS": str(latents), "AUTOENCODER": str(autoencoder), "OUTPUT": output, "NETWORK": network, "BATCH": 8,
        "STEPS": 7, "SAVE_EVERY": 2, "WORKERS": 0, "PRECISION": "no", "LEARNING_RATE": 1e-2, "EMA_DECAY": 0.5,
    } | settings  # fmt: skip


@pytest.fixture
def train(latents, autoencoder_directory, tmp_path, monkeypatch):
    """train(name, **settings): run the page's trainer in this process -> its checkpoint."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "train_dit.py").write_text(TRAINER)

    def run(name: str, **settings: Any) -> dict[str, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)  # other tests leave theirs behind
        example = load(tmp_path / "train_dit.py")
        for key, value in small_settings(latents, autoencoder_directory, tmp_path / name, **settings).items():
            assert hasattr(example, key), key
            setattr(example, key, value)
        example.main()
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {name: value}
    return {key: leaf for part, inner in items for key, leaf in flat(inner, f"{name}.{part}").items()}


def test_the_short_example_reads_every_latent(latents):
    code = READING.replace('"runs/latents"', repr(str(latents))).replace("range(10)", "range(2)")
    names: dict[str, Any] = {}
    exec(code.replace("num_workers=4", "num_workers=0"), names)
    assert names["x"].shape == (24, 3, 4, 4)
    assert sorted(names["indices"].tolist()) == list(range(24))
    assert set(names["labels"].tolist()) == {0, 1}


def test_the_trainer_resumes_to_the_bit_and_makes_pictures(train, tmp_path):
    """Stopped at step 4, inside the second epoch of three steps; continued with another number of workers."""
    whole = flat(train("whole"))
    assert train("stopped", STEPS=4)["step"] == 4
    resumed = flat(train("stopped", WORKERS=2))
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]) if isinstance(value, torch.Tensor) else value == resumed[name], name
    for number in range(8):
        pictures = [Image.open(tmp_path / run / f"sample-{number}.png") for run in ("whole", "stopped")]
        assert pictures[0].size == (32, 32)
        assert pictures[0].tobytes() == pictures[1].tobytes()


def test_the_trainer_learns(train, capsys):
    train("long", STEPS=200)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < 1.7  # 2 in the beginning, when the velocity is 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_ends_at_the_data(tmp_path, guidance):
    """Where each label has one latent, the velocity is known and Euler's last step exact."""
    (tmp_path / "train_dit.py").write_text(TRAINER)
    example = load(tmp_path / "train_dit.py")
    latents = torch.randn(3, 4, 2, 2)

    def network(x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=(x - latents[labels]) / (time / 1000)[:, None, None, None])

    labels = torch.tensor([0, 1, 1])
    found = example.sample(network, torch.randn(3, 4, 2, 2), labels, 2, shift=0.5, guidance=guidance)
    torch.testing.assert_close(found, latents[2] + guidance * (latents[labels] - latents[2]))


def test_labels_reach_the_network_and_are_dropped_by_the_trainer_alone(tmp_path):
    """diffusers' own dropout of labels, which is on in training mode and drawn in each block, is off."""
    (tmp_path / "train_dit.py").write_text(TRAINER)
    example = load(tmp_path / "train_dit.py")
    example.NETWORK = small_settings(tmp_path, tmp_path, tmp_path)["NETWORK"]
    network = example.build_network(3, 4, 2).train()
    x, time = torch.randn(1, 3, 4, 4).expand(64, -1, -1, -1), torch.full((64,), 500.0)
    assert not network(x, time, torch.zeros(64, dtype=torch.int64)).sample.any()
    for layer in (network.proj_out_2, *(block.norm1.linear for block in network.transformer_blocks)):
        torch.nn.init.normal_(layer.weight)
    outputs = [network(x, time, torch.full((64,), label)).sample for label in range(3)]  # the third: no label
    for output, other in pairwise(outputs):
        torch.testing.assert_close(output, output[:1].expand_as(output))
        assert not torch.allclose(output, other)


@pytest.mark.slow
def test_two_processes_train_the_same_network(train, latents, autoencoder_directory, tmp_path):
    whole = train("one")
    settings = small_settings(latents, autoencoder_directory, tmp_path / "two")
    driver = tmp_path / "driver.py"
    driver.write_text(
        "from pathlib import Path, PosixPath\nimport train_dit\n"
        f"vars(train_dit).update({settings!r})\ntrain_dit.main()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(driver)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    job = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, job.stderr[-3000:]
    both = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    for name, value in whole["network"].items():
        torch.testing.assert_close(both["network"][name], value, atol=1e-4, rtol=1e-4)
