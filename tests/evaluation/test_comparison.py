"""The comparison of kinds: its table, the cost of the networks, the use of codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.autoencoder.wavelet import AutoencoderWavelet
from ldm_vae.errors import UserError
from ldm_vae.evaluation import comparison
from ldm_vae.evaluation.comparison import CompareConfig, ComparedKind, compare
from tests.evaluation.test_sweep import EVALUATE, RECIPE, InProcess


@pytest.fixture(scope="module")
def images() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return (0.3 * torch.randn(6, 3, 32, 32, generator=rng)).clamp(-0.9, 0.9)


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
        kinds=[ComparedKind("kl", ["rate.target_nats=2"]), ComparedKind("wide", ["autoencoder.latent_channels=8"])],
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

    kinds = [ComparedKind("good"), ComparedKind("bad")]
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
        ({"kinds": [ComparedKind("a"), ComparedKind("a")]}, "a name of its own"),
        ({"kinds": [ComparedKind("../a")]}, "cannot be the name of a folder"),
        ({"latent_images": 1}, "an interpolation needs a pair"),
        ({"macs_resolution": 100}, "not a multiple of 64"),
        ({"steps": 0}, "steps: 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        CompareConfig(output="a", vae="b", **settings)
