"""What the machine can do at most, measured beside the contestants: a plain stack of convolutions, a plain copy.

Nothing that the peak of a data sheet knows counts here: the roof is what the same library reaches when nothing but
well-shaped 3x3 convolutions, channels_last, in the same dtype, are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CHANNELS, SIDE, LAYERS, BATCH = 128, 64, 4, 4
"""Sizes of the stack of layers: large enough to fill the arithmetic units, small enough to stay near the caches."""


def roof_action(dtype: Any, device: str = "cpu", batch: int = BATCH) -> tuple[Callable[[], object], float]:
    """A call of the stack, without gradients, and the floating-point operations in it (2 a multiply-add)."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False) for _ in range(LAYERS)]
    stack = nn.Sequential(*layers).to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch, CHANNELS, SIDE, SIDE, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)

    def run() -> object:
        with torch.inference_mode():
            return stack(x)

    return run, 2.0 * 9 * CHANNELS * CHANNELS * SIDE * SIDE * LAYERS * batch


def copy_action(size_bytes: int) -> tuple[Callable[[], object], int]:
    """A copy between two arrays that are there already, and its bytes."""
    import numpy as np

    source, target = np.ones(size_bytes, np.uint8), np.zeros(size_bytes, np.uint8)
    return lambda: np.copyto(target, source), size_bytes
