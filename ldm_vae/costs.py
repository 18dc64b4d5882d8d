"""What a computation costs, counted and not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
