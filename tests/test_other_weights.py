"""Folders with weights in float16 only, or in `.bin` files only: every command reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_vae import cli
from tests.autoencoder.test_models_of_others import small_kl
from tests.diffusion.conftest import NAMES, make_pipeline

FINE_TUNING = [
    "phases=[{steps: 1, crop: 32, batch: 2}]", "training.device=cpu", "training.workers=0", "training.tracker=none",
    "training.precision=fp32", "held_out_images=2", "held_out_resolution=64", "crop.short_side_min=32",
    "loss.perceptual=0",
]  # fmt: skip
AUTOENCODERS = {
    "reconstruct": "{model} {image} output={new}",
    "encode": "autoencoder={model} data={images} resolution=64 output={new} device=cpu precision=fp32",
    "compress": "{image} autoencoder={model} output={new}",
    "evaluate": "{model} data={images} resolution=64 part=all output={new} --dry-run",
    "interpolate": "{image} {image} autoencoder={model} frames=3 output={new}",
    "anomaly fit": "{model} data={images} resolution=64 false_positive_rate=0.5 output={new} --dry-run",
    "train-vae": "initial={model} data={images} output={new} --dry-run",
    "model convert": "{model} to=diffusers output={new}",
    "model card": "{model}",
}
PIPELINES = {
    "generate": "{model} count=1 steps=2 output={new}",
    "interpolate": "{image} {image} model={model} steps=2 frames=3 output={new}",
    "model convert": "{model} to=checkpoint output={new}",
    "model card": "{model}",
}
FOLDERS = ["kl-fp16", "kl-bin", "half/autoencoder", "bin/autoencoder"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Autoencoders and pipelines, each with weights of one kind; `half` as docs/how-to/generation.md makes it."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    blocks = {
        "block_out_channels": (16,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4,
    }  # fmt: skip
    small_kl(**blocks).half().save_pretrained(folder / "kl-fp16", variant="fp16")
    small_kl(**blocks).save_pretrained(folder / "kl-bin", safe_serialization=False)
    half = make_pipeline(NAMES)
    for network in (half.autoencoder, half.unet):
        network.half()
    half.save_pretrained(folder / "half", variant="fp16")
    make_pipeline(NAMES).save_pretrained(folder / "bin", safe_serialization=False)
    names = {path.name for path in folder.rglob("*.safetensors")} | {path.name for path in folder.rglob("*.bin")}
    assert names == {"diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"}
    return folder


def run(command: str, line: str, model: Path, images: Path, new: Path) -> int:
    image = next(images.rglob("*.png"))
    words = [word.format(model=model, image=image, images=images, new=new) for word in line.split()]
    return cli.main([*command.split(), *words, *(FINE_TUNING if command == "train-vae" else [])])


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_command_reads_the_autoencoder(folder: str, saved: Path, image_folder: Path, tmp_path: Path) -> None:
    for command, line in AUTOENCODERS.items():
        assert run(command, line, saved / folder, image_folder, tmp_path / command.replace(" ", "-")) == 0, command


@pytest.mark.parametrize("folder", ["half", "bin"])
def test_every_command_reads_the_pipeline(folder: str, saved: Path, image_folder: Path, tmp_path: Path) -> None:
    for command, line in PIPELINES.items():
        assert run(command, line, saved / folder, image_folder, tmp_path / command.replace(" ", "-")) == 0, command
