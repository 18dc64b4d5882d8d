"""The stages of every architecture: nothing left out, shapes and activations as they really are."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from ldm_vae.applications.explorer.answers import edited_reconstruction
from ldm_vae.applications.explorer.explored import Explored
from ldm_vae.applications.explorer.stages import measure_activation, mosaic, stages_of
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.data import transforms
from ldm_vae.errors import UserError
from ldm_vae.evaluation.comparison import coding_gigamacs
from tests.applications.explorer.models import made_of
from tests.autoencoder.test_models import FOREIGN

SETTINGS = {
    "wavelet": {"preset": "pico"},
    "linear": {"preset": "pico", "latent_channels": 6, "linear_path": True},
    "plain": {"preset": "pico", "kind": "ae"},
    "codes": {"preset": "pico", "kind": "fsq", "fsq_levels": [8, 5, 5, 5]},
    "sd": {"architecture": "sd", "preset": "tiny"},
    "vector": {"architecture": "vector", "preset": "digits", "latent_channels": 2},
}


def opened(name: str) -> Explored:
    """Random weights and three random images of 32 pixels."""
    if name == "codes" and importlib.util.find_spec("vector_quantize_pytorch") is None:
        pytest.skip("vector-quantize-pytorch is not installed")
    torch.manual_seed(0)
    return around(build_autoencoder(AutoencoderConfig(**SETTINGS[name])))  # type: ignore[arg-type]


def around(autoencoder: Autoencoder) -> Explored:
    autoencoder.eval().requires_grad_(False)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, logvar = autoencoder.encode_moments(transforms.from_uint8(images))
    return made_of(
        mean,
        autoencoder,
        images,
        logvar=logvar,
        kind=autoencoder.kind,
        deterministic=autoencoder.deterministic,
        parameters=sum(parameter.numel() for parameter in autoencoder.parameters()),
    )


@pytest.fixture(scope="module", params=SETTINGS)
def explored(request: pytest.FixtureRequest) -> Explored:
    return opened(request.param)


@pytest.fixture(scope="module")
def kl() -> Explored:
    return opened("wavelet")


def test_the_stages_are_the_whole_autoencoder(explored: Explored) -> None:
    stages = stages_of(explored)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert (names[0], names[-1]) == ("input", "output")
    decoder = names.index("decoder-1") if "decoder-1" in names else names.index("output")
    assert names.index("encoder-1") < names.index("mu") < names.index("sigma") < names.index("sample") < decoder
    assert sum(stage.parameters for stage in stages) == explored.parameters
    cost = sum(coding_gigamacs(explored.autoencoder, 32, torch.device("cpu")))
    assert sum(stage.gmacs for stage in stages) == pytest.approx(cost, rel=1e-6)
    assert stages[0].shape_out == (3, 32, 32)
    assert all(stage.title and stage.what.endswith(".") for stage in stages)
    if explored.mean.shape[-1] > 1:  # a vector is reshaped between layers
        own = [stage for stage in stages if stage.name not in ("mu", "sigma", "sample")]
        for before, after in itertools.pairwise(own):
            joined = after is stages[decoder]
            assert after.shape_in == (tuple(explored.mean.shape[1:]) if joined else before.shape_out)


def test_every_stage_shows_what_it_gave(explored: Explored) -> None:
    for stage in stages_of(explored):
        found = measure_activation(explored, 1, stage.name)
        assert found.stage == stage.name
        expected = (3, 32, 32) if stage.name == "output" else stage.shape_out
        assert found.shape == expected
        assert found.minimum <= found.mean <= found.maximum
        assert found.mosaic.dtype == np.uint8
        assert found.mosaic.shape[2:] == ((3,) if stage.name in ("input", "output") else ())


@pytest.mark.parametrize("name", FOREIGN)
def test_autoencoders_of_others_are_shown_as_far_as_they_are_known(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    FOREIGN[name][0]().save_pretrained(tmp_path)
    explored = around(load_autoencoder(tmp_path))
    test_the_stages_are_the_whole_autoencoder(explored)
    test_every_stage_shows_what_it_gave(explored)


def test_a_frozen_encoder_is_one_stage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(vision).save_pretrained(tmp_path)
    config = AutoencoderConfig(preset="pico", kind="frozen", encoder=str(tmp_path), residual_channels=2)
    explored = around(build_autoencoder(config))
    test_every_stage_shows_what_it_gave(explored)
    stages = stages_of(explored)
    assert sum(stage.parameters for stage in stages) == explored.parameters
    assert [stage.shape_out for stage in stages[1:3]] == [(16, 2, 2), (2, 2, 2)]


def test_an_activation_is_that_of_the_module(kl: Explored) -> None:
    image = transforms.from_uint8(kl.images[2:3])
    expected = []
    hook = kl.autoencoder.encoder.stages[1].register_forward_hook(lambda *call: expected.append(call[2]))
    kl.autoencoder.encode_moments(image)
    hook.remove()
    found = measure_activation(kl, 2, "encoder-2")
    assert found.mean == pytest.approx(float(expected[0].mean()), abs=1e-6)
    assert found.maximum == pytest.approx(float(expected[0].max()), abs=1e-5)
    tile = expected[0][0, 0]
    gray = ((tile - tile.min()) / (tile.max() - tile.min()) * 255).round().numpy()
    assert np.abs(found.mosaic[:48:12, :48:12].astype(int) - gray).max() <= 1  # 4 x 4, each 12 times as large
    assert not any(module._forward_hooks for module in kl.autoencoder.modules())


def test_beside_a_linear_code_the_moments_are_still_what_the_latent_is() -> None:
    linear = opened("linear")
    tile = linear.mean[1, 0]
    gray = ((tile - tile.min()) / (tile.max() - tile.min()) * 255).round().numpy()
    shown = measure_activation(linear, 1, "moments").mosaic[:48:12, :48:12]  # 4 x 4, each 12 times as large
    assert np.abs(shown.astype(int) - gray).max() <= 1
    texts = {stage.name: stage.what for stage in stages_of(linear)}
    for name in ("encoder-1", "decoder-1"):
        assert texts[name].startswith("The linear code of 8 x 8 blocks")


def test_noise_matters_from_the_sample_on(kl: Explored) -> None:
    for stage in ("input", "encoder-1", "moments", "mu", "sigma"):
        assert np.array_equal(
            measure_activation(kl, 0, stage, 3.0, 1).mosaic, measure_activation(kl, 0, stage, sample=False).mosaic
        )
    for stage in ("sample", "decoder-1", "output"):
        assert not np.array_equal(
            measure_activation(kl, 0, stage, 3.0).mosaic, measure_activation(kl, 0, stage, sample=False).mosaic
        )
    assert np.array_equal(
        measure_activation(kl, 0, "sample", sample=False).mosaic, measure_activation(kl, 0, "mu").mosaic
    )
    output = measure_activation(kl, 0, "output", 2.0, 5).mosaic
    assert np.array_equal(output.transpose(2, 0, 1), edited_reconstruction(kl, 0, 2.0, seed=5))
    assert np.array_equal(measure_activation(kl, 0, "input").mosaic.transpose(2, 0, 1), kl.images[0])


def test_a_deterministic_autoencoder_says_that_it_has_no_sigma() -> None:
    plain = opened("plain")
    stages = {stage.name: stage for stage in stages_of(plain)}
    assert stages["sigma"].what.startswith("None: ")
    assert "mu itself" in stages["sample"].what
    assert measure_activation(plain, 0, "sigma").maximum == 0
    assert np.array_equal(
        measure_activation(plain, 0, "output", 3.0).mosaic, measure_activation(plain, 0, "output", 0.0).mosaic
    )


def test_numbers_without_positions_are_told_apart() -> None:
    vector = opened("vector")
    for stage in ("moments", "encoder-4", "decoder-1"):
        assert len(np.unique(measure_activation(vector, 0, stage).mosaic)) > 2


def test_codes_are_what_the_decoder_sees() -> None:
    codes = opened("codes")
    found = measure_activation(codes, 0, "sample")
    latents = codes.autoencoder.quantize(codes.mean[:1]).latents
    assert found.maximum == pytest.approx(float(latents.max()))
    assert {stage.name: stage for stage in stages_of(codes)}["sample"].what.startswith("mu rounded")


def test_codes_of_diffusers_are_what_the_decoder_sees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    FOREIGN["VQModel"][0]().save_pretrained(tmp_path)
    codes = around(load_autoencoder(tmp_path))
    found = measure_activation(codes, 0, "sample")
    book = codes.autoencoder.quantize.embedding.weight
    assert min(abs(float(value) - found.maximum) for value in book.flatten()) < 1e-6
    assert found.maximum != pytest.approx(measure_activation(codes, 0, "mu").maximum, abs=1e-6)


def test_an_unknown_stage_is_refused(kl: Explored) -> None:
    with pytest.raises(UserError, match="stage: 'encoder-9' is none"):
        measure_activation(kl, 0, "encoder-9")


def test_a_mosaic_shows_up_to_64_channels_side_by_side() -> None:
    assert mosaic(torch.tensor([0.0, 0.5, 1.0])).shape == (48, 3 * 48 + 2 * 2)
    channels = torch.arange(5).view(5, 1, 1) / 4 * torch.ones(5, 16, 16)
    sheet = mosaic(channels)
    assert sheet.shape == (2 * 48 + 2, 3 * 48 + 2 * 2)
    assert [int(sheet[row * 50 + 5, column * 50 + 5]) for row, column in ((0, 0), (0, 2), (1, 0), (1, 1))] == [
        0, 128, 191, 255,
    ]  # fmt: skip
    assert mosaic(torch.rand(8, 48, 48)).shape == (2 * 50 - 2, 4 * 50 - 2)
    assert mosaic(torch.rand(100, 48, 48)).shape == (8 * 50 - 2, 8 * 50 - 2)
    assert mosaic(torch.rand(4, 512, 256)).shape == (192, 4 * 96 + 3 * 2)
