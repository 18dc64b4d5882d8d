"""What only an accelerator shows: half precision and compilation in training, and images equal up to rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ldm_vae import cli
from ldm_vae.diffusion.generation import GenerateConfig, generate
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline

pytestmark = pytest.mark.gpu

SETTINGS = [
    "unet.preset=tiny", "unet.widths=[32,64]", "steps=6", "batch=8", "micro_batch=4", "held_out=0.3", "ema.snapshots=2",
    "training.device=cuda", "training.workers=0", "training.tracker=none", "training.log_every=1",
    "training.validate_every=3", "training.preview_every=3", "training.save_every=3", "training.warmup_steps=1",
]  # fmt: skip


@pytest.mark.parametrize("setting", ["precision=fp32", "precision=bf16", "precision=fp16", "compile=true"])
def test_training_steps(latents: Path, autoencoder_directory: Path, tmp_path: Path, setting: str) -> None:
    places = [f"output={tmp_path}", f"latents={latents}", f"autoencoder={autoencoder_directory}"]
    assert cli.main(["train-diffusion", *SETTINGS, *places, f"training.{setting}"]) == 0
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/flow"] for line in logged if "loss/flow" in line]
    assert len(losses) == 6
    assert all(0 < loss < 3 for loss in losses)
    assert len(list((tmp_path / "previews").iterdir())) == 2
    assert LatentDiffusionPipeline.from_pretrained(tmp_path / "pipeline").unet.dtype == torch.float32


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
def test_images_are_those_of_the_cpu(saved: Path, sampler: str) -> None:
    here, there = (LatentDiffusionPipeline.from_pretrained(saved).to(device) for device in ("cpu", "cuda"))
    images = [
        pipeline(["cat", "dog"], num_images=3, seed=0, num_inference_steps=4, sampler=sampler, output_type="pt").images
        for pipeline in (here, there)
    ]
    torch.testing.assert_close(images[1], images[0], atol=0.05, rtol=0)  # TF32 in convolutions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(saved: Path, dtype: torch.dtype) -> None:
    half = LatentDiffusionPipeline.from_pretrained(saved, torch_dtype=dtype).to("cuda")
    full = LatentDiffusionPipeline.from_pretrained(saved)
    images = [pipeline("cat", seed=0, num_inference_steps=4, output_type="pt").images for pipeline in (half, full)]
    assert (images[0] - images[1]).abs().mean() < 0.02


def test_a_compiled_network_draws_the_same(saved: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(saved).to("cuda")
    expected = pipeline("cat", seed=0, num_inference_steps=2, output_type="pt").images
    pipeline.unet.compile()
    found = pipeline("cat", seed=0, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_the_command_in_bf16(saved: Path, tmp_path: Path) -> None:
    made, speed = generate(
        GenerateConfig(str(saved), count=4, steps=4, precision="bf16"), tmp_path / "out", device="cuda"
    )
    assert made == 4
    assert speed > 0
