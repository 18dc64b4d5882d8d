"""The autoencoder's update() under the engine: two processes, micro-batches and a SIGKILL change nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm_vae import config as configuration
from ldm_vae.autoencoder.training import TrainVaeConfig, VaeModel
from ldm_vae.training.engine import Engine, make_accelerator
from ldm_vae.training.loader import Batch, MicroBatch

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "data.source=synthetic", "data.synthetic.count=40", "data.synthetic.resolution=64", "autoencoder.preset=pico",
    "autoencoder.latent_channels=2", "training.precision=fp32", "training.device=cpu", "training.workers=0",
    "training.tracker=none", "training.warmup_steps=2", "training.log_every=2", "training.save_every=3",
    "training.preview_every=1000", "held_out_images=1", "held_out_resolution=64", "crop.short_side_min=32",
]  # fmt: skip


def start(output: Path, phases: str, *words: str, processes: int = 1) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / "scripts" / "train_vae.py"), f"output={output}", f"phases=[{phases}]", *SETTINGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(job: subprocess.Popen) -> None:
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output[-2000:]


def weights(output: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = sorted((output / "checkpoints").glob("step-*"))[-1:]
    return {
        f"{path.stem}.{name}": tensor
        for path in checkpoint.glob("autoencoder*.safetensors")
        for name, tensor in load_file(path).items()
    }


def metrics(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """One process, the whole batch; the crop size changes on the way."""
    output = tmp_path_factory.mktemp("reference") / "run"
    finish(start(output, "{steps: 6, crop: 32, batch: 4}, {steps: 2, crop: 48, batch: 4}"))
    return output


def test_two_processes_with_micro_batches_equal_one_process(reference, tmp_path):
    phases = "{steps: 6, crop: 32, batch: 4, micro_batch: 1}, {steps: 2, crop: 48, batch: 4, micro_batch: 2}"
    finish(start(tmp_path / "run", phases, "training.processes=2", processes=2))
    ours, theirs = weights(tmp_path / "run"), weights(reference)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=name)
    for a, b in zip(metrics(tmp_path / "run"), metrics(reference)):
        assert a == pytest.approx(b, rel=1e-3)


def test_a_run_killed_at_a_random_moment_ends_bit_identical(reference, tmp_path):
    phases = "{steps: 6, crop: 32, batch: 4}, {steps: 2, crop: 48, batch: 4}"
    job = start(tmp_path / "run", phases)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    finish(start(tmp_path / "run", phases))
    ours, theirs = weights(tmp_path / "run"), weights(reference)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(tmp_path / "run") == metrics(reference)


def test_the_update_reports_both_terms_and_moves_beta_only_towards_the_target():
    config = configuration.load(
        TrainVaeConfig, None, ["output=x", *SETTINGS, "phases=[{steps: 200, crop: 16, batch: 2}]"]
    )
    model = VaeModel(config, held_out=None)
    engine = Engine(model, config.training, make_accelerator(config.training), steps=200)
    batch = Batch((MicroBatch(model.random_samples(slice(0, 2), 16), slice(0, 2)),), 2)
    first = model.update(150, batch, engine)
    assert {"loss/l1", "loss/kl", "rate/nats_per_dim", "rate/bits_per_dim", "rate/bits_per_pixel"} <= set(first)
    assert float(first["rate/nats_per_dim"]) < config.rate.target_nats  # at the start the code carries little
    for step in range(151, 160):
        last = model.update(step, batch, engine)
    assert float(last["rate/beta"]) < float(first["rate/beta"])  # so the weight of the KL goes down
    assert float(last["rate/bits_per_pixel"]) == pytest.approx(
        float(last["rate/nats_per_dim"]) * 2 / 64 / 0.6931, rel=1e-3
    )


def test_beta_zero_has_no_kl_gradient():
    """With beta = 0 the posterior's variance is trained by the reconstruction alone."""
    words = [*SETTINGS, "rate.mode=fixed", "rate.beta=0", "phases=[{steps: 2, crop: 16, batch: 2}]"]
    config = configuration.load(TrainVaeConfig, None, ["output=x", *words])
    model = VaeModel(config, held_out=None)
    assert float(model.rate.beta(0)) == 0
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.zeros(2, 2, 2, 2)
    reconstruction, _, logvar = model.modules["autoencoder"](images, noise)
    loss, _ = model.loss(reconstruction, images, step=0)
    (gradient,) = torch.autograd.grad(loss, logvar, allow_unused=True)
    assert gradient is None or float(gradient.abs().max()) == 0  # no noise, no beta: nothing moves the variance
