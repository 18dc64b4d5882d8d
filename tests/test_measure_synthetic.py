"""The judge is judged: real images keep every promise, and each way to be wrong breaks the promise that it concerns."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from ldm_vae import cli
from ldm_vae.data.synthetic.source import SyntheticConfig, SyntheticSource
from ldm_vae.errors import UserError

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "measure_synthetic.py"

from tools import measure_synthetic as script
from tools import synthetic_reader
from tools.synthetic_reader import Truth, largest_gap

CONFIG = SyntheticConfig(count=200, textured=0)
NAMES = SyntheticSource.label_names
PERFECT = dict.fromkeys(synthetic_reader.ATTRIBUTES, 1.0)


@functools.cache
def scenes(seed: int, count: int) -> Truth:
    """What real images show, as a reader without faults would read it."""
    return synthetic_reader.truth_of(SyntheticSource(dataclasses.replace(CONFIG, seed=seed, count=count)))


def broken(generated: Truth) -> set[str]:
    found = script.judge_attributes(scenes(1, 2 * len(generated.labels)), generated, PERFECT)
    return {name for name, one in found.items() if not one["kept"]}


def changed(truth: Truth, **attributes: np.ndarray) -> Truth:
    return Truth(truth.labels, synthetic_reader.with_relation(truth.attributes | attributes))


@pytest.fixture(scope="module")
def reader() -> synthetic_reader.Reader:
    images, truth = synthetic_reader.render(synthetic_reader.reader_config(CONFIG, 400), 32)
    return synthetic_reader.train_reader(images, truth, epochs=8, width=16)


def test_the_reader_reads_real_images_and_is_asked_only_what_it_can(reader: synthetic_reader.Reader) -> None:
    images, truth = synthetic_reader.render(synthetic_reader.held_out_config(CONFIG, 200), 32)
    read = reader.read(images)
    errors = synthetic_reader.reading_errors(read, truth)
    script.check_reader(errors)
    assert errors["correlations"]["hue"] > 0.9
    assert errors["errors"]["hue"] < 0.05
    assert errors["errors"]["x"] < 0.02
    classes = script.judge_classes(truth.labels, read.labels, NAMES)
    assert classes["kept"]
    mirrored = synthetic_reader.reading_errors(reader.read(images.flip(-1)), truth)
    assert mirrored["correlations"]["light"] < -0.7  # a reader that guessed would not notice
    untaught = synthetic_reader.reading_errors(synthetic_reader.Reader(32, width=16).read(images), truth)
    with pytest.raises(UserError, match="no judge"):
        script.check_reader(untaught)


def test_shuffled_labels_break_the_promise_of_classes() -> None:
    asked = np.arange(200) % 10
    shuffled = np.random.default_rng(0).permutation(asked)
    assert script.judge_classes(asked, asked, NAMES)["kept"]
    assert not script.judge_classes(asked, shuffled, NAMES)["kept"]
    assert script.judge_classes(asked, shuffled, NAMES)["recognised"] < 0.3


def test_shares_of_classes_intervals_and_confusions() -> None:
    asked = np.repeat(np.arange(10), 10)
    read = asked.copy()
    read[:3] = [9, 9, 4]
    found = script.judge_classes(asked, read, NAMES)
    assert found["recognised"] == pytest.approx(0.97)
    assert found["interval"] == pytest.approx([0.9155, 0.9897], abs=1e-3)  # Wilson 1927, 97 of 100
    assert found["by_class"]["ball"]["recognised"] == pytest.approx(0.7)
    assert found["by_class"]["ball"]["read_as"] == {"heart": 1, "gem": 2}
    assert found["by_class"]["cube"]["read_as"] == {}
    read[:11] = 9
    assert not script.judge_classes(asked, read, NAMES)["kept"]


def test_real_scenes_have_the_right_marginals() -> None:
    found = script.judge_attributes(scenes(1, 600), scenes(2, 300), PERFECT)
    assert set(found) == set(synthetic_reader.ATTRIBUTES)
    assert all(one["kept"] and one["gap"] < one["chance"] + 0.05 for one in found.values())
    kept = {"gap": 0.2, "chance": 0.15, "kept": True}
    assert script.above_chance({"x": kept, "y": kept | {"gap": 0.1}}) == "Gap above chance: 1 of 2 attributes: x."


def test_each_wrong_marginal_is_found() -> None:
    real = scenes(2, 300)
    x, hue, background = (real.attributes[name] for name in ("x", "hue", "background_hue"))
    assert broken(changed(real, x=0.5 + 0.5 * (x - 0.5))) == {"x"}
    assert broken(changed(real, light=np.abs(real.attributes["light"]))) == {"light"}
    assert broken(changed(real, hue=np.round(3 * hue) / 3 % 1.0, background_hue=background)) >= {"hue"}
    turned = broken(changed(real, hue=hue / 3, background_hue=(background - hue + hue / 3) % 1.0))
    assert turned - {"background_hue"} == {"hue"}


def test_a_wrong_relation_of_right_marginals_is_found() -> None:
    real = scenes(2, 300)
    exchanged = np.random.default_rng(0).permutation(real.attributes["background_hue"])
    assert broken(changed(real, background_hue=exchanged)) == {"background_hue - hue"}


def test_what_cannot_be_read_is_not_judged() -> None:
    found = script.judge_attributes(scenes(1, 200), scenes(2, 100), PERFECT | {"roll": 0.89})
    assert set(synthetic_reader.ATTRIBUTES) - set(found) == {"roll"}


def test_a_ball_has_no_roll() -> None:
    truth = scenes(1, 100)
    assert not truth.attributes["roll"][truth.labels == NAMES.index("ball")].any()
    assert truth.attributes["roll"][truth.labels == NAMES.index("star")].all()


def test_the_gap_of_distributions() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.uniform(size=300), rng.uniform(size=200) ** 1.3
    assert largest_gap(first, second, circle=False) == pytest.approx(ks_2samp(first, second).statistic)
    gaps = [largest_gap((first + turn) % 1, (second + turn) % 1, circle=True) for turn in (0.0, 0.2, 0.5, 0.77)]
    assert gaps == pytest.approx([gaps[0]] * 4, abs=1e-12)
    assert largest_gap([0.1, 0.2], [0.6, 0.7], circle=False) == largest_gap([0.1, 0.2], [0.6, 0.7], circle=True) == 1
    assert largest_gap(first, first, circle=True) == 0


def test_copies_break_the_promise_of_memory() -> None:
    training, fresh, held_out = torch.randn(3, 100, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    mirrored = torch.randn(100, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    known = torch.stack([training, mirrored], dim=1)
    found = script.judge_copies(fresh, held_out, known)
    assert (found["copies"], found["kept"], found["held_out_copies"]) == (0, True, 0)
    fresh[:2] = training[5:7] + 0.01
    fresh[2] = mirrored[9] + 0.01
    found = script.judge_copies(fresh, held_out, known)
    assert (found["copies"], found["compared"], found["kept"]) == (3, 100, False)


def test_the_sets_share_no_scene() -> None:
    configs = [CONFIG, synthetic_reader.reader_config(CONFIG, 200), synthetic_reader.held_out_config(CONFIG, 200)]
    drawn = [{SyntheticSource(config).scene(i) for i in range(200)} for config in configs]
    assert len(set.union(*drawn)) == 600


def test_counts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    words = ["--pipeline", "p", "--latents", "l", "--data", "d", "--count", "25"]
    result = subprocess.run(
        [sys.executable, "-m", "tools.measure_synthetic", tmp_path / "out", *words], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr.count("as many of each of ten classes")) == (2, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_that_has_learnt_nothing_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole measurement at 64x64 pixels, on a chain of a few steps."""
    training = ["training.workers=0", "training.device=cpu", "training.tracker=none", "training.precision=fp32",
                "training.warmup_steps=1"]  # fmt: skip
    autoencoder, latents, data = f"autoencoder={tmp_path / 'vae'}", tmp_path / "latents", tmp_path / "encode.yaml"
    synthetic = "synthetic: {count: 40, resolution: 64, textured: 0}"
    data.write_text(f"data: {{source: synthetic, {synthetic}}}\nresolution: 64\nworkers: 0\nshard_size: 16\n")
    for words in (
        ["train-vae", "data.synthetic.count=40", "data.synthetic.resolution=64", *training, "held_out_resolution=64",
         "phases=[{steps: 4, crop: 32, batch: 4}]", "autoencoder.preset=pico", f"output={tmp_path / 'vae'}"],
        ["encode", str(data), autoencoder, f"output={latents}"],
        ["train-diffusion", *training, autoencoder, f"latents={latents}", f"output={tmp_path / 'diffusion'}",
         "unet.preset=tiny", "unet.widths=[32,64]", "steps=4", "batch=4"],
    ):  # fmt: skip
        assert cli.main(words) == 0

    def measure(data: Path, out: str) -> int:
        words = ["--pipeline", tmp_path / "diffusion", "--latents", latents, "--data", data, "--count", "40"]
        cheap = ["--steps", "2", "--precision", "fp32", "--side", "32", "--reader-images", "600"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in [SCRIPT, tmp_path / out, *words, *cheap]])
        return script.main()

    assert measure(data, "truth") == script.EXIT_BROKEN
    found = json.loads((tmp_path / "truth" / "results.json").read_text())
    assert not found["kept"]
    assert not found["classes"]["kept"]
    assert found["classes"]["recognised"] < 0.5
    assert found["reader"]["recognised"] >= script.READER_RECOGNISES
    assert found["copies"]["compared"] == 40
    assert len(list((tmp_path / "truth" / "images").glob("0*.png"))) == 40
    assert (tmp_path / "truth" / "wrong.png").is_file()
    text = (tmp_path / "truth" / "results.md").read_text()
    assert "| recognized as asked |" in text
    assert "**broken**" in text

    other = tmp_path / "other.yaml"
    other.write_text(data.read_text().replace("textured: 0", "textured: 0.5"))
    capsys.readouterr()
    assert measure(other, "other") == 2
    assert "was not encoded from the images that" in capsys.readouterr().err
    assert measure(data, "truth") == 2  # holds results already
