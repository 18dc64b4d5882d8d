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
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.rate import kl_divergence
from ldm_vae.autoencoder.train_config import TrainVaeConfig, held_out_part
from ldm_vae.autoencoder.training import VaeModel
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.training.loader import Batch, MicroBatch
from ldm_vae.training.trainer import Engine, make_accelerator

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "data.source=synthetic", "data.synthetic.count=40", "data.synthetic.resolution=64", "autoencoder.preset=pico",
    "autoencoder.latent_channels=2", "training.precision=fp32", "training.device=cpu", "training.workers=0",
    "training.tracker=none", "training.warmup_steps=2", "training.log_every=2", "training.save_every=3",
    "training.preview_every=1000", "held_out_images=1", "held_out_resolution=64", "crop.short_side_min=32",
]  # fmt: skip


def start(output: Path, phases: str, *words: str, processes: int = 1, settings=SETTINGS) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / "scripts" / "train_vae.py"), f"output={output}", f"phases=[{phases}]", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(job: subprocess.Popen) -> None:
    output, _ = job.communicate(timeout=1200)
    assert job.returncode == 0, output[-2000:]


def weights(output: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = sorted((output / "checkpoints").glob("step-*"))[-1:]
    return {
        f"{path.stem}.{name}": tensor
        for path in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def metrics(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


FEATURES = [
    "latents.nested=[1]", "latents.scale_equivariance=0.4", "latents.scales=[0.75]",
    "adversarial.loss=hinge", "adversarial.start=3", "adversarial.warmup=2", "adversarial.ramp=2",
    "adversarial.width=8", "adversarial.r1_every=2", "adversarial.learning_rate=1e-3",
]  # fmt: skip
"""Everything that a step can do besides the plain loss, at once."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """One process, the whole batch; the crop size changes on the way, then the adversarial loss begins."""
    output = tmp_path_factory.mktemp("reference") / "run"
    finish(start(output, "{steps: 3, crop: 32, batch: 4}, {steps: 9, crop: 48, batch: 4}", *FEATURES))
    return output


def test_the_reference_does_everything(reference):
    logged = set().union(*metrics(reference))
    assert {"loss/l1", "loss/kl", "loss/adversarial", "rate/beta", "health/median_logvar"} <= logged
    assert {"adversarial/discriminator", "adversarial/r1", "adversarial/logit_gap", "adversarial/weight"} <= logged
    assert [line["adversarial/weight"] for line in metrics(reference) if "adversarial/weight" in line][-1] > 0
    assert [line["verdict"] for line in metrics(reference) if "alarm" in line] == []
    record = json.loads((reference / "autoencoder" / "training.json").read_text())
    assert [point[0] for point in record["rate"]["beta_path"]] == [2, 4, 6, 8, 10, 12]
    assert record["rate"]["target_nats"] == 2.5


def test_the_rate_of_whole_held_out_images_is_measured(reference):
    record = json.loads((reference / "autoencoder" / "training.json").read_text())["held_out"]
    config = configuration.load(TrainVaeConfig, reference / "config.yaml")
    images = held_out_part(config).images
    with torch.no_grad():
        posterior = load_autoencoder(reference).encode(images).latent_dist
    expected = float(kl_divergence(posterior.mean, posterior.logvar).mean())
    assert record["held_out/nats_per_dim_images"] == pytest.approx(expected, rel=1e-4)
    assert record["held_out/nats_per_dim"] != pytest.approx(expected, rel=1e-3)


def test_two_processes_with_micro_batches_equal_one_process(reference, tmp_path):
    phases = "{steps: 3, crop: 32, batch: 4, micro_batch: 1}, {steps: 9, crop: 48, batch: 4, micro_batch: 2}"
    finish(start(tmp_path / "run", phases, *FEATURES, "training.processes=2", processes=2))
    ours, theirs = weights(tmp_path / "run"), weights(reference)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("discriminator.") for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    for a, b in zip(metrics(tmp_path / "run"), metrics(reference)):
        left_out = ("health/", "alarm", "verdict")  # health figures are of one micro-batch
        a, b = ({key: value for key, value in line.items() if not key.startswith(left_out)} for line in (a, b))
        assert a == pytest.approx(b, rel=5e-3)


@pytest.mark.slow
@pytest.mark.promise(1)
def test_a_run_killed_at_a_random_moment_ends_bit_identical(reference, tmp_path, record_property):
    phases = "{steps: 3, crop: 32, batch: 4}, {steps: 9, crop: 48, batch: 4}"
    job = start(tmp_path / "run", phases, *FEATURES)
    while len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) < 2:
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    finish(start(tmp_path / "run", phases, *FEATURES))
    ours, theirs = weights(tmp_path / "run"), weights(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(tmp_path / "run") == metrics(reference)
    record_property("figure", f"1 kill of the command itself: {len(theirs)} tensors and all metrics bit-identical")


def test_the_decoders_noise_is_drawn_for_the_global_batch_and_as_strong_as_asked(reference):
    words = [
        f"initial={reference}",
        "train=[decoder]",
        "latents.decoder_noise=0.3",
        "phases=[{steps: 2, crop: 256, batch: 64}]",
    ]
    model = VaeModel(configuration.load(TrainVaeConfig, None, [f"output={reference}", *words]), held_out=None)
    drawn = [model.draws(step, Batch((), 64), torch.device("cpu")).disturbance for step in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    deviations = drawn[0].std(dim=(1, 2, 3))
    assert float(deviations.square().mean().sqrt()) == pytest.approx(0.3, rel=0.3)  # |N(0, 1)| has a mean square of 1
    assert float(deviations.min()) < 0.05  # some images nearly clean


def test_the_polish_leaves_encoder_and_latents_as_they_are(reference, tmp_path):
    words = [
        "train=[decoder]",
        f"initial={reference}",
        "adversarial.loss=hinge",
        "adversarial.warmup=2",
        "latents.decoder_noise=0.3",
    ]
    settings = [word for word in SETTINGS if not word.startswith("autoencoder.")]
    job = start(tmp_path / "run", "{steps: 5, crop: 48, batch: 4}", *words, settings=settings)
    finish(job)
    before, after = load_autoencoder(reference), load_autoencoder(tmp_path / "run")
    assert after.encoder_fingerprint() == before.encoder_fingerprint()
    assert fingerprint(after) != fingerprint(before)
    assert torch.equal(after.encoder.head.weight, before.encoder.head.weight)
    assert not torch.equal(after.decoder.head.weight, before.decoder.head.weight)
    records = [
        json.loads((path / "autoencoder" / "training.json").read_text()) for path in (reference, tmp_path / "run")
    ]
    assert records[1]["rate"] == records[0]["rate"]  # it belongs to the encoder
    assert records[1]["initial"]["fingerprint"] == records[0]["fingerprint"]
    assert not any("rate/beta" in line for line in metrics(tmp_path / "run"))


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
    made = model.modules["autoencoder"](images, noise)
    loss, _ = model.loss(made.reconstruction, images, step=0)
    (gradient,) = torch.autograd.grad(loss, made.logvar, allow_unused=True)
    assert gradient is None or float(gradient.abs().max()) == 0  # no noise, no beta: nothing moves the variance


@pytest.mark.slow
def test_the_rate_meets_its_target_on_held_out_images_at_the_end_of_a_run(tmp_path):
    """Within 3 % over the last 5 % of the run; the training images are drawn with surfaces, so that bits are needed."""
    settings = [
        "data.source=synthetic", "data.synthetic.count=400", "data.synthetic.resolution=128",
        "data.synthetic.textured=1.0", "autoencoder.preset=pico", "training.workers=1", "training.device=cpu",
        "training.tracker=none", "training.warmup_steps=100", "training.learning_rate=1.5e-3",
        "training.ema_decay=0.98", "training.validate_every=20", "held_out_images=40", "held_out_resolution=64",
        "rate.target_nats=2.5", "data.held_out=0.2",
    ]  # fmt: skip
    finish(start(tmp_path / "run", "{steps: 1500, crop: 64, batch: 16}", settings=settings))
    last = [line for line in metrics(tmp_path / "run") if line["step"] > 0.95 * 1500]
    held_out = [line["held_out/nats_per_dim"] for line in last if "held_out/nats_per_dim" in line]
    trained = [line["rate/nats_per_dim"] for line in last if "rate/nats_per_dim" in line]
    assert len(held_out) >= 3
    assert sum(trained) / len(trained) == pytest.approx(2.5, rel=0.03)
    assert sum(held_out) / len(held_out) == pytest.approx(2.5, rel=0.03)
