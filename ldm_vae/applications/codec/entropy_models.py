"""Which probability table each level gets: from the file itself, from statistics of a set, or from decoded neighbours.

All three walk a channel in passes of positions; within a pass nothing depends on another position of it, so a decoder
follows the encoder exactly. Everything here is integer arithmetic. The tables are `tables`', the coder `coding`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ldm_vae.applications.codec.coding import ESCAPED_BITS, ResidualDecoder, ResidualEncoder
from ldm_vae.applications.codec.integer_network import VALUE_BITS, IntegerNetwork
from ldm_vae.applications.codec.passes import (
    CROSS,
    EARLIER_CHANNELS,
    MARGIN,
    Pass,
    input_count,
    passes,
)
from ldm_vae.applications.codec.quantisation import LARGEST_SYMBOL, STEP_DENOMINATOR
from ldm_vae.applications.codec.tables import (
    ESCAPE,
    FIRST_SCALE_OCTAVE,
    FRACTIONS,
    REACH,
    SCALES,
    SCALES_PER_OCTAVE,
    TOTAL_BITS,
    integer_tables,
    rounded_log2,
    scale_index,
)

RATIO_BITS = 16
"""Of `ratios` and `scales` of a fitted model."""
STEP_BITS = RATIO_BITS + STEP_DENOMINATOR.bit_length() - 1
"""Step times ratio is a step in standard deviations with so many fractional bits."""

Prediction = tuple[np.ndarray, np.ndarray]
"""Offsets (n,) that residuals are taken from, and rows of `probability_tables` (n,), int64."""


class EntropyModel(Protocol):
    """A model for one step."""

    def passes(self, height: int, width: int) -> Iterator[Pass]: ...

    def predict(self, known: np.ndarray, channel: int, part: Pass) -> Prediction:
        """`known`: levels (c, h + 2 margin, w + 2 margin), zero where nothing is known yet."""
        ...


@dataclass(frozen=True)
class StaticModel:
    """One table a channel: rows of scales (c,)."""

    scales: Sequence[int]

    def passes(self, height: int, width: int) -> Iterator[Pass]:
        yield Pass(0, 0, 1, height, width)

    def predict(self, known: np.ndarray, channel: int, part: Pass) -> Prediction:
        count = known[channel][part.window()].size
        return np.zeros(count, np.int64), np.full(count, self.scales[channel] * FRACTIONS, np.int64)


@dataclass(frozen=True)
class ContextModel:
    """A network for each channel and role.

    Args:
        steps: of each channel in standard deviations, `STEP_BITS` fractional bits.
        networks: by (channel, role).
    """

    steps: Sequence[int]
    networks: dict[tuple[int, int], IntegerNetwork]

    def passes(self, height: int, width: int) -> Iterator[Pass]:
        return passes(height, width)

    def predict(self, known: np.ndarray, channel: int, part: Pass) -> Prediction:
        inputs = gather(known, channel, part, self.steps)
        mean, log_scale = self.networks[channel, part.role](inputs).T
        step = self.steps[channel]
        eighths = (mean << (STEP_BITS - VALUE_BITS + 3)) // step
        eighths = eighths.clip(-LARGEST_SYMBOL * FRACTIONS, LARGEST_SYMBOL * FRACTIONS)
        in_steps = log_scale - log2_value(step)
        half = 1 << (VALUE_BITS - 1)
        scale = ((SCALES_PER_OCTAVE * in_steps + half) >> VALUE_BITS) - SCALES_PER_OCTAVE * FIRST_SCALE_OCTAVE
        rows = scale.clip(0, SCALES - 1) * FRACTIONS + (eighths & (FRACTIONS - 1))
        return eighths >> (FRACTIONS.bit_length() - 1), rows


def log2_value(step: int) -> int:
    """log2 of a step in standard deviations, with 10 fractional bits of which four are known."""
    return rounded_log2(step, 1 << STEP_BITS, 16) << (VALUE_BITS - 4)


def gather(known: np.ndarray, channel: int, part: Pass, steps: Sequence[int]) -> np.ndarray:
    """What the network of a pass sees, (n, inputs) int64 with 10 fractional bits, in standard deviations."""
    earlier = range(max(0, channel - EARLIER_CHANNELS), channel)
    seen = [(channel, place) for place in part.neighbours] + [(other, place) for other in earlier for place in CROSS]
    count = known[channel][part.window()].size
    found = np.empty((input_count(channel, part.role), count), np.int64)
    for row, (other, place) in zip(found, seen):
        row[:] = (known[other][part.window(*place)].reshape(-1) * steps[other]) >> (STEP_BITS - VALUE_BITS)
    found[-1] = log2_value(steps[channel])
    return found.T


def standard_steps(step: int, ratios: Sequence[int]) -> list[int]:
    """Steps in standard deviations (`STEP_BITS`) from the step in 1/1024 units and units per deviation."""
    return [step * ratio for ratio in ratios]


def static_model(step: int, ratios: Sequence[int], scales: Sequence[int]) -> StaticModel:
    """The static model of a set at a step. `ratios`, `scales`: 16 fractional bits, in standard deviations."""
    steps = standard_steps(step, ratios)
    return StaticModel(
        [scale_index(scale << (STEP_BITS - RATIO_BITS), width) for scale, width in zip(scales, steps, strict=True)]
    )


def encode(model: EntropyModel, levels: np.ndarray, parts: Sequence[int]) -> list[bytes]:
    """Levels (c, h, w) -> the data of each part; `parts`: the channel that each ends before, the last one c."""
    known, whole = _empty(levels.shape), _with_margin(levels)
    data, encoder = [], ResidualEncoder()
    for channel, plane in enumerate(levels):
        for part in model.passes(*plane.shape):
            offsets, rows = model.predict(known, channel, part)
            values = whole[channel][part.window()]
            encoder.put(values.reshape(-1) - offsets, rows)
            known[channel][part.window()] = values
        if channel + 1 in parts:
            data.append(encoder.finish())
            encoder = ResidualEncoder()
    return data


def decode(
    model: EntropyModel, data: Sequence[bytes], parts: Sequence[int], size: tuple[int, int], where: str
) -> np.ndarray:
    """The inverse for the first parts: levels (k, h, w) of the channels in them. Raises: UserError."""
    height, width = size
    known = _empty((parts[len(data) - 1], height, width))
    first = 0
    for piece, end in zip(data, parts):
        decoder = ResidualDecoder(piece, where)
        for channel in range(first, end):
            for part in model.passes(height, width):
                offsets, rows = model.predict(known, channel, part)
                place = known[channel][part.window()]
                place[:] = (decoder.take(rows) + offsets).reshape(place.shape)
        decoder.finish()
        first = end
    return known[:, MARGIN : MARGIN + height, MARGIN : MARGIN + width]


def ideal_bits(model: EntropyModel, levels: np.ndarray) -> float:
    """-sum of log2 of the model's own probabilities: what a perfect coder would need."""
    known, whole = _empty(levels.shape), _with_margin(levels)
    bits, tables = 0.0, integer_tables()
    for channel, plane in enumerate(levels):
        for part in model.passes(*plane.shape):
            offsets, rows = model.predict(known, channel, part)
            values = whole[channel][part.window()]
            residuals = values.reshape(-1) - offsets
            escaped = np.abs(residuals) > REACH
            weights = tables[rows, np.where(escaped, ESCAPE, residuals + REACH)]
            bits += float((TOTAL_BITS - np.log2(np.maximum(weights, 0.25))).sum()) + ESCAPED_BITS * int(escaped.sum())
            known[channel][part.window()] = values
    return bits


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    channels, height, width = shape
    return np.zeros((channels, height + 2 * MARGIN, width + 2 * MARGIN), np.int64)


def _with_margin(levels: np.ndarray) -> np.ndarray:
    return np.pad(levels, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
