"""The settings of `train-diffusion`, the order in which it visits the latents, and which latents it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm_vae import cli
from ldm_vae import config as configuration
from ldm_vae.diffusion import flow
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.training import DiffusionModel, TrainDiffusionConfig, open_latents, ordered_samples
from ldm_vae.diffusion.validation import Copies, stack_samples, validation_losses
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents.format import MANIFEST, read_manifest, write_manifest
from ldm_vae.training.loader import Batch, MicroBatch, batches
from ldm_vae.training.trainer import Engine, make_accelerator

TINY = [
    "unet.preset=tiny", "unet.widths=[32,32]", "batch=4", "held_out=0", "training.precision=fp32", "training.workers=0",
    "training.device=cpu", "training.tracker=none", "training.warmup_steps=1",
]  # fmt: skip


class ShardedSamples:
    """Four shards of three samples that say who they are."""

    shard_counts = np.full(4, 3, np.int64)

    def __len__(self):
        return 12

    def sample(self, index, position, size):
        return {"index": index}


def visited(*overrides: str) -> list[int]:
    given = ["output=x", "latents=x", "autoencoder=x", "batch=3", "steps=8", *overrides]
    config = configuration.load(TrainDiffusionConfig, None, given)
    found = batches(ordered_samples(config, ShardedSamples()), config.plan(1), seed=config.training.seed)
    return [index for batch in found for part in batch.parts for index in part["index"].tolist()]


def test_shuffle_shards_keeps_to_that_many_shards():
    for overrides, block in (((), 4), (("shuffle_shards=1",), 1), (("shuffle_shards=2",), 2)):
        found = visited(*overrides)
        assert sorted(found[:12]) == sorted(found[12:]) == list(range(12))
        assert found[:12] != found[12:]
        together = max(len({i // 3 for i in found[start : start + 3 * block]}) for start in range(0, 24, 3 * block))
        assert together == block


def test_less_than_a_shard_is_refused():
    with pytest.raises(UserError, match="shuffle_shards: 0 is below 1"):
        visited("shuffle_shards=0")


@pytest.fixture
def train(autoencoder_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """train(set, *overrides) -> (exit code, the error) of `ldm-vae train-diffusion`."""

    def run(latents: Path, *overrides: str) -> tuple[int, str]:
        capsys.readouterr()
        places = [f"output={tmp_path / 'run'}", f"latents={latents}", f"autoencoder={autoencoder_directory}"]
        code = cli.main(["train-diffusion", *TINY, "steps=1", *places, *overrides])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def copy(latents: Path, tmp_path: Path) -> Path:
    return shutil.copytree(latents, tmp_path / "set")


def rewrite(directory: Path, **changes: Any) -> None:
    """Another manifest that is sound in itself."""
    manifest = read_manifest(directory)
    write_manifest(manifest.where, dataclasses.replace(manifest, **changes))


def assert_refused(found: tuple[int, str], *words: str) -> None:
    code, error = found
    assert code == EXIT_USER_ERROR
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize("constant", ["std", "mean"])
@pytest.mark.parametrize("value", [0.125, float("nan"), float("inf"), None, "x"])
def test_damaged_statistics_are_refused(train, copy, constant, value):
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["statistics"][constant][1] = value
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert_refused(train(copy), "its digest does not fit its content", "latents repair")


def test_statistics_that_cannot_be_are_refused_by_channel(train, copy):
    statistics = read_manifest(copy).statistics
    rewrite(copy, statistics=statistics | {"std": [*statistics["std"][:2], 0.0]})
    mean = statistics["mean"][2]
    assert_refused(train(copy), f"channel 2 has mean {mean} and std 0.0", "encode again")


def test_a_damaged_index_is_refused_with_both_values(train, copy):
    (part,) = read_manifest(copy).index
    data = bytearray((copy / part.file).read_bytes())
    data[-5] ^= 1
    (copy / part.file).write_bytes(data)
    assert_refused(train(copy), part.file, "its checksum is xxh3_128:", f"and not {part.checksum}", "latents repair")


def test_codes_are_refused(train, encode, tmp_path):
    pytest.importorskip("vector_quantize_pytorch")
    from ldm_vae.autoencoder.quantized import AutoencoderQuantized

    AutoencoderQuantized(
        kind="fsq", encoder_channels=(8, 16), encoder_blocks=(1, 1), decoder_channels=(16, 8, 8, 8),
        decoder_blocks=(1, 0, 0, 0),
    ).save_pretrained(tmp_path / "fsq")  # fmt: skip
    encode(tmp_path / "codes", f"autoencoder={tmp_path / 'fsq'}", "store=indices")
    assert_refused(
        train(tmp_path / "codes", f"autoencoder={tmp_path / 'fsq'}"), "content is indices", "encode with store=moments"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preprocessing": {"height": 64, "width": 32}}, ("height is 64, and 32 would fit",)),
        ({"latent_shape": (3, 4, 8)}, ("width is 32, and 64 would fit", "divides sides by 8")),
    ],
)
def test_latents_that_the_autoencoder_cannot_have_made_are_refused(copy, autoencoder_directory, changes, words):
    from ldm_vae.diffusion.training import load_matching_autoencoder

    load_matching_autoencoder(str(autoencoder_directory), read_manifest(copy))
    with pytest.raises(UserError, match=words[0]):
        load_matching_autoencoder(str(autoencoder_directory), dataclasses.replace(read_manifest(copy), **changes))


def test_a_run_continues_only_on_latents_made_in_the_same_way(train, copy, tmp_path, encode):
    assert train(copy)[0] == 0
    preprocessing = read_manifest(copy).preprocessing
    recorded = LatentDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline").config["preprocessing"]
    assert recorded == preprocessing
    rewrite(copy, preprocessing=preprocessing | {"colour": "linear"})
    assert_refused(
        train(copy, "steps=2"), "preprocessing colour linear instead of sRGB", "the run in output began with"
    )
    for override, words in (
        ("store=mean", "store=mean instead of moments"),
        ("dtype=float32", "dtype=float32 instead of float16"),
        ("flip=true", "flip=true instead of false"),
    ):
        shutil.rmtree(copy)
        encode(copy, override)
        assert_refused(train(copy, "steps=2"), words)
    shutil.rmtree(copy)
    encode(copy)
    assert train(copy, "steps=2")[0] == 0


def test_another_size_of_the_same_images_is_no_continuation(train, copy, encode):
    assert train(copy)[0] == 0
    shutil.rmtree(copy)
    encode(copy, "resolution=64")
    assert_refused(train(copy, "steps=2"), "images of 64 x 64 pixels instead of 32 x 32", "began with")


@pytest.mark.parametrize("label", ["a", "new"])
def test_a_run_does_not_continue_on_a_set_that_has_grown(train, copy, settings, image_folder, tmp_path, label):
    """Every later position would be another sample, and the normalizer another one; the U-Net has no new class."""
    assert train(copy)[0] == 0
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / label).mkdir(exist_ok=True)
    shutil.copy(image_folder / "a" / "000.png", tmp_path / "images" / label / "new.png")
    assert cli.main(["latents", "append", *settings, f"output={copy}", f"data.path={tmp_path / 'images'}"]) == 0
    assert_refused(
        train(copy, "steps=2"), "now holds 25 latents, and held 24 when the run in output began; give another output"
    )


CROPS = [
    "unet.patch=1", "unet.widths=[32]", "unet.coordinates=true", "crops.size=2", "crops.share=0.5", "held_out=0.3",
    "steps=8", "ema.snapshots=4", "training.seed=3", "training.save_every=4", "training.log_every=1",
    "training.validate_every=3", "training.preview_every=4", "training.keep_checkpoints=9",
]  # fmt: skip


LAST = Path("checkpoints") / "step-000000008"


def newest_state(run: Path) -> dict[str, torch.Tensor]:
    files = (run / LAST).glob("*.safetensors")
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def lines(run: Path) -> list[dict[str, Any]]:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in logged]


@pytest.fixture(scope="module")
def train_crops(autoencoder_directory: Path, latents: Path) -> Callable[..., Path]:
    """train_crops(output, *overrides): eight steps that use everything: crops, averages, held-out loss, neighbours."""

    def run(output: Path, *overrides: str) -> Path:
        places = [f"output={output}", f"latents={latents}", f"autoencoder={autoencoder_directory}"]
        assert cli.main(["train-diffusion", *TINY, *places, *CROPS, *overrides]) == 0
        return output

    return run


@pytest.fixture(scope="module")
def crop_run(train_crops: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_crops(tmp_path_factory.mktemp("crops") / "run")


def test_a_run_logs_crops_held_out_times_and_copies(crop_run: Path) -> None:
    logged = lines(crop_run)
    whole, crops = ([line["step"] for line in logged if f"loss/flow{kind}" in line] for kind in ("", "_crops"))
    assert sorted(whole + crops) == list(range(1, 9))
    assert min(len(whole), len(crops)) > 1
    validated = [line for line in logged if "held_out/flow" in line]
    assert [line["step"] for line in validated] == [3, 6, 8]
    times = [value for name, value in validated[-1].items() if name.startswith("held_out/flow_t")]
    assert sum(times) / 8 == pytest.approx(validated[-1]["held_out/flow"])
    assert 0 <= validated[-1]["samples/copy_rate"] <= 1
    assert "samples/copy_rate" not in validated[0]
    assert len(list((crop_run / "previews").iterdir())) == 2
    colours = LatentDiffusionPipeline.from_pretrained(crop_run / "pipeline").config["latent_rgb"]
    assert np.shape(colours["weights"]) == (3, 3)


def test_the_network_sees_crops_with_their_coordinates_and_times(autoencoder_directory, latents):
    """Step 0 of this seed is a crop step, step 2 is not: what goes into the network is written out here."""
    places = ["output=x", f"latents={latents}", f"autoencoder={autoencoder_directory}"]
    config = configuration.load(TrainDiffusionConfig, None, [*TINY, *CROPS, *places])
    samples, _ = open_latents(config)
    model = DiffusionModel(config, samples, None)
    engine = Engine(model, config.training, make_accelerator(config.training), 8)
    seen: list[Any] = []
    model.modules["unet"].register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    stacked = stack_samples(samples, 4)
    clean = model.normalizer.normalize(stacked["latent"])
    for step, size in ((0, 2), (2, 4)):
        metrics = model.update(step, Batch((MicroBatch(stacked, slice(0, 4)),), 4), engine)
        assert ("loss/flow_crops" in metrics) == (size == 2)
        noisy, times, labels, coordinates = seen.pop()
        draw = model.draw(step, 4, engine.device)
        crops = draw.crops
        tops, lefts = crops.tops.tolist(), crops.lefts.tolist()
        cut = torch.stack([x[:, t : t + size, u : u + size] for x, t, u in zip(clean, tops, lefts)])
        torch.testing.assert_close(noisy, flow.interpolate(cut, draw.noise, times))
        assert torch.equal(labels, torch.where(draw.dropped, 2, stacked["label"]))
        if size == 4:
            assert coordinates is None
        else:
            expected = [[-0.75 + 0.5 * (t + i) for i in range(2)] for t in tops]
            assert coordinates[:, 0, :, 0].tolist() == expected
    medians = [float(model.draw(step, 4001, engine.device).times.median()) for step in (0, 2)]
    shift = flow.resolution_shift(3, 4, 4)
    assert medians == pytest.approx([shift / 2 / (1 + shift / 2), shift / (1 + shift)], rel=0.1)


def test_a_network_that_predicts_the_clean_latents_exactly_has_no_loss(autoencoder_directory, latents):
    """Near t = 0 too, where its velocity is clipped: the times are shifted to less than 0.05."""
    places = ["output=x", f"latents={latents}", f"autoencoder={autoencoder_directory}"]
    config = configuration.load(TrainDiffusionConfig, None, [*TINY, *places, "unet.prediction=clean", "shift=0.001"])
    samples, _ = open_latents(config)
    model = DiffusionModel(config, samples, None)
    engine = Engine(model, config.training, make_accelerator(config.training), 8)
    stacked = stack_samples(samples, 4)
    clean = model.normalizer.normalize(stacked["latent"])
    right = lambda _, given, velocity: flow.velocity_from_clean(given[0], clean, given[1]) + 0 * velocity  # noqa: E731
    model.modules["unet"].register_forward_hook(right)
    metrics = model.update(0, Batch((MicroBatch(stacked, slice(0, 4)),), 4), engine)
    assert float(metrics["loss/flow"]) < 1e-9
    losses = validation_losses(model.modules["unet"], clean, None, config.shift)
    assert max(losses) < 0.05
    assert max(losses.values()) < 1e-9


def test_copies_and_overfitting_are_said_once(autoencoder_directory, latents):
    places = ["output=x", f"latents={latents}", f"autoencoder={autoencoder_directory}"]
    config = configuration.load(TrainDiffusionConfig, None, [*TINY, *CROPS, *places])
    model = DiffusionModel(config, open_latents(config)[0], None)
    model.steps = 10
    model.copies = Copies(2, 10, 24)
    state = json.loads(json.dumps(model.state_dict()))
    model.copies = None
    model.load_state_dict(state, {}, 0)
    assert [alarm.name for alarm in model.alarms(1, {"loss/flow": 1.0})] == ["copies"]
    assert model.alarms(2, {"loss/flow": 0.9}) == []
    model.suggestion.update_held_out(2, 1.0)
    for step in (4, 5):
        model.suggestion.update_held_out(step, 1.1)
    assert [alarm.name for alarm in model.alarms(5, {"loss/flow": 0.5})] == ["overfitting"]
    assert model.alarms(6, {"loss/flow": 0.4}) == []


@pytest.fixture
def another_precision() -> Iterator[None]:
    """accelerate keeps one precision in a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("another_precision")
