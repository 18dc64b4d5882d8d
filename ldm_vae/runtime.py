"""The one place that repairs a mismatch between installed packages.

A CPU-only torch beside the package index's CUDA-built torchvision makes `import torchvision` (hence `lpips` and
diffusers' models) die with "operator torchvision::nms does not exist": torchvision registers fake kernels for two
operators whose compiled library did not load. Defining the two schemas first cures the import. Nothing of ours
calls non-maximum suppression; calling it still fails, as it should.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_libraries: list[object] = []  # torch.library.Library objects undo their definitions when collected


def repair_torchvision() -> None:
    """Make `import torchvision` work beside a torch of another build. Does nothing where they match."""
    import importlib.util
    import sys

    if _libraries or "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        import torchvision  # noqa: F401


# What a computation costs, counted and not timed.


def gigamacs(function: Callable[[], Any]) -> float:
    """Multiply-accumulates of a call in 10^9: half the FLOPs of torch's counter, attention on CPU included, which it
    does not know by itself. The call must compute in this thread."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def count(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        function()
    return counter.get_total_flops() / 2e9


# How the C library of this process hands out memory: a choice for a whole program, which the commands make.

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`, from malloc.h."""

KEPT_BYTES = 2**31 - 1
"""Of freed memory, at most; what `mallopt` can express."""


@functools.cache
def reuse_freed_memory() -> bool:
    """Let the C library of this process keep freed memory for the next large tensor; whether it can (glibc).

    It hands large blocks back to the kernel, which clears each page when it is touched again: for a feature map of
    100 MB that takes 5 times as long as computing it. At most `KEPT_BYTES` are kept at the end of the heap.
    """
    import ctypes  # not for every --help

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; TypeError: Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
