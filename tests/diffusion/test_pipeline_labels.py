"""Names, ids and mixtures; what is unknown is refused with the nearest known label (in `test_pipeline.py`)."""

from __future__ import annotations

import pytest

from ldm_vae.diffusion.pipeline import class_weights, find_label
from ldm_vae.errors import UserError

NAMES = ["cat", "dog", "red ball"]


def test_labels_by_name_and_id() -> None:
    names = ["cat", "Dog", "0"]
    assert [find_label(label, names) for label in ("cat", "dog", "DOG", 0, 2, "1")] == [0, 1, 1, 0, 2, 1]
    assert find_label("0", names) == 2  # a name wins over an id


def test_labels_in_turn() -> None:
    found = class_weights(["cat", {"dog": 1, 2: 3}], 3, NAMES)
    assert found is not None
    assert found.ids.tolist() == [[0, 0], [1, 2], [0, 0]]
    assert found.weights.tolist() == [[1, 0], [0.25, 0.75], [1, 0]]
    assert class_weights(None, 3, NAMES) is None
    for wrong in ({"cat": 0}, {"cat": 2, "dog": -1}):
        with pytest.raises(UserError, match="must be positive"):
            class_weights(wrong, 1, NAMES)
