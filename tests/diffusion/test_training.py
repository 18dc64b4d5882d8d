"""The settings of `train-diffusion`, the order in which it visits the latents, and which latents it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_vae import cli
from ldm_vae import config as configuration
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.training import TrainDiffusionConfig, in_order
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents.manifest import MANIFEST, read_manifest, write_manifest
from ldm_vae.training.loader import batches

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
    found = batches(in_order(config, ShardedSamples()), config.plan(1), seed=config.training.seed)
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
def test_damaged_statistics_are_refused_with_field_and_both_values(train, copy, constant, value):
    manifest = json.loads((copy / MANIFEST).read_text())
    right, manifest["statistics"][constant][1] = manifest["statistics"][constant][1], value
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert_refused(train(copy), f"statistics.{constant}.1 is {value} and the shards have {right}", "delete it and run")


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
    assert_refused(train(copy), part.file, "its checksum is xxh3_128:", f"and not {part.checksum}", "run the same")


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
    assert_refused(train(copy, "steps=2"), "preprocessing.colour is linear there and sRGB here", "that it began with")
    for override, words in (
        ("store=mean", "content is mean there and moments here"),
        ("dtype=float32", "dtype is float32 there and float16 here"),
        ("flip=true", "flipped is true there and false here"),
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
    assert_refused(
        train(copy, "steps=2"), "preprocessing.height is 64 there and 32 here", "latent_shape.1 is 8 there and 4 here"
    )


def test_a_run_does_not_continue_on_a_set_that_has_grown(train, copy, settings, image_folder, tmp_path):
    """Every later position would be another sample, and the normaliser another one."""
    assert train(copy)[0] == 0
    shutil.copytree(image_folder, tmp_path / "images")
    shutil.copy(image_folder / "a" / "000.png", tmp_path / "images" / "a" / "new.png")
    assert cli.main(["latents", "append", *settings, f"output={copy}", f"data.path={tmp_path / 'images'}"]) == 0
    assert_refused(train(copy, "steps=2"), "count is 25 and was 24 when this run began; give another output")
