from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae import cli
from ldm_vae import config as configuration
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.data.samples import evenly_spaced
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.split import Part, in_part, part_of
from ldm_vae.errors import UserError
from ldm_vae.evaluation.reconstruction import EvaluateConfig, evaluate, latent_colors


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


def test_the_table_has_both_decodings_and_every_baseline_the_linear_one_last(results: dict[str, Any]) -> None:
    assert [row["name"] for row in results["rows"]] == [
        "decode(mean)",
        "decode(sample)",
        "bicubic 8x",
        "JPEG, equal bytes",
        "WebP, equal bytes",
        "block KLT, 3 components",
    ]
    for row in results["rows"]:
        assert list(row["metrics"]) == ["psnr", "ssim", "ssim_luma", "sharpness"]
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


@pytest.mark.parametrize("part", ["validation", "test"])
def test_one_half_of_the_held_out_images_is_measured_and_recorded(
    part: Part, config: EvaluateConfig, results: dict[str, Any], tmp_path: Path
) -> None:
    half = evaluate(dataclasses.replace(config, part=part, codecs=[], output=str(tmp_path / part)))
    ids = [image["id"] for image in half["images"]]
    assert ids == [image["id"] for image in results["images"] if in_part(image["id"], part, 0.3)]
    assert 0 < len(ids) < len(results["images"])
    assert half["protocol"]["images"]["part"] == part
    assert half["protocol"]["baseline"]["fitted_on"] == results["protocol"]["baseline"]["fitted_on"]


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


def test_differences_are_paired_with_wilcoxons_p(results: dict[str, Any]) -> None:
    from scipy.stats import wilcoxon

    assert [d["baseline"] for d in results["differences"]] == [row["name"] for row in results["rows"][1:]]
    images = results["images"]
    for difference in results["differences"]:
        coded = difference["baseline"].endswith("equal bytes")  # the rate carries a sample, not the mean
        assert difference["row"] == ("decode(sample)" if coded else "decode(mean)")
        values = np.array([i[difference["row"]]["ssim"] - i[difference["baseline"]]["ssim"] for i in images])
        found = difference["metrics"]["ssim"]
        assert found["mean"] == pytest.approx(values.mean())
        assert found["low"] <= found["mean"] <= found["high"]
        assert found["wilcoxon_p"] == pytest.approx(float(wilcoxon(values).pvalue))


def test_codecs_get_each_images_own_rate_and_say_what_they_used(results: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in results["rows"]}
    for name in ("JPEG, equal bytes", "WebP, equal bytes"):
        files = [image[name] for image in results["images"]]
        assert rows[name]["bits_per_pixel"] == pytest.approx(np.mean([f["bytes"] * 8 / 64**2 for f in files]))
        assert rows[name]["over_budget"] == sum(not file["within_budget"] for file in files)
        for image in results["images"]:
            budget = image["nats_per_dim"] / np.log(2) * 3 * 64 / 8
            small, large = image[name]["files"]
            assert image[name]["within_budget"] == (small <= budget)
            filled = small < large
            assert image[name]["bytes"] == pytest.approx(budget if filled else small)
        filled = [f for f in files if f["files"][0] < f["files"][1]]
        assert rows[name]["below_budget"] + rows[name]["over_budget"] + len(filled) == len(files)
    # a JPEG header alone is larger than what this tiny untrained autoencoder spends
    assert rows["JPEG, equal bytes"]["over_budget"] == len(results["images"])
    assert rows["decode(mean)"]["bits_per_pixel"] == results["rate"]["bits_per_pixel"]
    assert rows["bicubic 8x"]["bits_per_pixel"] is None
    assert "own rate" in results["equal_bytes"]


def test_a_given_budget_is_the_codecs_budget(config: EvaluateConfig, tmp_path: Path) -> None:
    results = evaluate(
        replace(config, equal_bytes_bits_per_pixel=2.5, codecs=["JPEG"], count=2, output=str(tmp_path / "out"))
    )
    row = results["rows"][3]
    assert row["name"] == "JPEG, equal bytes"
    assert row["over_budget"] == 0
    assert row["bits_per_pixel"] == pytest.approx(2.5)
    assert row["below_budget"] == 0
    assert "each image has 2.5 bits per pixel" in (tmp_path / "out" / "results.md").read_text()