def test_a_run_that_was_killed_ends_where_an_unbroken_one_does(precision, crop_run, train_crops, tmp_path):
    """Weights, optimizer, all three averages, figures and snapshots, to the last bit."""
    words = [f"training.precision={precision}"]
    unbroken = crop_run if precision == "fp32" else train_crops(tmp_path / "unbroken", *words)
    broken = shutil.copytree(unbroken, tmp_path / "broken")
    for name in (LAST, "pipeline"):
        shutil.rmtree(broken / name)
    (broken / "run.json").unlink()
    (broken / "snapshots" / "step-000000006.safetensors").unlink()
    train_crops(broken, *words)
    expected, found = newest_state(unbroken), newest_state(broken)
    assert found.keys() == expected.keys()
    for stem in ("unet.", "unet-ema.", "unet-optimizer.", "unet-power-0.05.", "unet-power-0.1."):
        assert any(name.startswith(stem) for name in found), stem
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert lines(broken) == lines(unbroken)
    first, second = (json.loads((run / LAST / "state.json").read_text())["model"] for run in (unbroken, broken))
    assert first == second
    assert first["suggestion"]["best_step"] > 0
    for path in (unbroken / "snapshots").iterdir():
        assert (broken / "snapshots" / path.name).read_bytes() == path.read_bytes()


