"""A detector of every score on 64-pixel images, of a pipeline with random weights; only its figures are meaningless."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_vae import config as configuration
from ldm_vae.applications.anomaly.detector import FitDetectorConfig, fit_detector
from tests.diffusion.conftest import saved as saved  # a fixture
from tests.latents.conftest import autoencoder_directory as autoencoder_directory  # a fixture

SYNTHETIC = ["data.synthetic.count=40", "data.synthetic.resolution=64", "data.held_out=0.4", "device=cpu"]


@pytest.fixture(scope="session")
def words(saved: Path, random_backbone: Path) -> list[str]:
    """Of `anomaly fit`, but for the output."""
    return [
        f"autoencoder={saved / 'autoencoder'}", f"pipeline={saved}", "perceptual_net=squeeze",
        f"perceptual_weights={random_backbone}", "regret_steps=1", "resolution=64", "false_positive_rate=0.1",
        *SYNTHETIC,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def detector_folder(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted detector that no test may change."""
    folder = tmp_path_factory.mktemp("detector") / "all"
    fit_detector(configuration.load(FitDetectorConfig, None, [*words, f"output={folder}"]))
    return folder


@pytest.fixture(scope="session")
def models(saved: Path, random_backbone: Path) -> list[str]:
    """Words that name the networks of that detector, for the other tools."""
    return [
        f"autoencoder={saved / 'autoencoder'}", f"pipeline={saved}", f"perceptual_weights={random_backbone}",
        "device=cpu",
    ]  # fmt: skip