def test_a_budget_above_the_highest_quality_is_not_filled_and_it_is_said(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    results = evaluate(
        replace(config, equal_bytes_bits_per_pixel=300.0, codecs=["JPEG"], count=2, output=str(tmp_path / "out"))
    )
    assert (results["rows"][3]["below_budget"], results["rows"][3]["over_budget"]) == (2, 0)
    assert results["rows"][3]["bits_per_pixel"] < 300
    assert "2 of 2 images take fewer bytes even at the highest" in (tmp_path / "out" / "results.md").read_text()


def test_enlarged_images_are_counted_and_said(
    config: EvaluateConfig, results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "enlarged" not in results
    large = evaluate(replace(config, resolution=128, count=3, codecs=[], output=str(tmp_path / "out")))
    assert large["enlarged"] == [{"id": image["id"], "short_side": 80} for image in large["images"]]
    sentence = "3 of 3 images are smaller than the crop and enlarged, which blurs them and hides errors."
    assert capsys.readouterr().out.count(sentence) == 1
    assert (tmp_path / "out" / "results.md").read_text().count(sentence) == 1
    evaluate(replace(config, resolution=128, count=3, codecs=[], output=str(tmp_path / "out")))
    assert capsys.readouterr().out.count(sentence) == 1  # of a finished result as well


@pytest.mark.parametrize(("kind", "codec_rows"), [("ae", 0), ("vq", 1)])
def test_a_deterministic_autoencoder_has_no_sample_and_no_kl_rate(
    config: EvaluateConfig, tmp_path: Path, kind: Any, codec_rows: int
) -> None:
    torch.manual_seed(0)
    codes = {"codebook_size": 64} if kind == "vq" else {}
    model = build_autoencoder(AutoencoderConfig(preset="pico", kind=kind, **codes))
    model.save_pretrained(tmp_path / "model")
    settings = {"autoencoder": str(tmp_path / "model"), "codecs": ["WebP"], "count": 2}
    results = evaluate(replace(config, **settings, output=str(tmp_path / "out")))
    names = [row["name"] for row in results["rows"]]
    assert "decode(sample)" not in names
    assert names.count("WebP, equal bytes") == codec_rows
    assert results["images"][0]["nats_per_dim"] is None
    text = (tmp_path / "out" / "results.md").read_text()
    if kind == "vq":
        assert results["rate"]["bits_per_pixel"] == pytest.approx(np.log2(64) / 64)
    else:
        assert results["rate"]["bits_per_pixel"] is None
        assert "no rate to be equal to; give equal_bytes_bits_per_pixel" in text
    assert "| decode(mean) |" in text


def test_two_processes_give_the_result_of_one(config: EvaluateConfig, results: dict[str, Any], tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    settings = replace(config, output=str(tmp_path / "two"), processes=2, batch=2)
    (tmp_path / "settings.yaml").write_text(configuration.to_yaml(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(root / "scripts" / "evaluate.py"), str(tmp_path / "settings.yaml")],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| decode(mean) |") == 1
    one = evaluate(replace(config, output=str(tmp_path / "one"), batch=2))
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    changes = configuration.changed_keys(json.loads(json.dumps(one)), two)
    numbers = {key: pair for key, pair in changes.items() if isinstance(pair[0], float)}
    edited = {"protocol.versions.commit"}  # somebody works on the checkout meanwhile
    assert changes.keys() - numbers.keys() - edited == {"config.output", "config.processes"}
    assert all(a == pytest.approx(b, rel=1e-6) for a, b in numbers.values())
    assert [image["id"] for image in two["images"]] == [image["id"] for image in results["images"]]
    assert (tmp_path / "one" / "grid.png").read_bytes() == (tmp_path / "two" / "grid.png").read_bytes()


def test_another_number_of_processes_than_asked_for_is_refused(
    config: EvaluateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"autoencoder={config.autoencoder}", "output=x", "data.source=folder", f"data.path={config.data.path}"]
    assert cli.main(["evaluate", *words, "processes=2"]) == 2
    assert "processes: 2 were asked for, 1 started" in capsys.readouterr().err


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
    assert "decode(sample) minus JPEG, equal bytes" in text
    assert "images over the budget even at the lowest quality" in text
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


def test_no_readable_image_is_one_sentence(config: EvaluateConfig, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(24):
        (images / f"{number}.png").write_bytes(b"no image")
    for part in ("held_out", "all"):
        broken = replace(config, part=part, data=replace(config.data, path=str(images)), output=str(tmp_path / part))
        with pytest.raises(UserError, match=r"none of the \d+ images can be read \(unknown format, for example"):
            evaluate(broken)


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
        ({"resolution": 66}, "resolution: 66 is not a multiple of 8; use 64"),
        ({"device": "toaster"}, "device: 'toaster' is not available"),
        ({"autoencoder": "./nowhere"}, "no such folder"),
    ],
)
def test_impossible_settings_are_refused(config: EvaluateConfig, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        evaluate(replace(config, **settings))


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(UserError, match="has no effect without perceptual_net"):
        EvaluateConfig(autoencoder="a", output="b", perceptual_weights="c.safetensors")
    with pytest.raises(UserError, match="has no effect without codecs"):
        EvaluateConfig(autoencoder="a", output="b", codecs=[], equal_bytes_bits_per_pixel=1.0)
    with pytest.raises(UserError, match="'GIF' cannot be written here; choose among JPEG"):
        EvaluateConfig(autoencoder="a", output="b", codecs=["GIF"])
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
    assert evenly_spaced(5, None) == [0, 1, 2, 3, 4]
    assert evenly_spaced(101, 5) == [0, 25, 50, 75, 100]
    assert evenly_spaced(3, 10) == [0, 1, 2]


@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_latent_colors_show_any_number_of_channels(channels: int) -> None:
    latent = torch.randn(channels, 12, 10, generator=torch.Generator().manual_seed(0))
    colors = latent_colors(latent)
    assert colors.shape == (3, 12, 10)
    assert colors.abs().max() <= 1
    assert colors.std() > 0.3
    assert latent_colors(torch.zeros(channels, 4, 4)).isfinite().all()
