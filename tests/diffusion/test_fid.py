from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_vae import runtime
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.data.sources import DataConfig
from ldm_vae.diffusion import fid
from ldm_vae.errors import UserError
from ldm_vae.evaluation.reconstruction import EvaluateConfig, evaluate


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network in the layout of the real weights: shows the path of the figures, not their worth."""
    runtime.repair_torchvision()
    from safetensors.torch import save_file
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Random(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            return None if not state_dict else super().load_state_dict(state_dict, *args, **kwargs)

    import io

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = Random("inception", ["2048"], feature_extractor_weights_path=empty)
    folder = tmp_path_factory.mktemp("inception")
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "inception.safetensors")
    torch.save(tensors, folder / "inception.pth")
    return folder / "inception.safetensors"


def naive_squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 4 of arXiv:1801.01401, term by term."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_squared_mmd_is_the_formula_and_torchmetrics() -> None:
    runtime.repair_torchvision()
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)), rng.normal(0.3, 1.2, size=(9, 5))
    assert fid.squared_mmd(x, y[:7]) == pytest.approx(naive_squared_mmd(x, y[:7]))
    assert fid.squared_mmd(x, y) == pytest.approx(float(poly_mmd(torch.tensor(x), torch.tensor(y))))
    with pytest.raises(ValueError, match="at least 2"):
        fid.squared_mmd(x, y[:1])


@pytest.mark.parametrize(("paired", "estimator"), [(False, "unbiased"), (True, "u-statistic")])
def test_squared_mmd_is_that_of_torch_fidelity(paired: bool, estimator: str) -> None:
    from torch_fidelity.metric_kid import kernel_poly, mmd2

    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(30, 6)), rng.normal(0.3, 1.2, size=(30, 6))
    settings = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    kernels = [kernel_poly(a, b, **settings) for a, b in ((x, x), (x, y), (y, y))]
    assert fid.squared_mmd(x, y, paired) == pytest.approx(mmd2(*kernels, mmd_est=estimator))


def test_a_copy_is_at_no_distance_from_its_originals() -> None:
    features = np.random.default_rng(5).normal(size=(80, 16))
    found = fid.compare_sets(features, features.copy(), "kid", subset_size=40, seed=0, paired=True)
    assert abs(found["kid"]["mean"]) < 1e-12
    assert found["kid_halves"] == found["kid_floor"]
    assert fid.squared_mmd(features, features) < -0.01  # the estimate for independent sets


def test_pairs_of_one_distribution_are_at_no_distance_on_average() -> None:
    """y[i] depends on x[i] and has the same distribution, so the distance is 0 and the estimate for independent sets,
    which knows nothing of the pairs, is wrong."""
    rng = np.random.default_rng(6)
    values: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(300):
        x = rng.normal(size=(40, 8))
        y = 0.8 * x + 0.6 * rng.normal(size=x.shape)
        for paired, found in values.items():
            found.append(fid.squared_mmd(x, y, paired))
    error = np.std(values[True]) / np.sqrt(300)
    assert abs(np.mean(values[True])) < 3 * error
    assert np.mean(values[False]) < -10 * error
    far = fid.squared_mmd(x, 1.5 * x, paired=True)
    assert far > 10 * np.std(values[True])
    with pytest.raises(ValueError, match="give the same number of each for pairs"):
        fid.squared_mmd(x, x[:7], paired=True)


def test_squared_mmd_of_equal_distributions_is_zero_on_average() -> None:
    rng = np.random.default_rng(1)
    values = [fid.squared_mmd(rng.normal(size=(40, 8)), rng.normal(size=(40, 8))) for _ in range(300)]
    assert min(values) < 0  # unbiased, so some are below 0
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    shifted = [fid.squared_mmd(rng.normal(size=(40, 8)), rng.normal(0.5, 1, size=(40, 8))) for _ in range(20)]
    assert min(shifted) > 10 * abs(np.mean(values))


def test_kid_is_the_mean_over_subsets_and_repeats() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(60, 6)), rng.normal(0.4, 1, size=(60, 6))
    found = fid.kid(x, y, subset_size=20, subsets=200)
    assert found == fid.kid(x, y, subset_size=20, subsets=200)
    assert found.mean == pytest.approx(fid.squared_mmd(x, y), abs=4 * found.std / np.sqrt(200) + 0.1)
    assert found.std > 0


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    # commuting covariances: |m - n|^2 + sum (sqrt a - sqrt b)^2
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0])
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    means = np.zeros(3), np.array([1.0, 2.0, 2.0])
    covariances = [(rotation * values) @ rotation.T for values in (a, b)]
    expected = 9.0 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert fid.frechet_distance(means[0], covariances[0], means[1], covariances[1]) == pytest.approx(expected)
    assert fid.frechet_distance(means[0], covariances[0], means[0], covariances[0]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_features_agrees_with_scipys_matrix_root() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(1, 2, size=(40, 6))
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cx + cy - 2 * sqrtm(cx @ cy).real)
    assert fid.frechet_of_features(x, y) == pytest.approx(expected)
    few = x[:4]  # rank-deficient: the short way agrees with the covariances
    covariances = fid.frechet_distance(few.mean(0), np.cov(few, rowvar=False), y.mean(0), cy)
    assert fid.frechet_of_features(few, y) == pytest.approx(covariances)
    assert fid.frechet_of_features(few, few) == pytest.approx(0, abs=1e-9)


def test_fid_of_few_images_is_refused_unless_forced() -> None:
    with pytest.raises(UserError, match=r"FID of 4999 images would mislead.*5000 images or more.*fid=force"):
        fid.check_distribution("fid", "refuse", None, 4999)
    fid.check_distribution("fid", "refuse", None, 5000)
    fid.check_distribution("fid", "force", None, 20)
    with pytest.raises(UserError, match="fid: force has no effect with distribution=kid"):
        EvaluateConfig(autoencoder="a", output="b", distribution="kid", fid="force")
    with pytest.raises(UserError, match="inception_weights: has no effect"):
        EvaluateConfig(autoencoder="a", output="b", inception_weights="x.pth")
    with pytest.raises(UserError, match="3 images are too few"):
        fid.check_distribution("kid", "refuse", None, 3)


def test_missing_and_wrong_weights_are_refused_with_both_ways(
    tmp_path: Path, random_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"no such file; give a local file .* or leave it out"):
        fid.load_inception(str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match="is not the Inception of FID"):
        fid.load_inception(str(random_backbone))
    (tmp_path / "bad.pth").write_bytes(b"no tensors here")
    with pytest.raises(UserError, match="cannot be read as tensors"):
        fid.load_inception(str(tmp_path / "bad.pth"))

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be downloaded \(no network\).*inception_weights=FILE"):
        fid.load_inception(None)


class Payload:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_a_file_that_holds_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot be read as tensors"):
        fid.load_inception(str(tmp_path / "evil.pth"))
    assert "executed" not in capsys.readouterr().out


def test_both_file_formats_give_the_same_network_and_ranges_are_right(inception_file: Path) -> None:
    one = fid.load_inception(str(inception_file))
    two = fid.load_inception(str(inception_file.with_suffix(".pth")))
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = fid.inception_features(one, images)
    assert found.shape == (1, 2048)
    np.testing.assert_array_equal(found, fid.inception_features(two, images))
    as_bytes = ((images + 1) * 127.5).round().to(torch.uint8)  # the network takes 0..255, not [-1, 1]
    np.testing.assert_array_equal(found, one(as_bytes)[0].numpy())


def test_evaluate_prints_kid_and_a_forced_fid_with_n_and_floor(
    inception_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    build_autoencoder(AutoencoderConfig("sd", "tiny", latent_channels=3)).save_pretrained(tmp_path / "model")
    config = EvaluateConfig(
        autoencoder=str(tmp_path / "model"),
        output=str(tmp_path / "out"),
        data=DataConfig(source="folder", path=str(image_folder)),
        part="all", resolution=64, count=4, examples=1, codecs=[], device="cpu",
        distribution="fid", inception_weights=str(inception_file),
    )  # fmt: skip
    with pytest.raises(UserError, match="FID of 4 images would mislead"):
        evaluate(config)
    results = evaluate(replace(config, fid="force"))
    found = results["distribution"]
    assert (found["images"], found["fid"]["images"], found["fid_floor"]["images"]) == (4, 4, 2)
    assert found["fid"]["value"] > 0
    text = (tmp_path / "out" / "results.md").read_text()
    assert "N = 4" in text
    assert "rFID@4" in text
    assert "compare it with nothing" in text
    assert "halves of 2: originals against reconstructions" in text
