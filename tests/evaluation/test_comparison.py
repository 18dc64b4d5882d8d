from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor, nn

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.klt import fit_klt
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.autoencoder.wavelet import AutoencoderWavelet
from ldm_vae.errors import UserError
from ldm_vae.evaluation import comparison
from ldm_vae.evaluation.comparison import CompareConfig, Kind, compare
from tests.evaluation.test_sweep import EVALUATE, RECIPE, InProcess


class Blocks(Autoencoder):
    """A lossless autoencoder without training: the latent is the 2x2 pixel-unshuffled image, exactly known."""

    config, dtype = SimpleNamespace(latent_channels=12, block_out_channels=(1, 1)), torch.float32

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        mean = self.gain * nn.functional.pixel_unshuffle(x, 2)
        return DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, -20.0)], dim=1))

    def image(self, z: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(z / self.gain, 2)


class Jumping(Blocks):
    """Decodes the nearer end only: the path stands still, jumps once, stands still."""

    def image(self, z: Tensor) -> Tensor:
        return super().image(torch.where(z < 0, -0.6 * torch.ones_like(z), 0.6 * torch.ones_like(z)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return (0.3 * torch.randn(6, 3, 32, 32, generator=rng)).clamp(-0.9, 0.9)


def test_a_cross_fade_is_known(images: Tensor) -> None:
    pair = images[:2]
    found = comparison.interpolation(Blocks(), pair)
    middle = pair.mean(0, keepdim=True)

    def contrast(x: Tensor) -> float:
        return float(x.diff(dim=-1).abs().sum() + x.diff(dim=-2).abs().sum())

    expected = contrast(middle) / (0.5 * (contrast(pair[:1]) + contrast(pair[1:])))
    assert found.midpoint_sharpness == pytest.approx(expected, abs=0.01)  # 8-bit rounding
    assert 1.0 <= found.unevenness < 2.0
    assert (found.pairs, found.distance) == (1, "1 - SSIM")


def test_a_path_that_jumps_once_has_the_highest_unevenness() -> None:
    ends = torch.stack([torch.full((3, 32, 32), -0.4), torch.full((3, 32, 32), 0.6)])
    assert comparison.interpolation(Jumping(), ends).unevenness == pytest.approx(8.0)


def test_pairs_do_not_overlap_and_one_image_is_too_few(images: Tensor) -> None:
    assert comparison.interpolation(Blocks(), images[:5]).pairs == 2
    with pytest.raises(ValueError, match="at least 2"):
        comparison.interpolation(Blocks(), images[:1])


def test_the_distance_is_lpips_where_it_is_given(images: Tensor, random_backbone: Path) -> None:
    from ldm_vae.autoencoder.losses import LPIPS

    large = nn.functional.interpolate(images[:2], size=64)
    found = comparison.interpolation(Blocks(), large, LPIPS("squeeze", str(random_backbone)))
    assert found.distance == "LPIPS"
    large = nn.functional.interpolate(images[:2], size=168)
    assert comparison.interpolation(Blocks(), large).distance == "1 - MS-SSIM"


def test_prior_samples_of_a_lossless_code_are_known() -> None:
    """White noise is its own prior: sampled latents give the statistics of the images, and every cycle closes."""
    images = (0.3 * torch.randn(8, 3, 160, 160, generator=torch.Generator().manual_seed(0))).clamp(-0.9, 0.9)
    klt = fit_klt([images])
    found = comparison.prior_samples(Blocks(), images, klt)
    assert found.cycle_error < 0.05
    assert found.cycle_error_real < 0.05
    assert found.frechet_reconstructions < 1e-3
    assert found.frechet < 0.05  # finitely many blocks: an estimate of equal distributions is not exactly 0
    assert found == comparison.prior_samples(Blocks(), images, klt)
    smooth = nn.functional.interpolate(images[..., ::8, ::8], size=160, mode="bicubic").clamp(-1, 1)
    structured = comparison.prior_samples(Blocks(), smooth, fit_klt([smooth]))
    assert structured.frechet > 0.3  # neighboring pixels agree, independent draws do not
    scaled = comparison.prior_samples(Blocks(gain=50.0), images, klt)
    assert scaled.cycle_error == pytest.approx(found.cycle_error, abs=0.01)  # in units of the latent's deviation


def test_block_frechet_is_zero_for_the_same_images_and_sees_a_shift(images: Tensor) -> None:
    klt = fit_klt([images])
    assert comparison.block_frechet(images, images, klt) == pytest.approx(0, abs=1e-9)
    shift = 0.05
    blocks = nn.functional.pixel_unshuffle(images, 8).permute(0, 2, 3, 1).reshape(-1, 192).double()
    basis = klt.components[:16]
    variance = torch.cov((blocks @ basis.T).T, correction=0).trace()
    expected = (basis @ torch.full((192,), shift, dtype=torch.float64)).square().sum() / variance
    assert comparison.block_frechet(images + shift, images, klt) == pytest.approx(float(expected), rel=1e-4)


def test_gigamacs_of_the_small_presets_are_those_of_the_documentation() -> None:
    model: AutoencoderWavelet = build_autoencoder(AutoencoderConfig(preset="pico")).eval()
    encode, decode = comparison.coding_gigamacs(model, 128, torch.device("cpu"))
    assert (16 * encode, 16 * decode) == (pytest.approx(2.5, abs=0.06), pytest.approx(5.7, abs=0.06))


def test_codes_are_counted(images: Tensor) -> None:
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(preset="pico", kind="vq", codebook_size=16)).eval()
    found = comparison.code_use(model, images)
    assert found is not None
    assert (found["codes"], found["positions"]) == (16, 6 * 16)
    assert 1 <= found["perplexity"] <= 16
    assert 0 <= found["dead_share"] < 1
    assert comparison.code_use(build_autoencoder(AutoencoderConfig(preset="pico")), images) is None


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    folder = tmp_path_factory.mktemp("compare")
    (folder / "vae.yaml").write_text(RECIPE)
    return CompareConfig(
        output=str(folder / "out"),
        vae=str(folder / "vae.yaml"),
        kinds=[Kind("kl", ["rate.target_nats=2"]), Kind("wide", ["autoencoder.latent_channels=8"])],
        steps=4,
        evaluate=[*EVALUATE, "count=4"],
        latent_images=2,
        macs_resolution=64,
    )


def test_kinds_are_trained_and_put_side_by_side(config: CompareConfig) -> None:
    run = InProcess()
    found = compare(config, run)
    assert [kind["name"] for kind in found["kinds"]] == ["kl", "wide"]
    assert run.names.count("train-vae") == 2
    assert [kind["latent_channels"] for kind in found["kinds"]] == [4, 8]
    root = Path(config.output)
    assert json.loads((root / "comparison.json").read_text()) == json.loads(json.dumps(found))
    text = (root / "comparison.md").read_text()
    assert "| kl |" in text
    assert "not comparable to the literature" in text
    assert (root / "index.html").read_text().count("data:image/webp;base64,") == 1
    grid = Image.open(root / "grid.png")
    assert grid.size == (3 * 64 + 2 * 8, 2 * 64 + 8)  # original and two kinds, two examples
    decoded = Image.open(next((root / "points" / "wide" / "evaluation" / "examples").glob("00_decoded.png")))
    assert grid.crop((144, 0, 208, 64)).tobytes() == decoded.tobytes()
    again = InProcess()
    kept = (root / "points" / "kl" / "latents.json").stat().st_mtime_ns
    assert compare(config, again)["kinds"] == found["kinds"]
    assert not {"train-vae", "evaluate"} & set(again.names)
    assert (root / "points" / "kl" / "latents.json").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_a_kind_that_fails_is_named_and_the_others_are_shown(config: CompareConfig, tmp_path: Path) -> None:
    inner = InProcess()

    def run(words: Any, log: Path) -> int:
        if "bad" in words[1]:
            log.write_text("ldm-vae train-vae: something is wrong\n")
            return 2
        return inner(words, log)

    kinds = [Kind("good"), Kind("bad")]
    found = compare(replace(config, kinds=kinds, output=str(tmp_path / "out")), run)
    assert [kind["name"] for kind in found["kinds"]] == ["good"]
    assert (
        "bad is missing (failed): exit code 2: ldm-vae train-vae: something is wrong"
        in (tmp_path / "out" / "comparison.md").read_text()
    )
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"] is False


@pytest.mark.slow
def test_every_default_kind_goes_through(config: CompareConfig, tmp_path: Path) -> None:
    found = compare(
        replace(config, kinds=CompareConfig(output="a", vae="b").kinds, output=str(tmp_path / "out")), InProcess()
    )
    assert found["missing"] == []
    kinds = {kind["name"]: kind for kind in found["kinds"]}
    assert kinds["ae"]["rate"]["bits_per_pixel"] is None
    assert kinds["vq"]["rate"]["bits_per_pixel"] == pytest.approx(10 / 64)
    assert kinds["fsq"]["latents"]["codes"]["codes"] == 1000


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kinds": []}, "give at least one"),
        ({"kinds": [Kind("a"), Kind("a")]}, "a name of its own"),
        ({"kinds": [Kind("../a")]}, "cannot be the name of a folder"),
        ({"latent_images": 1}, "an interpolation needs a pair"),
        ({"macs_resolution": 100}, "not a multiple of 64"),
        ({"steps": 0}, "steps: 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        CompareConfig(output="a", vae="b", **settings)
