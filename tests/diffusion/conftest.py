"""A whole pipeline small enough to run in a fraction of a second, its weights random; and latents to train on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.samplers import flow_scheduler
from ldm_vae.diffusion.unet import UNetConfig, build_unet
from ldm_vae.latents.normalizer import LatentNormalizer
from tests.latents.conftest import autoencoder_directory, encode, latents, settings  # noqa: F401

NAMES = ["cat", "dog", "red ball"]


def make_pipeline(names: list[str], architecture: str = "wavelet") -> LatentDiffusionPipeline:
    torch.manual_seed(0)
    preset = "pico" if architecture == "wavelet" else "tiny"
    autoencoder = build_autoencoder(AutoencoderConfig(architecture, preset, 4)).eval()  # type: ignore[arg-type]
    unet = build_unet(UNetConfig(preset="tiny", widths=(32, 64)), 4, len(names)).eval()
    nn.init.normal_(unet.network.conv_out.weight, std=0.05)
    pipeline = LatentDiffusionPipeline(
        autoencoder,
        unet,
        flow_scheduler(shift=1.5),
        normalizer=LatentNormalizer([0.1, -0.2, 0.3, 0.0], [1.0, 0.5, 2.0, 1.5]).to_dict(),
        latent_size=(8, 8),
        label_names=names,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline() -> LatentDiffusionPipeline:
    """Three classes, 64x64 images, f8 wavelet autoencoder."""
    return make_pipeline(NAMES)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of that pipeline."""
    directory = tmp_path_factory.mktemp("run") / "pipeline"
    make_pipeline(NAMES).save_pretrained(directory)
    return directory
