"""Every kind of autoencoder through the chain: it trains, resumes exactly, evaluates, encodes, feeds the U-Net."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm_vae import cli
from ldm_vae.autoencoder.models import load_autoencoder

DATA = ["data.source=synthetic", "data.synthetic.count=40", "data.synthetic.resolution=64"]
TRAINING = [
    "training.precision=fp32", "training.workers=0", "training.log_every=2", "training.warmup_steps=1",
    "training.device=cpu", "training.tracker=none", "training.save_every=2", "training.keep_checkpoints=9",
]  # fmt: skip
KINDS = {
    "ae": ["autoencoder.kind=ae"],
    "vq": ["autoencoder.kind=vq", "autoencoder.codebook_size=16"],
    "vq-ema": ["autoencoder.kind=vq", "autoencoder.codebook=ema", "autoencoder.codebook_size=16"],
    "fsq": ["autoencoder.kind=fsq", "autoencoder.fsq_levels=[5,3,3]", "autoencoder.latent_channels=3"],
    "frozen": ["autoencoder.kind=frozen", "autoencoder.residual_channels=2"],
}


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> str:
    """A tiny DINOv2 with random weights."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder, safe_serialization=True)
    return str(folder)


def state(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {
        f"{file.stem}.{name}": tensor
        for file in newest.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "fsq" else ()) for kind in KINDS]
)
def test_a_kind_goes_through_the_chain(kind, vision, tmp_path):
    run = tmp_path / "vae"
    words = [*DATA, *TRAINING, *KINDS[kind], "autoencoder.preset=pico", "phases=[{steps: 4, crop: 32, batch: 4}]"]
    words += [f"autoencoder.encoder={vision}"] if kind == "frozen" else []
    train = ["train-vae", *words, "held_out_resolution=64", "held_out_images=2", f"output={run}"]
    assert cli.main(train) == 0
    expected, autoencoder = state(run), load_autoencoder(run)
    assert autoencoder.deterministic
    logged = set().union(*(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()))
    assert ("codebook/perplexity" in logged) == (kind in ("vq", "vq-ema", "fsq"))
    assert not any(name.startswith("rate/") for name in logged)  # a point has no rate
    assert json.loads((run / "autoencoder" / "training.json").read_text())["kind"] == kind.removesuffix("-ema")

    shutil.rmtree(run / "checkpoints" / "step-000000004")
    (run / "run.json").unlink()
    assert cli.main(train) == 0  # from step 2
    resumed = state(run)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)

    common = [*DATA, f"autoencoder={run}", "resolution=64"]
    assert cli.main(["evaluate", *common, "count=3", f"output={tmp_path / 'evaluation'}"]) == 0
    assert cli.main(["encode", *common, "workers=0", "shard_size=16", f"output={tmp_path / 'latents'}"]) == 0
    diffusion = ["train-diffusion", *TRAINING, f"autoencoder={run}", f"latents={tmp_path / 'latents'}"]
    diffusion += ["unet.preset=tiny", "unet.widths=[32,64]", "steps=2", "batch=4", f"output={tmp_path / 'diffusion'}"]
    assert cli.main(diffusion) == 0
    assert (tmp_path / "diffusion" / "pipeline" / "model_index.json").is_file()
