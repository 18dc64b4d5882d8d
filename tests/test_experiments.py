"""`tools/experiments.py`: finished cells are skipped, others continued; tables say on how many seeds they stand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from ldm_vae.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR
from tools import experiment_measures as measures
from tools import experiments

TINY = [
    "seeds=1", "variants=[beta-0,1.0-nats]", "images=60", "vae_steps=12", "vae_batch=4", "unet_steps=12",
    "unet_batch=4", "unet_widths=[32,64]", "test_images=20", "generated=20", "sampling_steps=2", "reader_images=60",
    "reader_epochs=1", "reader_accuracy=0", "save_every=5",
]  # fmt: skip


def run(output: Path, backbone: Path, *words: str) -> int:
    return experiments.main(["beta", str(output), *TINY, f"perceptual_weights={backbone}", *words])


def figures(output: Path) -> dict[str, Any]:
    return {file.parent.name: json.loads(file.read_text())["figures"] for file in output.glob("*/result.json")}


@pytest.mark.slow
def test_a_run_that_is_stopped_and_continued_measures_what_a_straight_one_does(
    tmp_path: Path, random_backbone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, halting = tmp_path / "straight", tmp_path / "halting"
    assert run(straight, random_backbone) == 0
    found = figures(straight)
    assert set(found) == {"beta-0-seed0", "1.0-nats-seed0"}
    assert found["beta-0-seed0"] != found["1.0-nats-seed0"]
    assert all(value is None or math.isfinite(value) for one in found.values() for value in one.values())

    train, stopped = experiments.Bench.train, set()

    def stopped_once(self: Any, function: Any, settings: Any) -> None:
        """Each training is told to stop as soon as it listens when it is first called."""
        self.deadline = math.inf
        if settings.output not in stopped:
            stopped.add(settings.output)
            self.deadline = experiments.time.monotonic() + 0.01
        train(self, function, settings)

    monkeypatch.setattr(experiments.Bench, "train", stopped_once)
    capsys.readouterr()
    partial = []
    one = "variants=[1.0-nats]"
    while (code := run(halting, random_backbone, one)) == EXIT_INTERRUPTED:
        partial += [path.name for path in halting.glob("*/*/checkpoints/step-*") if "000000012" not in path.name]
        assert len(partial) < 40
    assert code == 0
    assert partial, "no training was stopped on its way"
    assert "0 of 1 cells are finished" in capsys.readouterr().out
    assert figures(halting) == {name: value for name, value in found.items() if name == "1.0-nats-seed0"}

    before = {file: file.stat().st_mtime_ns for file in halting.rglob("*.safetensors")}
    assert run(halting, random_backbone, one) == 0  # all there
    assert {file: file.stat().st_mtime_ns for file in halting.rglob("*.safetensors")} == before
    assert run(halting, random_backbone, one, "vae_steps=7") == EXIT_USER_ERROR
    assert "was begun with vae_steps=12, not 7" in capsys.readouterr().err
    assert experiments.main(["blur", str(halting), "--report"]) == EXIT_USER_ERROR


def test_nothing_is_begun_after_the_time_limit(tmp_path: Path, random_backbone: Path) -> None:
    assert run(tmp_path, random_backbone, "--time-limit", "0") == EXIT_INTERRUPTED
    assert list(tmp_path.glob("*/vae")) == []


def cell(folder: Path, variant: str, seed: int, **values: float | None) -> None:
    result = {"variant": variant, "seed": seed, "figures": values, "curves": {}, "versions": {}}
    experiments.write_json(folder / f"{variant}-seed{seed}" / "result.json", result)


def begun(folder: Path, **settings: Any) -> None:
    experiments.begin("beta", folder, experiments.ExperimentConfig(**settings))


def test_partial_results_say_how_many_seeds_they_stand_on(tmp_path: Path) -> None:
    begun(tmp_path)
    found = experiments.report(tmp_path, "beta")
    assert (found["finished"], found["planned"]) == (0, 15)
    assert "0 of 15 cells are finished." in (tmp_path / "results.md").read_text()
    for seed, (plain, other) in enumerate([(20.0, 19.0), (21.0, 19.5), (22.5, 21.0)]):
        (tmp_path / f"plain-seed{seed}").mkdir()
        cell(tmp_path, "plain", seed, psnr_mean=plain, nats_per_dim=None)
        if seed < 2:
            (tmp_path / f"2.5-nats-seed{seed}").mkdir()
            cell(tmp_path, "2.5-nats", seed, psnr_mean=other, nats_per_dim=2.5)
    (tmp_path / "1.0-nats-seed0").mkdir()
    cell(tmp_path, "1.0-nats", 0, psnr_mean=18.0)
    (tmp_path / "4.0-nats-seed0" / "vae").mkdir(parents=True)  # not finished: no result

    found = experiments.report(tmp_path, "beta")
    text = (tmp_path / "results.md").read_text()
    assert "6 of 15 cells are finished: plain n = 3, 1.0-nats n = 1, 2.5-nats n = 2 seeds." in text
    assert found["seeds"] == {"plain": [0, 1, 2], "1.0-nats": [0], "2.5-nats": [0, 1]}
    plain = found["measures"]["psnr_mean"]["plain"]
    values = np.array([20.0, 21.0, 22.5])
    expected = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert (plain["n"], plain["mean"]) == (3, pytest.approx(values.mean()))
    assert (plain["low"], plain["high"]) == pytest.approx(expected)
    difference = found["differences"]["psnr_mean"]["2.5-nats"]
    test = stats.ttest_rel([19.0, 19.5], [20.0, 21.0]).confidence_interval(0.95)
    assert (difference["n"], difference["mean"]) == (2, pytest.approx(-1.25))  # by seed, only of those that both have
    assert (difference["low"], difference["high"]) == pytest.approx((test.low, test.high))
    assert "| PSNR, decode(mean), dB | 21.17 [" in text
    assert "18.00 (1 seed)" in text
    assert "| KL, nats per latent dimension | – | – | 2.50 [2.50, 2.50] |" in text
    assert (tmp_path / "figure.svg").read_text().count("<svg") == 1


def test_all_variants_of_a_seed_come_before_the_next_seed() -> None:
    config = experiments.ExperimentConfig(seeds=2, variants=["4.0-nats", "plain"])
    names = [cell.name for cell in experiments.plan_cells(experiments.EXPERIMENTS["beta"], config)]
    assert names == ["plain-seed0", "4.0-nats-seed0", "plain-seed1", "4.0-nats-seed1"]


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_variant_is_a_setting_that_trains(name: str) -> None:
    from ldm_vae import TrainVaeConfig

    experiment = experiments.EXPERIMENTS[name]
    assert experiment.baseline in {variant.name for variant in experiment.variants}
    assert set(experiment.panels) <= {measure.key for measure in experiment.measures}
    for variant in experiment.variants:
        words = ["output=unused", *experiment.settings, *variant.settings]
        experiments.configuration.load(TrainVaeConfig, None, words)


def images(count: int = 6, side: int = 64) -> torch.Tensor:
    """Smooth surfaces with one bright square."""
    ramp = torch.linspace(-0.2, 0.2, side)
    picture = (ramp[:, None] + ramp).expand(count, 3, side, side).clone()
    picture[:, :, 20:40, 24:44] = 0.7
    return measures.rounded_to_8_bits(picture + torch.linspace(-0.1, 0.1, count).view(-1, 1, 1, 1))


def test_hatching_blur_and_grain_are_told_apart() -> None:
    real = images()
    same, _ = measures.spectrum_figures(real, real)
    assert same == {"fine_contrast_db": 0.0, "hatching_db": 0.0, "grain": 0.0}
    stripes = real.clone()
    stripes[..., ::4] += 2 / 127.5
    hatched, curves = measures.spectrum_figures(measures.rounded_to_8_bits(stripes), real)
    assert hatched["hatching_db"] > 6
    assert int(np.argmax(curves["rows_db"])) + 1 in (16, 32)  # a period of 4 pixels, and its harmonic
    assert max(curves["columns_db"]) < 1  # the stripes stand upright
    soft = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(real, (2,) * 4, mode="replicate"), 5, 1)
    blurred, _ = measures.spectrum_figures(measures.rounded_to_8_bits(soft), real)
    assert blurred["fine_contrast_db"] < -3
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0)) * 3 / 127.5
    grainy, _ = measures.spectrum_figures(measures.rounded_to_8_bits(real + noise), real)
    assert grainy["grain"] > 1 > abs(blurred["grain"])
    assert grainy["fine_contrast_db"] > 0


def test_latents_are_rounded_to_a_rate() -> None:
    latents = torch.randn(500, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    step = measures.rounding_step(latents, 16.0)
    assert measures.index_entropy(latents, step) == pytest.approx(16.0, abs=0.01)
    # of a Gaussian the entropy is about h - log2(step) for each channel (Cover & Thomas, theorem 8.3.1)
    assert 4 * (0.5 * math.log2(2 * math.pi * math.e) - math.log2(step)) == pytest.approx(16.0, abs=0.1)
    assert measures.index_entropy(torch.zeros(2, 4, 8, 8), 1.0) == 0
    with pytest.raises(experiments.UserError, match="less than 40 bits"):
        measures.rounding_step(latents[:2], 40.0)


def test_a_page_of_the_docs_takes_the_tables_and_keeps_its_own_words(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    page, picture = tmp_path / "docs" / "results" / "kl.md", tmp_path / "docs" / "pictures" / "experiment-beta.svg"
    page.parent.mkdir(parents=True)
    page.write_text("# Title\n")
    words = ["beta", str(tmp_path / "run"), "--page", str(page)]
    assert experiments.main(words) == EXIT_USER_ERROR, "nothing says where they go"
    page.write_text(f"# Title\n\nThe answer.\n\n{experiments.BEGIN}\nold\n{experiments.END}\nThe end.\n")
    (tmp_path / "run" / "plain-seed0").mkdir()
    cell(tmp_path / "run", "plain", 0, psnr_mean=20.0)
    assert experiments.main(words) == 0
    text = page.read_text()
    assert text.startswith("# Title\n\nThe answer.\n")
    assert text.endswith(f"{experiments.END}\nThe end.\n")
    assert "20.00 (1 seed)" in text
    assert "old" not in text
    assert "(../pictures/experiment-beta.svg)" in text
    assert picture.read_text() == (tmp_path / "run" / "figure.svg").read_text()
