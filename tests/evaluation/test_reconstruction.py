from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae import cli
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.split import part_of
from ldm_vae.errors import UserError
from ldm_vae.evaluation.examples import latent_colours
from ldm_vae.evaluation.reconstruction import EvaluateConfig, evaluate, spread


def save_autoencoder(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    build_autoencoder(AutoencoderConfig("sd", "tiny", latent_channels=3)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> EvaluateConfig:
    return EvaluateConfig(
        autoencoder=str(save_autoencoder(tmp_path_factory.mktemp("autoencoder"))),
        output=str(tmp_path_factory.mktemp("results") / "evaluation"),
        data=DataConfig(source="folder", path=str(image_folder), held_out=0.3),
        resolution=64,
        examples=2,
        device="cpu",
    )


@pytest.fixture(scope="module")
def results(config: EvaluateConfig) -> dict[str, Any]:
    return evaluate(config)


def test_the_table_has_both_decodings_and_the_linear_baseline(results: dict[str, Any]) -> None:
    assert [row["name"] for row in results["rows"]] == [
        "decode(mean)",
        "decode(sample)",
        "block KLT, 3 components",
    ]
    for row in results["rows"]:
        assert list(row["metrics"]) == ["psnr", "ssim", "sharpness"]
        for value in row["metrics"].values():
            assert value["low"] <= value["mean"] <= value["high"]


def test_only_held_out_images_are_measured_and_the_baseline_never_saw_them(
    config: EvaluateConfig, results: dict[str, Any]
) -> None:
    ids = [image["id"] for image in results["images"]]
    assert ids
    assert all(part_of(name, 0.3) == "held_out" for name in ids)
    protocol = results["protocol"]
    assert protocol["images"]["count"] == len(ids)
    assert protocol["baseline"]["fitted_on"]["count"] == 24 - len(ids)
    assert protocol["baseline"]["fitted_on"]["fingerprint"] != protocol["images"]["fingerprint"]


def test_means_rates_and_gain_follow_from_the_images(results: dict[str, Any]) -> None:
    images = results["images"]
    for row in results["rows"]:
        expected = np.mean([image[row["name"]]["psnr"] for image in images])
        assert row["metrics"]["psnr"]["mean"] == pytest.approx(expected)
    gains = [image["decode(mean)"]["psnr"] - image["block KLT, 3 components"]["psnr"] for image in images]
    assert results["gain_over_linear_db"]["mean"] == pytest.approx(np.mean(gains))
    rate = results["rate"]
    assert rate["nats_per_dim"] == pytest.approx(np.mean([image["nats_per_dim"] for image in images]))
    assert rate["bits_per_dim"] == pytest.approx(rate["nats_per_dim"] / np.log(2))
    assert rate["bits_per_pixel"] == pytest.approx(rate["bits_per_dim"] * 3 / 64)


def test_the_saved_8_bit_pictures_have_the_reported_psnr(config: EvaluateConfig, results: dict[str, Any]) -> None:
    by_id = {image["id"]: image for image in results["images"]}
    folder = Path(config.output) / "examples"
    assert len(results["examples"]) == 2
    for example in results["examples"]:
        original, decoded, linear, difference = (
            np.asarray(Image.open(folder / example["files"][name]), np.float64)
            for name in ("original", "decoded", "linear", "difference")
        )
        for picture, row in ((decoded, "decode(mean)"), (linear, "block KLT, 3 components")):
            psnr = 10 * np.log10(255**2 / np.mean((picture - original) ** 2))
            assert by_id[example["id"]][row]["psnr"] == pytest.approx(psnr, abs=1e-3)
        expected = np.clip(127.5 + 8 * (decoded - original), 0, 255)
        np.testing.assert_allclose(difference, expected, atol=0.51)
        assert Image.open(folder / example["files"]["latent"]).size == (8, 8)


def test_the_folder_holds_a_readable_table_a_grid_and_the_record(
    config: EvaluateConfig, results: dict[str, Any]
) -> None:
    output = Path(config.output)
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    text = (output / "results.md").read_text()
    assert "| decode(mean) |" in text
    assert "bits per latent dimension" in text
    assert Image.open(output / "grid.png").size == (3 * 64 + 2 * 8, 2 * 64 + 8)
    assert json.loads((output / "run.json").read_text())["finished"] is True


def test_the_figures_do_not_depend_on_the_batch(
    config: EvaluateConfig, results: dict[str, Any], tmp_path: Path
) -> None:
    other = evaluate(replace(config, batch=1, output=str(tmp_path / "other")))
    for one, two in zip(results["images"], other["images"]):
        assert one["decode(sample)"]["psnr"] == pytest.approx(two["decode(sample)"]["psnr"], abs=1e-2)


def test_a_finished_result_is_read_not_redone(config: EvaluateConfig, results: dict[str, Any]) -> None:
    before = (Path(config.output) / "results.json").stat().st_mtime_ns
    assert evaluate(replace(config, batch=2)) == json.loads(json.dumps(results))
    assert (Path(config.output) / "results.json").stat().st_mtime_ns == before


@pytest.mark.usefixtures("results")
def test_other_settings_and_other_weights_do_not_replace_a_result(config: EvaluateConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resolution \(64 -> 72\).*--overwrite"):
        evaluate(replace(config, resolution=72))
    copy = tmp_path / "copy"
    shutil.copytree(config.output, copy)
    folder = tmp_path / "autoencoder"
    shutil.copytree(config.autoencoder, folder)
    moved = replace(config, output=str(copy), autoencoder=str(folder))
    record = json.loads((copy / "results.json").read_text())
    record["config"]["autoencoder"] = str(folder)
    (copy / "results.json").write_text(json.dumps(record))
    evaluate(moved)
    save_autoencoder(folder, seed=1)
    with pytest.raises(UserError, match="autoencoder fingerprint"):
        evaluate(moved)
    again = evaluate(replace(moved, examples=1), overwrite=True)
    assert again["autoencoder"]["fingerprint"] != record["autoencoder"]["fingerprint"]
    assert {path.name[:2] for path in (copy / "examples").iterdir()} == {"00"}


def test_a_training_run_is_not_overwritten_by_a_result(config: EvaluateConfig, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="holds another run"):
        evaluate(replace(config, output=str(tmp_path)), overwrite=True)


def test_broken_images_are_listed_and_left_out(config: EvaluateConfig, image_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    for path in sorted(image_folder.glob("a/*.png"))[:3]:
        shutil.copy(path, images / "a")
    (images / "a" / "broken.png").write_bytes(b"not a picture")
    settings = replace(config.data, path=str(images))
    output = str(tmp_path / "out")
    results = evaluate(replace(config, data=settings, part="all", count=None, output=output))
    assert [item["id"] for item in results["rejected"]] == ["a/broken.png"]
    assert len(results["images"]) == 3


def test_lpips_is_measured_with_local_weights(config: EvaluateConfig, random_backbone: Path, tmp_path: Path) -> None:
    results = evaluate(
        replace(
            config,
            perceptual_net="squeeze",
            perceptual_weights=str(random_backbone),
            count=2,
            output=str(tmp_path / "out"),
        )
    )
    assert results["rows"][0]["metrics"]["lpips"]["mean"] > 0
    assert results["protocol"]["lpips"] == "squeeze"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"resolution": 66}, "resolution: 66 is no multiple of 8; use 64"),
        ({"device": "toaster"}, "device: 'toaster' is no device"),
        ({"autoencoder": "./nowhere"}, "no such directory"),
    ],
)
def test_impossible_settings_are_refused(config: EvaluateConfig, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        evaluate(replace(config, **settings))


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(UserError, match="has no effect without perceptual_net"):
        EvaluateConfig(autoencoder="a", output="b", perceptual_weights="c.safetensors")
    with pytest.raises(UserError, match="count: 0"):
        EvaluateConfig(autoencoder="a", output="b", count=0)


def test_the_command_ends_with_the_table_or_with_one_line(
    config: EvaluateConfig, results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        f"autoencoder={config.autoencoder}",
        f"output={config.output}",
        "data.source=folder",
        f"data.path={config.data.path}",
        "data.held_out=0.3",
        "resolution=64",
        "examples=2",
    ]
    assert cli.main(words) == 0
    assert "| decode(mean) |" in capsys.readouterr().out
    assert cli.main(["evaluate", "output=x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "autoencoder is required" in error


def test_chosen_images_are_spread_evenly() -> None:
    assert spread(5, None) == [0, 1, 2, 3, 4]
    assert spread(101, 5) == [0, 25, 50, 75, 100]
    assert spread(3, 10) == [0, 1, 2]


@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_latent_colours_show_any_number_of_channels(channels: int) -> None:
    latent = torch.randn(channels, 12, 10, generator=torch.Generator().manual_seed(0))
    colours = latent_colours(latent)
    assert colours.shape == (3, 12, 10)
    assert colours.abs().max() <= 1
    assert colours.std() > 0.3
    assert latent_colours(torch.zeros(channels, 4, 4)).isfinite().all()