def assert_close(found: Path, expected: Path) -> None:
    """Up to the order in which gradients are added up."""
    states = newest_state(found), newest_state(expected)
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        if not name.startswith("unet-optimizer"):
            torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=3e-5, msg=name)


def test_micro_batches_equal_the_whole_batch(crop_run, train_crops, tmp_path):
    assert_close(train_crops(tmp_path, "micro_batch=2"), crop_run)


@pytest.mark.slow
def test_two_processes_equal_one(crop_run, autoencoder_directory, latents, tmp_path):
    places = [f"output={tmp_path}", f"latents={latents}", f"autoencoder={autoencoder_directory}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ldm_vae.cli"]
    words = ["train-diffusion", *TINY, *places, *CROPS, "training.processes=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *words], check=True, timeout=240, env=environment)
    assert_close(tmp_path, crop_run)
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == sorted(
        path.name for path in (crop_run / "snapshots").iterdir()
    )


def test_an_average_is_chosen_after_training(crop_run, tmp_path, capsys):
    written = sorted(path.stem for path in (crop_run / "snapshots").iterdir())
    assert written == [f"step-{step:09d}" for step in (2, 4, 6, 8)]
    capsys.readouterr()
    assert cli.main(["ema", str(crop_run), "--length", "0.1", "0.2", "0.02"]) == 0
    first, *said, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"model ema: {crop_run}; lengths 0.1, 0.2, 0.02 from 8 snapshots; ")
    assert f"{crop_run}: the lowest loss is that of length " in last
    assert said[0].startswith("the run's own average (training.ema_decay): held-out flow loss ")
    own = float(said[0].rsplit(" ", 1)[1])
    assert own == pytest.approx(lines(crop_run)[-1]["held_out/flow"], abs=1e-4)
    assert said[1].startswith("length 0.1 after step 8: held-out flow loss ")
    assert "of its profile cannot be represented" not in said[1]
    assert said[3].endswith("of its profile cannot be represented by these snapshots")
    assert cli.main(["ema", str(crop_run), "--length", "0.1", "--step", "4", "--out", str(tmp_path / "weak")]) == 0
    weights = dict(LatentDiffusionPipeline.from_pretrained(tmp_path / "weak").unet.named_parameters())
    stored = load_file(crop_run / "snapshots" / "step-000000004.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach(), stored[f"0.1/{name}"].float(), rtol=1e-2, atol=1e-5)
    assert cli.main(["ema", str(crop_run), "--length", "0.1", "--out", str(tmp_path / "weak")]) == EXIT_USER_ERROR
    assert "exists; give a new folder" in capsys.readouterr().err
    assert cli.main(["ema", str(tmp_path), "--length", "0.1"]) == EXIT_USER_ERROR
    assert "give a finished run of `ldm-vae train-diffusion`" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(autoencoder_directory, latents, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = [f"latents={latents}", f"autoencoder={autoencoder_directory}"]
    assert cli.main(["train-diffusion", *TINY, *places, *CROPS, "ema.snapshots=8", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for word in ("M trained parameters", "GMAC per sample", "peak memory"):
        assert word in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("neighbours=1", "is too few to compare with"),
        ("patience=0", "patience: 0"),
        ("crops.size=4", "set unet.coordinates=true"),
        ("ema.lengths=[0.4]", "ema.lengths: 0.4"),
    ],
)
def test_settings_without_sense_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        configuration.load(TrainDiffusionConfig, None, ["output=x", "latents=x", "autoencoder=x", override])


def test_without_labels_the_network_is_unconditional(train, copy, tmp_path, capsys):
    rewrite(copy, label_names=())
    assert train(copy, "held_out=0.3")[0] == 0
    assert LatentDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline").labels == []
    assert len(list((tmp_path / "run" / "previews").iterdir())) == 1
    capsys.readouterr()
    assert cli.main(["ema", str(tmp_path / "run"), "--length", "0.1"]) == 0
    assert "length 0.1 after step 1: held-out flow loss" in capsys.readouterr().out
