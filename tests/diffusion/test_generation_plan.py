"""Which images a call makes, without making them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_vae.diffusion.generation import GenerateConfig, Noise, PlannedImage, image_name, plan_images
from ldm_vae.diffusion.pipeline import image_generator
from ldm_vae.errors import UserError

NAMES = ["cat", "red ball"]


def planned(names: list[str] = NAMES, **settings: object) -> list[PlannedImage]:
    return plan_images(GenerateConfig("model", "out", **settings), names)  # type: ignore[arg-type]


def test_classes_in_turn_each_with_its_own_noise() -> None:
    pictures = planned(count=3, seed=5)
    assert [p.caption for p in pictures] == ["cat", "red ball", "cat"]
    assert [p.noise for p in pictures] == [Noise(5, 0), Noise(5, 1), Noise(5, 2)]
    assert pictures[1].path == Path("out/0001_red-ball.png")
    assert [p.classes for p in planned([], count=2)] == [None, None]


def test_a_grid_is_rows_of_equal_noise() -> None:
    pictures = planned(count=2, grid=True)
    assert [(p.caption, p.noise.number) for p in pictures] == [("cat", 0), ("red ball", 0), ("cat", 1), ("red ball", 1)]


def test_whole_numbers_are_seeds_and_anything_else_labels() -> None:
    seeds = planned(count=3, interpolate=("4", "9"), labels=("cat",))
    assert [(p.noise.seed, p.noise.towards, p.noise.share) for p in seeds] == [(4, 9, 0), (4, 9, 0.5), (4, 9, 1)]
    labels = planned(count=3, interpolate=("cat", "red ball"))
    assert [p.classes for p in labels] == [{"cat": 1 - s, "red ball": s} for s in (0, 0.5, 1)]
    assert len({p.noise for p in labels}) == 1
    assert planned([], count=2, interpolate=("4", "9"))[0].caption is None
    with pytest.raises(UserError, match="this model is unconditional"):
        planned([], count=2, interpolate=("4", "9"), labels=("cat",))


def test_noise_of_a_seed_and_between_two() -> None:
    shape = (4, 8, 8)
    assert torch.equal(Noise(3, 1).draw(shape), torch.randn(*shape, generator=image_generator(3, 1)))
    assert torch.equal(Noise(3, 0, 4, 1.0).draw(shape), Noise(4, 0).draw(shape))
    assert 0.9 < Noise(3, 0, 4, 0.5).draw((4, 64, 64)).std() < 1.1


def test_file_names() -> None:
    assert image_name(7, "Red ball / 2") == "0007_red-ball-2.png"
    assert image_name(7, None) == image_name(7, "!") == "0007.png"


@pytest.mark.parametrize("label", ["a" * 300, "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 300, "\N{GRINNING FACE}x" * 300])
def test_long_labels_become_short_names_that_differ(label: str) -> None:
    names = [image_name(7, label), image_name(7, label + "y")]
    assert len(set(names)) == 2
    assert all(len(name.encode()) < 230 and name.startswith("0007_") and name.endswith(".png") for name in names)
