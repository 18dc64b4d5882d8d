"""Directions of known latents: the probe finds the cause, the difference what goes along with it; PCA, SeFa."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_vae.applications.directions import fitting
from ldm_vae.applications.directions.attributes import Attribute
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from tests.latents.conftest import autoencoder_directory as autoencoder_directory  # a fixture

LABELED = ("difference", "probe")


def alike(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine."""
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.fixture(scope="module")
def confounded() -> tuple[np.ndarray, np.ndarray]:
    """Pooled latents (400, 3) and what causes them: channel 0 is y + u, channel 1 is u, channel 2 is noise."""
    y, u, noise = np.random.default_rng(0).standard_normal((3, 400))
    return np.stack([y + u, u, noise], axis=1), y


@pytest.mark.parametrize("binary", [False, True])
def test_the_probe_finds_what_tells_the_attribute_and_the_difference_what_goes_along(
    confounded: tuple[np.ndarray, np.ndarray], binary: bool
) -> None:
    pooled, y = confounded
    attribute = Attribute("y", (y > 0).astype(float) if binary else y, binary)
    difference, probe = fitting.labeled(pooled, attribute, LABELED)
    assert (difference.name, probe.name, probe.method) == ("y/difference", "y/probe", "probe")
    assert alike(difference.vector, np.array([1.0, 0.0, 0.0])) > 0.98
    weights = np.array([1 / np.sqrt(2), -1.0, 0.0]) if not binary else None
    assert probe.vector[0] > 0 > probe.vector[1]
    assert abs(probe.vector[2]) < 0.1 * abs(probe.vector[0])
    if weights is not None:
        deviation = pooled.std(axis=0)
        assert alike(probe.vector / deviation, np.array([deviation[0], -deviation[1], 0])) > 0.98
    assert probe.told["measure"] == ("AUROC" if binary else "R2")
    assert probe.told["value"] > 0.95


def test_an_attribute_that_latents_do_not_tell_scores_as_chance(confounded: tuple[np.ndarray, np.ndarray]) -> None:
    pooled, _ = confounded
    other = np.random.default_rng(1).standard_normal(len(pooled))
    assert fitting.labeled(pooled, Attribute("o", other, False), LABELED)[0].told["value"] < 0.05
    found = fitting.labeled(pooled, Attribute("o", (other > 0).astype(float), True), LABELED)[0].told["value"]
    assert found == pytest.approx(0.5, abs=0.08)


def test_a_strength_of_one_is_one_deviation(confounded: tuple[np.ndarray, np.ndarray]) -> None:
    pooled, y = confounded
    for direction in [
        *fitting.labeled(pooled, Attribute("y", y, False), LABELED),
        *fitting.unlabeled("pca", None, pooled, 3),
    ]:
        length = np.linalg.norm(direction.vector)
        assert (pooled @ direction.vector / length).std() == pytest.approx(length)


def test_unknown_values_do_not_count(confounded: tuple[np.ndarray, np.ndarray]) -> None:
    pooled, y = confounded
    values = y.copy()
    values[200:] = np.nan
    wrong = np.concatenate([pooled[:200], pooled[200:] * [-1, 1, 1]])
    assert fitting.labeled(wrong, Attribute("y", values, False), LABELED)[1].vector[0] > 0


def test_a_new_method_is_one_line(confounded: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    pooled, y = confounded
    monkeypatch.setitem(fitting.METHODS, "first", fitting.Method(lambda features, y, binary: np.eye(3)[0]))
    (found,) = fitting.labeled(pooled, Attribute("y", y, False), ["first"])
    assert (found.name, found.attribute, found.vector[1:].tolist()) == ("y/first", "y", [0, 0])


def test_principal_directions_are_ordered_and_share_the_variance() -> None:
    pooled = np.random.default_rng(0).standard_normal((500, 3)) * [1, 3, 2]
    first, second = fitting.unlabeled("pca", None, pooled, 2)
    assert abs(alike(first.vector, np.array([0.0, 1, 0]))) > 0.99
    assert abs(alike(second.vector, np.array([0.0, 0, 1]))) > 0.98
    assert first.told["value"] == pytest.approx(9 / 14, abs=0.05)
    assert (first.attribute, first.method) == (None, "pca")


def first_convolution(architecture: str) -> tuple[Autoencoder, nn.Conv2d, Tensor]:
    """A small autoencoder of 4 channels, the decoder's first convolution and the (4, 4) matrix before it."""
    torch.manual_seed(0)
    preset = {"wavelet": "pico", "sd": "tiny"}[architecture]
    autoencoder = build_autoencoder(AutoencoderConfig(architecture, preset, 4)).eval()  # type: ignore[arg-type]
    if architecture == "wavelet":
        return autoencoder, autoencoder.decoder.stages[0].resample, torch.eye(4)
    return autoencoder, autoencoder.decoder.conv_in, autoencoder.post_quant_conv.weight[:, :, 0, 0]


@pytest.mark.parametrize("architecture", ["wavelet", "sd"])
def test_sefa_sees_the_first_convolution_and_what_is_linear_before_it(architecture: str) -> None:
    """In closed form: an edit moves every position, so it meets the sum of the weight over its taps."""
    autoencoder, convolution, before = first_convolution(architecture)
    columns = (convolution.weight.sum(dim=(2, 3)) @ before).detach().double()
    expected = (columns.T @ columns).numpy()
    response = fitting.first_response(autoencoder)
    np.testing.assert_allclose(response.T @ response, expected, rtol=1e-4, atol=1e-5)
    found = fitting.unlabeled("sefa", autoencoder, np.random.default_rng(0).standard_normal((50, 4)), 2)
    _, vectors = np.linalg.eigh(expected)
    assert abs(alike(found[0].vector, vectors[:, -1])) > 0.9999
    assert found[0].told["value"] > found[1].told["value"]


def test_sefa_finds_what_a_constant_shift_changes_most() -> None:
    """Channel 0 has taps of one sign, channel 1 larger ones that cancel: an impulse would choose channel 1."""
    autoencoder, convolution, _ = first_convolution("wavelet")
    height, width = convolution.kernel_size
    assert height * width > 1
    signs = torch.ones(height, width).flatten()
    signs[1::2] = -1
    signs[-1] -= signs.sum()
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[:, 0] = 1.0
        convolution.weight[:, 1] = 5.0 * signs.view(height, width)
    (found,) = fitting.unlabeled("sefa", autoencoder, np.random.default_rng(0).standard_normal((50, 4)), 1)
    assert abs(alike(found.vector, np.eye(4)[0])) == pytest.approx(1, abs=1e-6)
    assert found.told["value"] == pytest.approx(1, abs=1e-6)
