"""The grid that latents are rounded to: from the setting `quality` to a step, and from the step to integers.

A step is given in units that belong to each channel: the posterior's standard deviation, which says how exactly the
decoder wants the channel where a rate was held; for latents without a posterior a twelfth of their own standard
deviation. Steps are multiples of 1/1024, so that integer arithmetic can follow them. How latents are rounded is the
encoder's matter: any integers make a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from math import isqrt
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ldm_vae.errors import UserError

STEP_DENOMINATOR = 1024
STEP_AT_MIDDLE = 2.0
QUALITIES = (1.0, 100.0)
QUALITY_PER_OCTAVE = 12.0
"""So many points of quality halve the step."""
DETERMINISTIC_SHARE = 12.0
NARROWEST_SHARE = 128.0
"""A posterior narrower than such a part of the latents' deviation was held to no rate: it says nothing."""
LARGEST_SYMBOL = 16383
DIFFUSED = 0.75
"""The part of a rounding error that its neighbors make up for. All of it would cost more bytes than it is worth."""
DIFFUSED_TO = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))
"""(down, right, share of that part) of the neighbors. Source: Floyd and Steinberg 1976."""
COARSEST_DIFFUSED = 4 * STEP_DENOMINATOR
"""Decoders smooth away about as much noise as they were trained with: that of a coarser step remains as texture. Then a
context model, too, which writes equal levels for nothing, takes more bytes than for a finer step that is as good."""


def step_of(quality: float) -> int:
    """The step in 1/1024 units for a quality from 1 to 100: 50 is 2 units. Raises: UserError."""
    low, high = QUALITIES
    if not low <= quality <= high:
        raise UserError(f"quality: {quality:g} is not between {low:g} and {high:g}; 50 suits most pictures")
    return round(STEP_DENOMINATOR * STEP_AT_MIDDLE * 2.0 ** ((50.0 - quality) / QUALITY_PER_OCTAVE))


