"""Shared fixtures: small images on disk, and a perceptual backbone of random weights (tests only)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae import compat

compat.repair_torchvision()
torch.set_num_threads(1)  # two threads on a busy machine wait for each other more than they compute


@pytest.fixture(scope="session")
def random_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file in the layout of torchvision's SqueezeNet features, random: shows gradients, not quality."""
    import lpips
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    tensors = {"features." + key.split(".", 1)[1]: value for key, value in network.net.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "squeeze.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 smooth random PNGs of 96x80 pixels in the folders `a` and `b`."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        path = folder / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        coarse.resize((80, 96), Image.Resampling.BICUBIC).save(path)
    return folder
