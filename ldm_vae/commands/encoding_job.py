"""Running a job that encodes, and leaving it: shared by `encode`, `latents append` and `latents repair`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def run_job(config: Any, job: Callable[[Any, Any], int]) -> int:
    """`job(config, accelerator)` on the device and processes that the config asks for. Returns: its exit code."""
    import signal

    from ldm_vae.latents.encode import make_accelerator
    from ldm_vae.training.signals import die_with_launcher

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # files are published whole: leaving is always safe
    die_with_launcher()
    accelerator = make_accelerator(config)
    try:
        return job(config, accelerator)
    finally:
        accelerator.end_training()
