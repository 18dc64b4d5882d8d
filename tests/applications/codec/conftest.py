"""A tiny autoencoder on disk, entropy models without training, and a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.applications.codec.compression import Codec, open_codec
from ldm_vae.applications.codec.entropy_models import ROLES, input_count, weight_count
from ldm_vae.applications.codec.format import FittedModel
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.random import numpy_rng
from tests.test_golden import unpacked

STEPS = np.array([-1300, -400, 0, 400, 1300], np.int16)
"""Few values: the golden file packs well."""


def smooth_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3): blobs of color."""
    coarse = numpy_rng(seed, "picture").integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def random_model(identity: str, channels: int, kind: str = "context") -> FittedModel:
    """Networks of random weights: they predict nothing, and must be followed all the same."""
    rng = numpy_rng(0, "model")
    keys = [(channel, role) for channel in range(channels) for role in range(ROLES)] if kind == "context" else []
    weights = {key: rng.choice(STEPS, weight_count(input_count(*key))) for key in keys}
    levels = np.linspace(0.9, 1.1, channels)
    return FittedModel(kind, identity, 0.1 * levels, 0.05 * levels, (6000,) * channels, (36000,) * channels, weights)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 latent channels, f8, at a rate as if it had been trained."""
    model = load_autoencoder(unpacked("autoencoder", tmp_path_factory.mktemp("golden")))
    with torch.no_grad():
        model.encoder.head.bias[3:] -= 12.0  # posteriors of about a fifth of the latents' spread
    folder = tmp_path_factory.mktemp("codec") / "autoencoder"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain(autoencoder_folder: Path) -> Codec:
    """Files that need no entropy model."""
    return open_codec(str(autoencoder_folder))


@pytest.fixture(scope="session")
def model_file(plain: Codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context model for the autoencoder."""
    path = tmp_path_factory.mktemp("model") / "context.safetensors"
    random_model(plain.identity, plain.channels).save(path)
    return path


@pytest.fixture(scope="session")
def fitted(autoencoder_folder: Path, model_file: Path) -> Codec:
    """With that context model."""
    return open_codec(str(autoencoder_folder), str(model_file))
