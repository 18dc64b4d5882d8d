"""The guided velocity in closed form: lines through two velocities, mixtures, the interval."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_vae.diffusion.pipeline import class_weights
from ldm_vae.diffusion.samplers import ClassWeights, Guidance, GuidedVelocity
from ldm_vae.errors import UserError


class Labelled:
    """A "network" whose velocity is its label times a factor, 0 without a label; it counts the images it sees."""

    def __init__(self, factor: float = 1.0) -> None:
        self.config = {"num_classes": 9}
        self.factor, self.images = factor, 0

    def __call__(self, noisy: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        self.images += len(noisy)
        label = torch.full((len(noisy),), 5) if labels is None else labels
        label = torch.where(label == 9, 0, label)
        return self.factor * (1.0 + label).view(-1, 1, 1, 1).expand_as(noisy)


def classes(*rows: Any) -> ClassWeights:
    found = class_weights(list(rows), len(rows), [str(number) for number in range(9)])
    assert found is not None
    return found


def velocity(guidance: Guidance, wanted: ClassWeights | None, t: float = 0.5) -> tuple[list[float], int, int]:
    """Of each image; and the images that either network saw."""
    unet, weak = Labelled(), Labelled(0.5)
    count = 1 if wanted is None else len(wanted.ids)
    time = torch.tensor(t, dtype=torch.float64)
    found = GuidedVelocity(unet, weak, wanted, guidance)(torch.zeros(count, 1, 2, 2), time)
    assert found.shape == (count, 1, 2, 2)
    return found[:, 0, 0, 0].tolist(), unet.images, weak.images


def test_without_guidance_one_pass() -> None:
    assert velocity(Guidance(), classes(3, 7)) == ([4, 8], 2, 0)
    assert velocity(Guidance(), None) == ([6], 1, 0)


def test_classifier_free_guidance_is_a_line_through_two_velocities() -> None:
    assert velocity(Guidance(3.0), classes(3, 7)) == ([1 + 3 * 3, 1 + 3 * 7], 4, 0)
    assert velocity(Guidance(0.0), classes(3)) == ([1], 2, 0)


def test_autoguidance_is_another_one_and_needs_no_label() -> None:
    assert velocity(Guidance(1.0, 2.0), None) == ([6 + 1 * 3], 1, 1)
    assert velocity(Guidance(1.0, 1.5), classes(3)) == ([4 + 0.5 * 2], 1, 1)
    assert velocity(Guidance(3.0, 2.0), classes(3)) == ([10 + 1 * 2], 2, 1)


def test_outside_of_the_interval_it_costs_nothing() -> None:
    guidance = Guidance(3.0, 2.0, (0.2, 0.6))
    for t, expected in ((0.1, ([4], 1, 0)), (0.2, ([12], 2, 1)), (0.6, ([12], 2, 1)), (0.7, ([4], 1, 0))):
        assert velocity(guidance, classes(3), t) == expected


def test_a_mixture_is_the_mean_of_velocities() -> None:
    values, passes, _ = velocity(Guidance(), classes({3: 1, 7: 3}, 2))
    assert values == pytest.approx([0.25 * 4 + 0.75 * 8, 3])
    assert passes == 4
    assert velocity(Guidance(2.0), classes({3: 0.5, 7: 0.5}))[0] == pytest.approx([1 + 2 * 5])


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.8, 0.1), (-0.1, 1), (0, 1.1)])
def test_an_interval_without_sense_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="guidance_interval"):
        Guidance(interval=interval)


class Textured(Labelled):
    """Velocities that lead to clean latents of unit spread, three times as wide without a label of 3."""

    def __call__(self, noisy: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        wide = torch.where(labels == 3, 1.0, 0.5).view(-1, 1, 1, 1)
        return (noisy - wide * TEXTURE) / float(time)


TEXTURE = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_rescaling_gives_clean_latents_the_spread_of_unguided_ones() -> None:
    noisy, time = torch.randn(1, 4, 16, 16), torch.tensor(0.5, dtype=torch.float64)
    spreads = []
    for rescale in (0.0, 0.5, 1.0):
        guided = GuidedVelocity(Textured(), None, classes(3), Guidance(5.0, rescale=rescale))(noisy, time)
        clean = noisy - 0.5 * guided
        spreads.append(float(clean.std() / TEXTURE.std()))
        assert torch.corrcoef(torch.stack([clean.flatten(), TEXTURE.flatten()]))[0, 1] > 0.999
    assert spreads == pytest.approx([0.5 + 5 * 0.5, 2.0, 1.0])


@pytest.mark.parametrize("settings", [{"scale": float("nan")}, {"autoguidance": float("inf")}, {"rescale": -0.1}])
def test_guidance_that_is_no_number_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"guidance_scale: |guidance_rescale: "):
        Guidance(**settings)  # type: ignore[arg-type]


def test_classes_that_only_other_images_need_cost_nothing() -> None:
    alone = classes(3, {7: 1, 2: 1})[0:1]
    assert (alone.ids.tolist(), alone.weights.tolist()) == ([[3]], [[1]])
    assert velocity(Guidance(), alone)[1] == 1
