"""Every position is coded once, and only after its neighbors."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.applications.codec.entropy_models import MARGIN, ROLES, input_count, passes


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (5, 9), (1, 30), (17, 3), (40, 33)])
def test_every_position_once_and_after_its_neighbors(height, width):
    order = np.full((height + 2 * MARGIN, width + 2 * MARGIN), -1)
    roles = set()
    for number, part in enumerate(passes(height, width)):
        own = order[part.window()]
        assert own.size
        assert (own == -1).all()
        for place in part.neighbors:
            near = order[part.window(*place)]
            assert near.shape == own.shape
            inside = _inside(part, place, height, width)
            assert (near[inside] >= 0).all(), place
            assert (near[~inside] == -1).all()
        own[:] = number
        roles.add(part.role)
    assert (order[MARGIN : MARGIN + height, MARGIN : MARGIN + width] >= 0).all()
    assert roles <= set(range(ROLES))


def _inside(part, place, height, width):
    rows = np.arange(part.top, height, part.period) + place[0]
    columns = np.arange(part.left, width, part.period) + place[1]
    return ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]


def test_a_network_sees_neighbors_earlier_channels_and_the_step():
    assert input_count(0, 0) == 1
    assert input_count(2, 0) == 11
    assert input_count(0, 1) == input_count(0, 4) == 13
    assert input_count(40, 3) == 21 + 80
