"""A tiny autoencoder on disk, and a finished set of latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm_vae import config as configuration
from ldm_vae.autoencoder.wavelet import AutoencoderWavelet
from ldm_vae.latents.encode import EncodeConfig, encode_all_sizes, make_accelerator

Encode = Callable[..., int]


@pytest.fixture(scope="session")
def autoencoder_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    autoencoder = AutoencoderWavelet(
        latent_channels=3,
        encoder_channels=(8, 16),
        encoder_blocks=(1, 1),
        decoder_channels=(16, 8, 8, 8),
        decoder_blocks=(1, 0, 0, 0),
    )
    path = tmp_path_factory.mktemp("autoencoder")
    autoencoder.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def settings(autoencoder_directory: Path, image_folder: Path) -> list[str]:
    """24 images in 6 shards of 4, latents (3, 4, 4)."""
    return [
        f"autoencoder={autoencoder_directory}",
        "data.source=folder",
        f"data.path={image_folder}",
        *("resolution=32", "batch=2", "shard_size=4", "workers=0", "device=cpu"),
    ]


@pytest.fixture(scope="session")
def encode(settings: list[str]) -> Encode:
    """encode(output, *overrides) in this process."""

    def run(output: Path | str, *overrides: str) -> int:
        config = configuration.load(EncodeConfig, None, [*settings, f"output={output}", *overrides])
        return encode_all_sizes(config, make_accelerator(config)).exit_code

    return run


@pytest.fixture(scope="session")
def latents(encode: Encode, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set that no test may change."""
    path = tmp_path_factory.mktemp("latents") / "set"
    assert encode(path) == 0
    return path
