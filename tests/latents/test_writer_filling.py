"""Shards on their way: what the writer of an encoding waits for."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from ldm_vae.latents.writer import Writer
from ldm_vae.training.watchdog import SOLO_FACTOR, Watchdog


def test_a_shard_with_a_long_way_is_no_standstill():
    """To a remote folder over a slow line the last shard may take longer than a step."""
    output: Any = None
    with Watchdog(SimpleNamespace(process_index=0, num_processes=1), timeout_seconds=1000) as dog:

        def publish() -> bool:
            deadline = time.monotonic() + 20
            while dog._allowed_seconds != 1000 * SOLO_FACTOR and time.monotonic() < deadline:
                time.sleep(0.01)
            return dog._allowed_seconds == 1000 * SOLO_FACTOR

        dog.advance(1)
        with Writer(output) as writer:
            writer.pending = writer.thread.submit(publish)
        assert writer.pending.result()
