"""Levels come back from every model, in parts, and context costs fewer bits where there is some."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.applications.codec import entropy_models
from ldm_vae.applications.codec.entropy_models import StaticModel
from tests.applications.codec.conftest import random_model

MODEL = random_model("sha256:" + "0" * 64, 3)


def levels_of(height: int, width: int, spread: float = 3.0) -> np.ndarray:
    return np.rint(np.random.default_rng(0).laplace(0, spread, (3, height, width))).astype(np.int64)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (13, 5), (33, 40)])
@pytest.mark.parametrize("model", [StaticModel((20, 8, 30)), MODEL.at(2048)], ids=["static", "context"])
def test_levels_come_back_whole_and_in_parts(size, model):
    levels = levels_of(*size)
    levels[0, 0, 0] = 16000
    for parts in ((3,), (1, 2, 3)):
        data = entropy_models.encode_levels(model, levels, parts)
        assert len(data) == len(parts)
        assert (entropy_models.decode_levels(model, data, parts, size, "here") == levels).all()
    first = entropy_models.decode_levels(model, data[:2], parts, size, "here")
    assert (first == levels[:2]).all()


@pytest.mark.parametrize("step", [1, 64, 2048, 65535])
def test_every_step_is_followed(step):
    levels = levels_of(9, 9, 30.0)
    for kind in ("static", "context"):
        model = random_model("x", 3, kind).at(step)
        data = entropy_models.encode_levels(model, levels, (3,))
        assert (entropy_models.decode_levels(model, data, (3,), (9, 9), "here") == levels).all()


def test_the_ideal_length_is_that_of_the_file():
    levels = levels_of(40, 40)
    levels[1, 3, 3] = 5000
    for model in (StaticModel((20, 20, 20)), MODEL.at(2048)):
        coded = sum(map(len, entropy_models.encode_levels(model, levels, (3,))))
        assert coded == pytest.approx(entropy_models.ideal_bits(model, levels) / 8, abs=12, rel=2e-3)


def test_what_is_not_yet_known_does_not_matter():
    """Of a later position only zeros may be seen: the decoder has nothing else."""
    seen = []

    class Spy(StaticModel):
        def predict(self, known, channel, part):
            seen.append(known.copy())
            return super().predict(known, channel, part)

    entropy_models.encode_levels(Spy((8, 8, 8)), levels_of(4, 4), (3,))
    assert not seen[0].any()
    assert not seen[1][1:].any()