def diffused_levels(values: np.ndarray) -> np.ndarray:
    """Numbers (..., h, w) -> a whole number near each, less than 1 off, so that errors cancel among neighbors.

    Where values hardly change, plain rounding errs alike everywhere: a decoder smooths noise away, and turns that into
    a color. Positions of one x + 2 y do not depend on each other and are rounded together.
    """
    height, width = values.shape[-2:]
    adjusted = np.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, 1), (1, 1)])  # a border takes what leaves the plane
    levels = np.empty_like(values)
    for front in range(width + 2 * height - 2):
        y = np.arange(max(0, (front - width) // 2 + 1), min(height, front // 2 + 1))
        x = front - 2 * y
        given = adjusted[..., y, x + 1]
        levels[..., y, x] = np.rint(given)
        error = DIFFUSED * (given - levels[..., y, x])
        for down, right, share in DIFFUSED_TO:
            adjusted[..., y + down, x + right + 1] += share * error
    return levels


class TooFine(UserError):
    """Latents have no levels at this step; at a larger one they may."""


@dataclass(frozen=True)
class Grid:
    """Where the levels of each channel lie: `mean` + integer * `unit` * step, (c,) float64 each; step in 1/1024."""

    mean: np.ndarray
    unit: np.ndarray
    step: int

    @property
    def width(self) -> np.ndarray:
        """Distance of two levels in each channel, (c, 1, 1)."""
        return (self.unit * (self.step / STEP_DENOMINATOR))[:, None, None]

    def quantize(self, latents: np.ndarray, where: str) -> np.ndarray:
        """Latents (..., c, h, w) -> `diffused_levels`, at coarse steps the nearest level of each, int64.

        Raises:
            TooFine: they span too many levels.
            UserError: they are not finite.
        """
        if not np.isfinite(latents).all():
            raise UserError(f"{where}: the autoencoder gives latents that are not finite; it is damaged or diverged")
        values = (latents - self.mean[:, None, None]) / self.width
        levels = diffused_levels(values) if self.step <= COARSEST_DIFFUSED else np.rint(values)
        if np.abs(levels).max(initial=0) > LARGEST_SYMBOL:
            raise TooFine(f"{where}: its latents span more than {LARGEST_SYMBOL} steps; take a lower quality")
        return levels.astype(np.int64)

    def restore(self, levels: np.ndarray) -> np.ndarray:
        """Levels (k, h, w) of the first k channels -> latents, float32."""
        first = len(levels)
        return (self.mean[:first, None, None] + levels * self.width[:first]).astype(np.float32)


def channel_units(mean: Tensor, logvar: Tensor | None) -> np.ndarray:
    """Units of each channel, (c,) float64, of moments (n, c, h, w); `logvar` None: the latents have no posterior."""
    deviation = mean.double().std(dim=(0, 2, 3), correction=0)
    if logvar is not None:
        units = logvar.double().exp().mean(dim=(0, 2, 3)).sqrt().maximum(deviation / NARROWEST_SHARE)
    else:
        units = deviation / DETERMINISTIC_SHARE
    return units.clamp_min(1e-4).cpu().numpy()


def channel_means(mean: Tensor) -> np.ndarray:
    """(c,) float64 of latents (n, c, h, w)."""
    return mean.double().mean(dim=(0, 2, 3)).cpu().numpy()


# The context network in integers: two hidden layers and a linear path, the same numbers on every machine.

VALUE_BITS = 10
WEIGHT_BITS = 12
HIDDEN = 24
OUTPUTS = 2
"""A mean and the log2 of a scale."""
LARGEST_VALUE = 16 << VALUE_BITS
LARGEST_ACTIVATION = 32 << VALUE_BITS
LARGEST_WEIGHT = (1 << 15) - 1


def shapes(inputs: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a network with this number of inputs."""
    return {
        "first": (inputs, HIDDEN), "first_bias": (HIDDEN,), "second": (HIDDEN, HIDDEN), "second_bias": (HIDDEN,),
        "last": (HIDDEN, OUTPUTS), "direct": (inputs, OUTPUTS), "last_bias": (OUTPUTS,),
    }  # fmt: skip


def weight_count(inputs: int) -> int:
    return sum(int(np.prod(shape)) for shape in shapes(inputs).values())


@dataclass(frozen=True)
class IntegerNetwork:
    """Tensors by name as in `shapes`: whole numbers in float64, 12 fractional bits."""

    tensors: dict[str, np.ndarray]

    @classmethod
    def from_flat(cls, weights: np.ndarray, inputs: int) -> IntegerNetwork:
        """From all weights one after another, int16 (`weight_count(inputs)`,)."""
        tensors, start = {}, 0
        for name, shape in shapes(inputs).items():
            size = int(np.prod(shape))
            tensors[name] = weights[start : start + size].reshape(shape).astype(np.float64)
            start += size
        return cls(tensors)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(n, inputs) integers with 10 fractional bits -> (n, 2) likewise, int64."""
        t = self.tensors
        inputs = values.clip(-LARGEST_VALUE, LARGEST_VALUE).astype(np.float64)
        hidden = _activated(inputs @ t["first"], t["first_bias"])
        hidden = _activated(hidden @ t["second"], t["second_bias"])
        return _rescaled(hidden @ t["last"] + inputs @ t["direct"], t["last_bias"])


def flat_weights(tensors: dict[str, np.ndarray], inputs: int) -> np.ndarray:
    """Float tensors by name -> int16, rounded to 12 fractional bits and limited to +-8."""
    rows = [np.asarray(tensors[name], np.float64).reshape(-1) for name in shapes(inputs)]
    scaled = np.rint(np.concatenate(rows) * (1 << WEIGHT_BITS))
    return scaled.clip(-LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.int16)


def _rescaled(sums: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Sums with 22 fractional bits and a bias with 12 -> int64 with 10, rounded."""
    whole = sums.astype(np.int64) + (bias.astype(np.int64) << VALUE_BITS)
    return (whole + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS


def _activated(sums: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The part between 0 and 32, as whole numbers in float64."""
    return _rescaled(sums, bias).clip(0, LARGEST_ACTIVATION).astype(np.float64)


# Integer probability tables of a quantized logistic distribution, the same numbers on every machine.

TOTAL_BITS = 22
"""Weights sum to 2**22: a weight over the sum is exact in float32, and so are sums of them in any order."""
FRACTIONS = 8
"""Means within a step: 0, 1/8 ... 7/8."""
SCALES = 41
"""2**-4, 2**-3.75 ... 2**6 steps."""
SCALES_PER_OCTAVE = 4
FIRST_SCALE_OCTAVE = -4
REACH = 255
ESCAPE = 2 * REACH + 1

SAMPLES_PER_UNIT = 64
SAMPLED_REACH = 16
POSITION_BITS = 16


@lru_cache(maxsize=1)
def probability_tables() -> np.ndarray:
    """(SCALES * FRACTIONS, 512) float32: the table of scale j and fraction f is row j * FRACTIONS + f. Read-only."""
    tables = (integer_tables() / float(1 << TOTAL_BITS)).astype(np.float32)
    tables.flags.writeable = False
    return tables


@lru_cache(maxsize=1)
def integer_tables() -> np.ndarray:
    """The weights, int64, each row summing to 2**22; a weight of 0 gets the coder's smallest probability."""
    curve = _sampled_logistic()
    residuals = np.arange(-REACH - 1, REACH + 1, dtype=np.int64)
    tables = np.empty((SCALES * FRACTIONS, ESCAPE + 1), np.int64)
    for scale in range(SCALES):
        for fraction in range(FRACTIONS):
            edges = 16 * residuals + 8 - 2 * fraction  # upper edges of the residuals, in sixteenths of a step
            cumulative = _interpolated(curve, edges * _inverse_scale(scale))
            weights = np.diff(cumulative)
            tables[scale * FRACTIONS + fraction] = [*weights, (1 << TOTAL_BITS) - int(weights.sum())]
    tables.flags.writeable = False
    return tables


def _sampled_logistic() -> np.ndarray:
    """1 / (1 + exp(-x)) times 2**22 at x = -16, -16 + 1/64 ... 16, rounded, int64."""
    with localcontext() as context:
        context.prec = 30
        half = [
            int((Decimal(1 << TOTAL_BITS) / (1 + (-Decimal(k) / SAMPLES_PER_UNIT).exp())).to_integral_value())
            for k in range(SAMPLES_PER_UNIT * SAMPLED_REACH + 1)
        ]
    return np.array([*((1 << TOTAL_BITS) - value for value in half[:0:-1]), *half], np.int64)


def _inverse_scale(scale: int) -> int:
    """64 samples per unit over the scale, for edges in sixteenths of a step: 2**(6 - scale / 4) with 16 more bits."""
    return isqrt(isqrt(1 << (4 * (POSITION_BITS + 6) - scale)))


def _interpolated(curve: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The curve at positions in samples from its center, with 16 fractional bits; level beyond its ends."""
    center = SAMPLES_PER_UNIT * SAMPLED_REACH
    whole = (positions >> POSITION_BITS).clip(-center, center - 1)
    rest = (positions - (whole << POSITION_BITS)).clip(0, 1 << POSITION_BITS)
    low, high = curve[whole + center], curve[whole + center + 1]
    return low + ((high - low) * rest >> POSITION_BITS)


def rounded_log2(numerator: int, denominator: int, per_octave: int) -> int:
    """floor(per_octave * log2(numerator / denominator)) of positive integers, exactly."""
    above, below = numerator**per_octave, denominator**per_octave
    result = above.bit_length() - below.bit_length()
    larger = above >= below << result if result >= 0 else above << -result >= below
    return result if larger else result - 1


def scale_index(scale_numerator: int, scale_denominator: int) -> int:
    """The row of scales that is nearest to a scale in steps, given as a fraction of positive integers."""
    eighths = rounded_log2(scale_numerator, scale_denominator, 2 * SCALES_PER_OCTAVE)
    return min(max((eighths + 1) // 2 - SCALES_PER_OCTAVE * FIRST_SCALE_OCTAVE, 0), SCALES - 1)


def best_scale(symbols: np.ndarray) -> int:
    """The scale (fraction 0) that codes integer symbols of any shape in the fewest bits."""
    clipped = np.where(np.abs(symbols) > REACH, ESCAPE - REACH, symbols).reshape(-1) + REACH
    counts = np.bincount(clipped, minlength=ESCAPE + 1)
    return int(np.argmin(-(np.log2(np.maximum(integer_tables()[::FRACTIONS], 0.25)) @ counts)))


# Integers through the range coder of `constriction`, each with its own table. Knows nothing of images or files.

ESCAPED_BITS = 16
LARGEST_RESIDUAL = (1 << (ESCAPED_BITS - 1)) - 1
CHUNK = 8192
"""Symbols handed over at a time: each brings 2 KB of table."""


def _library() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise UserError("codec: needs the package constriction; run pip install constriction") from error
    return constriction


class ResidualEncoder:
    """Appends residuals; `finish` gives the bytes, a multiple of four."""

    def __init__(self) -> None:
        library = _library()
        self._coder = library.stream.queue.RangeEncoder()
        self._tables = library.stream.model.Categorical(perfect=False)
        self._uniform = library.stream.model.Uniform(1 << ESCAPED_BITS)

    def put(self, residuals: np.ndarray, rows: np.ndarray) -> None:
        """Integers (n,) up to +-32767, and the row of `tables.probability_tables` of each."""
        tables = probability_tables()
        for start in range(0, len(residuals), CHUNK):
            part = residuals[start : start + CHUNK]
            escaped = np.abs(part) > REACH
            symbols = np.where(escaped, ESCAPE, part + REACH).astype(np.int32)
            self._coder.encode(symbols, self._tables, tables[rows[start : start + CHUNK]])
            if escaped.any():
                self._coder.encode((part[escaped] + LARGEST_RESIDUAL).astype(np.int32), self._uniform)

    def finish(self) -> bytes:
        return self._coder.get_compressed().astype("<u4").tobytes()


class ResidualDecoder:
    """The inverse, over bytes whose checksum was compared: what is wrong then was never written by the encoder."""

    def __init__(self, data: bytes, where: str) -> None:
        library = _library()
        self._where = where
        self._coder = library.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        self._tables = library.stream.model.Categorical(perfect=False)
        self._uniform = library.stream.model.Uniform(1 << ESCAPED_BITS)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The next residuals (n,), int64. Raises: UserError for data that no encoder wrote."""
        tables, found = probability_tables(), []
        try:
            for start in range(0, len(rows), CHUNK):
                part = self._coder.decode(self._tables, tables[rows[start : start + CHUNK]]).astype(np.int64)
                escaped = part == ESCAPE
                part -= REACH
                if escaped.any():
                    part[escaped] = self._coder.decode(self._uniform, int(escaped.sum())) - LARGEST_RESIDUAL
                found.append(part)
        except AssertionError as error:  # how constriction says it
            raise damaged(self._where) from error
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def finish(self) -> None:
        """Raises: UserError where data is left over."""
        if not self._coder.maybe_exhausted():
            raise damaged(self._where)


def damaged(where: str) -> UserError:
    return UserError(f"{where}: is damaged (its data do not decode); fetch it again, or compress the picture again")


# The order in which a channel's positions are coded with context, and the neighbors that are known at each.

COARSEST = 8
MARGIN = 3 * COARSEST // 2
"""Farthest neighbor, at distance 3 * 4; unknown places beyond the border count as the channel's mean."""
EARLIER_CHANNELS = 16
"""Largest number of preceding channels in the context of a channel."""
CROSS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))

_CENTERS = [(y, x) for y in (-1, 1) for x in (-1, 1)]
_CENTERS += [(y, x) for y in (-3, -1, 1, 3) for x in (-3, -1, 1, 3) if abs(y) + abs(x) == 4]
_SIDES = [(0, -1), (0, 1), (-1, 0), (1, 0), (0, -3), (0, 3), (-3, 0), (3, 0)]
_SIDES += [(y, x) for y in (-2, 2) for x in (-1, 1)] + [(y, x) for y in (-1, 1) for x in (-2, 2)]
_LAST = [*_SIDES, *((y, x) for y in (-1, 1) for x in (-1, 1))]
NEIGHBORS: tuple[tuple[tuple[int, int], ...], ...] = ((), tuple(_CENTERS), tuple(_SIDES), tuple(_LAST))
"""(down, right) in units of the distance, of the coarse grid, centers, horizontal and vertical middles."""
ROLES = 7
"""Networks of a channel: the coarse grid; three places at distances 4 and 2; three at distance 1."""


@dataclass(frozen=True)
class Pass:
    """Positions of a plane (height, width) that are coded together: each `period`th row and column from a first one.

    Args:
        distance: of the nearest neighbors, in positions.
        place: which neighbors there are, an index into `NEIGHBORS`.
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
        """These positions, or their neighbors at this offset in rows and columns, in a plane with a margin."""
        return (
            slice(MARGIN + self.top + down, MARGIN + self.height + down, self.period),
            slice(MARGIN + self.left + right, MARGIN + self.width + right, self.period),
        )

    @property
    def neighbors(self) -> list[tuple[int, int]]:
        """(down, right) in positions."""
        return [(down * self.distance, right * self.distance) for down, right in NEIGHBORS[self.place]]


def passes(height: int, width: int) -> Iterator[Pass]:
    """Every position of a channel (height, width) once, in coding order; empty passes are left out."""
    yield Pass(0, 0, COARSEST, height, width)
    for distance in (4, 2, 1):
        for place, (top, left) in enumerate(((distance, distance), (0, distance), (distance, 0)), start=1):
            if top < height and left < width:
                role = place + (3 if distance == 1 else 0)
                yield Pass(top, left, 2 * distance, height, width, distance, place, role)


def input_count(channel: int, role: int) -> int:
    """Numbers that the network of a role sees: neighbors, the cross in each earlier channel, the step."""
    place = role if role < 4 else role - 3
    return len(NEIGHBORS[place]) + len(CROSS) * min(channel, EARLIER_CHANNELS) + 1


# Which probability table each level gets: from the file itself, from statistics of a set, or from decoded neighbors.

RATIO_BITS = 16
"""Fractional bits of `ratios` and `scales` of a fitted model."""
STEP_BITS = RATIO_BITS + STEP_DENOMINATOR.bit_length() - 1
"""Fractional bits of step times ratio, which is a step in standard deviations."""

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
        inputs = context_inputs(known, channel, part, self.steps)
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


def context_inputs(known: np.ndarray, channel: int, part: Pass, steps: Sequence[int]) -> np.ndarray:
    """What the network of a pass sees, (n, inputs) int64 with 10 fractional bits, in standard deviations."""
    earlier = range(max(0, channel - EARLIER_CHANNELS), channel)
    places = [(channel, place) for place in part.neighbors] + [(other, place) for other in earlier for place in CROSS]
    count = known[channel][part.window()].size
    found = np.empty((input_count(channel, part.role), count), np.int64)
    for row, (other, place) in zip(found, places):
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


def encode_levels(model: EntropyModel, levels: np.ndarray, parts: Sequence[int]) -> list[bytes]:
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


def decode_levels(
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
