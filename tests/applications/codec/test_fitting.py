"""Fitted models: the context pays where latents have structure, and bad sets are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ldm_vae import cli
from ldm_vae.applications.codec import compression, entropy_models
from ldm_vae.applications.codec.entropy_models import Grid, step_of
from ldm_vae.applications.codec.fitting import ContextNetworks, code_length, logistic_bits
from ldm_vae.applications.codec.format import load_model
from tests.applications.codec.conftest import random_model, smooth_picture


def test_the_loss_is_the_code_length():
    values = torch.tensor([0.0, 0.3, -2.0, 50.0])
    predicted = torch.tensor([[0.1, 0.0], [0.3, -2.0], [0.0, 1.0], [0.0, -3.0]])
    found = logistic_bits(values, predicted, 0.5)
    for value, (mean, log_scale), bits in zip(values[:3].tolist(), predicted.tolist(), found.tolist()):
        scale = 2**log_scale
        edges = [1 / (1 + math.exp(-(value + side - mean) / scale)) for side in (-0.25, 0.25)]
        assert bits == pytest.approx(-math.log2(edges[1] - edges[0]), rel=1e-4)
    assert torch.isfinite(found).all()
    predicted.requires_grad_()
    logistic_bits(values, predicted, 0.5).sum().backward()
    assert torch.isfinite(predicted.grad).all()


def test_training_and_coding_count_the_same_bits():
    """The floats of the loss and the integers of the codec see the same neighbors and mean the same."""
    networks = ContextNetworks(2, np.full(2, 0.4), torch.Generator().manual_seed(0))
    from ldm_vae.applications.codec.fitting import _with_networks

    model = _with_networks(random_model("x", 2, "static"), networks)
    levels = np.rint(np.random.default_rng(0).normal(0, 3, (1, 2, 21, 18))).astype(np.int64)
    step = step_of(50.0)
    floats = code_length(networks, levels, model, step).item()
    integers = entropy_models.ideal_bits(model.at(step), levels[0]) / levels.size
    assert integers == pytest.approx(floats, rel=0.01)


@pytest.fixture(scope="module")
def latents(autoencoder_folder, tmp_path_factory):
    """40 smooth pictures, encoded."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("set")
    for number in range(40):
        path = folder / "images" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(smooth_picture(96, 96, seed=number)).save(path)
    words = [f"autoencoder={autoencoder_folder}", "data.source=folder", f"data.path={folder / 'images'}"]
    words += ["resolution=96", f"output={folder / 'latents'}", "workers=0", "device=cpu"]
    assert cli.main(["encode", *words]) == 0
    return folder / "latents"


def test_the_context_saves_bytes_of_actual_files(autoencoder_folder, latents, tmp_path, capsys):
    sizes = {}
    for kind in ("static", "context"):
        path = tmp_path / f"{kind}.safetensors"
        words = [f"autoencoder={autoencoder_folder}", f"latents={latents}", f"output={path}", f"kind={kind}"]
        assert cli.main(["codec-fit", *words, "steps=25", "batch=8", "learning_rate=0.01"]) == 0
        assert f"{kind} model of 3 channels" in capsys.readouterr().out
        assert cli.main(["codec-fit", *words]) == 2
        assert "is there already" in capsys.readouterr().err
        codec = compression.open_codec(str(autoencoder_folder), str(path))
        picture = codec.analyze(smooth_picture(96, 96, seed=1000), "it")
        compressed = codec.compress(picture, step_of(50.0))
        sizes[kind] = len(compressed.data)
        restored = Grid(codec.model.mean, codec.model.unit, compressed.step).restore(compressed.levels)
        assert np.abs(restored - picture.latents).max() <= 2 * codec.model.unit.max()  # a step
    assert sizes["context"] < 0.92 * sizes["static"]


def test_what_cannot_be_fitted_is_refused(autoencoder_folder, latents, tmp_path, capsys):
    given = [f"autoencoder={autoencoder_folder}", f"latents={latents}"]
    for words, sentence in (
        ([*given, "output=model.json"], "output: model.json is not a name for an entropy model"),
        ([*given, "output=a.safetensors", "steps=0"], "steps: 0 is not positive"),
        ([given[0], "latents=missing", "output=a.safetensors"], "missing"),
    ):
        assert cli.main(["codec-fit", *words]) == 2
        assert sentence in capsys.readouterr().err
    random_model("sha256:" + "0" * 64, 3, "static").save(tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors").kind == "static"
