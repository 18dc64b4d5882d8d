"""The context network in integers: two hidden layers and a linear path, the same numbers on every machine.

Values carry 10 fractional bits, weights 12. Every product and sum is an integer below 2**53, so that float64 matrix
products are exact in whatever order a library adds them up. Owns the arithmetic and the layout of the weights; training
is `fitting`'s, the meaning of inputs and outputs `entropy_models`'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VALUE_BITS = 10
WEIGHT_BITS = 12
HIDDEN = 24
OUTPUTS = 2
"""A mean and the log2 of a scale."""
LARGEST_VALUE = 16 << VALUE_BITS
LARGEST_ACTIVATION = 32 << VALUE_BITS
LARGEST_WEIGHT = (1 << 15) - 1


def shapes(inputs: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a network of so many inputs."""
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
