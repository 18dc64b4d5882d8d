"""The order in which a channel's positions are coded with context, and the neighbours that are known at each.

A coarse grid of every eighth position first, then, at distances 4, 2 and 1, the centres of its squares and the middles
of their sides: about half of all positions have all four direct neighbours. Before a channel, all earlier channels are
known everywhere. What is made of the neighbours is `integer_network`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

COARSEST = 8
MARGIN = 3 * COARSEST // 2
"""Farthest neighbour, at distance 3 * 4; unknown places beyond the border count as the channel's mean."""
EARLIER_CHANNELS = 16
"""At most so many channels directly before one are its context."""
CROSS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))

_CENTRES = [(y, x) for y in (-1, 1) for x in (-1, 1)]
_CENTRES += [(y, x) for y in (-3, -1, 1, 3) for x in (-3, -1, 1, 3) if abs(y) + abs(x) == 4]
_SIDES = [(0, -1), (0, 1), (-1, 0), (1, 0), (0, -3), (0, 3), (-3, 0), (3, 0)]
_SIDES += [(y, x) for y in (-2, 2) for x in (-1, 1)] + [(y, x) for y in (-1, 1) for x in (-2, 2)]
_LAST = [*_SIDES, *((y, x) for y in (-1, 1) for x in (-1, 1))]
NEIGHBOURS: tuple[tuple[tuple[int, int], ...], ...] = ((), tuple(_CENTRES), tuple(_SIDES), tuple(_LAST))
"""(down, right) in units of the distance, of the coarse grid, centres, horizontal and vertical middles."""
ROLES = 7
"""Networks of a channel: the coarse grid; three places at distances 4 and 2; three at distance 1."""


@dataclass(frozen=True)
class Pass:
    """Positions of a plane (height, width) that are coded together: each `period`th row and column from a first one.

    Args:
        distance: of the nearest neighbours, in positions.
        place: which neighbours there are, an index into `NEIGHBOURS`.
        role: the network that predicts, 0 to `ROLES` - 1.
    """

    top: int
    left: int
    period: int
    height: int
    width: int
    distance: int = 1
    place: int = 0
    role: int = 0

    def window(self, down: int = 0, right: int = 0) -> tuple[slice, slice]:
        """These positions, or their neighbours so many rows and columns off, in a plane with a margin around it."""
        return (
            slice(MARGIN + self.top + down, MARGIN + self.height + down, self.period),
            slice(MARGIN + self.left + right, MARGIN + self.width + right, self.period),
        )

    @property
    def neighbours(self) -> list[tuple[int, int]]:
        """(down, right) in positions."""
        return [(down * self.distance, right * self.distance) for down, right in NEIGHBOURS[self.place]]


def passes(height: int, width: int) -> Iterator[Pass]:
    """Every position of a channel (height, width) once, in coding order; empty passes are left out."""
    yield Pass(0, 0, COARSEST, height, width)
    for distance in (4, 2, 1):
        for place, (top, left) in enumerate(((distance, distance), (0, distance), (distance, 0)), start=1):
            if top < height and left < width:
                role = place + (3 if distance == 1 else 0)
                yield Pass(top, left, 2 * distance, height, width, distance, place, role)


def input_count(channel: int, role: int) -> int:
    """Numbers that the network of a role sees: neighbours, the cross in each earlier channel, the step."""
    place = role if role < 4 else role - 3
    return len(NEIGHBOURS[place]) + len(CROSS) * min(channel, EARLIER_CHANNELS) + 1
