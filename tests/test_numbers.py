"""Numbers of numpy and torch are as good as Python's, wherever the Python API takes one; others are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_vae import config as configuration
from ldm_vae.applications.codec.compression import CompressConfig, compress
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.autoencoder.training import train_vae
from ldm_vae.diffusion.generation import GenerateConfig, generate
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.errors import UserError
from ldm_vae.evaluation.diagnosis import DiagnoseConfig
from ldm_vae.evaluation.study import Study
from ldm_vae.latents.dataset import GlobalOrder, LatentDataset, OrderedSampler, ShardBlockOrder
from ldm_vae.metrics import bootstrap_interval
from ldm_vae.random import generator, key_hash, numpy_rng
from tests.diffusion.conftest import pipeline as pipeline  # a fixture
from tests.diffusion.conftest import saved as saved
from tests.latents.conftest import autoencoder_directory as autoencoder_directory
from tests.latents.conftest import encode as encode
from tests.latents.conftest import latents as latents
from tests.latents.conftest import settings as settings

ONES = [np.int64(1), np.int32(1), np.uint8(1), np.array(1), torch.tensor(1), torch.tensor(1, dtype=torch.int32)]
WRONG = [True, 1.0, 1.5, np.float32(1), np.True_, torch.tensor(1.0), torch.tensor(True), np.array([1, 2]), None]


@pytest.mark.parametrize("one", ONES, ids=repr)
def test_a_seed_of_any_library_gives_the_same_randomness(one: Any) -> None:
    assert key_hash(one, "noise", one) == key_hash(1, "noise", 1)
    assert key_hash(np.str_("noise"), 1) == key_hash("noise", 1)
    assert generator(one, "noise").initial_seed() == generator(1, "noise").initial_seed()
    assert numpy_rng(one, 3).random() == numpy_rng(1, 3).random()
    assert [GlobalOrder(one, 10)(place) for place in range(10)] == [GlobalOrder(1, 10)(place) for place in range(10)]
    counts = np.array([4, 6])
    assert [ShardBlockOrder(one, counts, one)(n) for n in range(9)] == [
        ShardBlockOrder(1, counts, 1)(n) for n in range(9)
    ]
    values = np.arange(9.0)
    assert bootstrap_interval(values, seed=one) == bootstrap_interval(values, seed=1)


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_other_seeds_are_refused(wrong: Any) -> None:
    for make in (lambda: key_hash(wrong, "noise"), lambda: GlobalOrder(wrong, 10), lambda: GlobalOrder(0, wrong)):
        with pytest.raises(UserError, match=r"(seed|count): .* is not a whole number; give one such as 1"):
            make()


def test_the_hash_did_not_change() -> None:
    assert key_hash(0, "posterior", 7) == 34887650950693204


@pytest.mark.parametrize("one", ONES, ids=repr)
def test_a_pipeline_takes_them_everywhere(one: Any, pipeline: LatentDiffusionPipeline) -> None:
    plain: dict[str, Any] = {"num_inference_steps": 1, "output_type": "np"}
    expected = pipeline(1, seed=1, num_images=1, height=64, guidance_scale=1, **plain).images
    eight = one * 8
    found = pipeline(
        one, seed=one, num_images=one, height=8 * eight, width=8 * eight, guidance_scale=one, guidance_rescale=0 * one,
        num_inference_steps=one, output_type="np",
    ).images  # fmt: skip
    assert np.array_equal(found, expected)
    for labels in (np.array([1, 2]), torch.tensor([1, 2]), [one, one + 1]):
        assert np.array_equal(pipeline(labels, seed=1, **plain).images, pipeline([1, 2], seed=1, **plain).images)
    mixed = pipeline({np.int64(1): np.float32(0.5), 2: torch.tensor(0.5)}, seed=1, **plain).images
    assert np.array_equal(mixed, pipeline({1: 0.5, 2: 0.5}, seed=1, **plain).images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1.0}, "seed: 1.0 is not a whole number"),
        ({"seed": True}, "seed: True is not a whole number"),
        ({"num_images": 2.0}, "num_images: 2.0 is not a whole number"),
        ({"num_inference_steps": 2.5}, "num_inference_steps: 2.5 is not a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps: True is not"),
        ({"height": 64.0}, "height: 64.0 is not a whole number"),
        ({"labels": 1.0}, "labels: 1.0 is not a whole number"),
        ({"labels": True}, "labels: True is not a whole number"),
        ({"labels": np.array([0.5, 1.0])}, "labels: 0.5 is not a whole number"),
        ({"labels": {"cat": "half"}}, "labels: 'cat': 'half' is not a number"),
        ({"labels": "cat", "guidance_scale": "strong"}, "guidance_scale: 'strong' is not a number"),
        ({"image": torch.zeros(3, 64, 64), "strength": True}, "strength: True is not a number"),
    ],
)
def test_a_pipeline_refuses_others(pipeline: LatentDiffusionPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(**({"num_inference_steps": 1} | arguments))


@dataclass(frozen=True)
class Inner:
    steps: int = 2
    rates: list[float] = field(default_factory=lambda: [1.0])


@dataclass(frozen=True)
class Outer:
    output: str = "???"
    seed: int = 0
    strength: float | None = None
    sizes: tuple[int, ...] = ()
    inner: Inner = field(default_factory=Inner)
    exact: bool = False


def test_settings_become_plain(tmp_path: Path) -> None:
    given = Outer(
        output=tmp_path, seed=np.int64(3), strength=np.float32(0.5), sizes=(torch.tensor(2), 4),  # type: ignore[arg-type]
        inner=Inner(np.uint8(7), [np.float64(0.25), 2]), exact=True,  # type: ignore[arg-type, list-item]
    )  # fmt: skip
    found = configuration.plain_settings(given)
    assert found == Outer(str(tmp_path), 3, 0.5, (2, 4), Inner(7, [0.25, 2]), True)
    assert configuration.to_dict(found)["inner"] == {"steps": 7, "rates": [0.25, 2]}
    assert configuration.plain_settings(found) is found


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Outer(seed=True), "seed: True is not a whole number"),
        (Outer(seed=1.0), "seed: 1.0 is not a whole number"),  # type: ignore[arg-type]
        (Outer(strength=True), "strength: True is not a number"),
        (Outer(sizes=(1, 2.5)), "sizes: 2.5 is not a whole number"),  # type: ignore[arg-type]
        (Outer(inner=Inner(steps=np.float64(2))), "inner.steps: np.float64.2.0. is not a whole number"),  # type: ignore[arg-type]
    ],
)
def test_settings_with_other_numbers_are_refused(config: Outer, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration.plain_settings(config)


def test_a_folder_of_images_has_plain_parameters(saved: Path, tmp_path: Path) -> None:
    numbers: dict[str, Any] = {"count": np.int64(1), "steps": torch.tensor(1), "seed": np.int32(5)}
    made = generate(GenerateConfig(saved, tmp_path / "out", guidance=np.float32(2), **numbers))  # type: ignore[arg-type]
    assert made.made == 1
    again = generate(GenerateConfig(str(saved), str(tmp_path / "out"), guidance=2.0, count=1, steps=1, seed=5))
    assert again.made == 0


ENTRIES: dict[str, Callable[[Any, str], object]] = {
    "generate": lambda seed, out: generate(GenerateConfig("nowhere", out, seed=seed)),
    "train_vae": lambda seed, out: train_vae(TrainVaeConfig(output=out, held_out_images=seed)),
    "compress": lambda seed, out: compress(CompressConfig(["a.png"], "nowhere", out, progressive=[seed])),
    "a study": lambda seed, out: Study(DiagnoseConfig("nowhere", out, seed=seed)),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("wrong", [1.5, True])
def test_every_function_checks_its_settings_first(entry: str, wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f": {wrong} is not a whole number"):
        ENTRIES[entry](wrong, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_set_of_latents_takes_them(latents: Path) -> None:
    expected = LatentDataset(latents, seed=1)[1]["latent"]
    for one in ONES:
        assert torch.equal(LatentDataset(latents, seed=one)[one]["latent"], expected)
    for wrong in (1.5, True):
        with pytest.raises(UserError, match=f"index: {wrong} is not a whole number"):
            LatentDataset(latents)[wrong]  # type: ignore[index]
        with pytest.raises(UserError, match=f"seed: {wrong} is not a whole number"):
            LatentDataset(latents, seed=wrong)  # type: ignore[arg-type]
    assert list(OrderedSampler(GlobalOrder(1, 6), np.int64(2))) == list(OrderedSampler(GlobalOrder(1, 6), 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, torch.tensor])
def test_a_shift_of_small_integers_does_not_overflow(kind: Any) -> None:
    from ldm_vae import flow

    assert flow.resolution_shift(kind(4), kind(64), kind(64)) == flow.resolution_shift(4, 64, 64) == 2
    with pytest.raises(UserError, match=r"height: 64\.5 is not a whole number"):
        flow.resolution_shift(4, 64.5, 64)  # type: ignore[arg-type]
