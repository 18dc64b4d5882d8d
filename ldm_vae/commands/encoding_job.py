"""Running a job that encodes, and leaving it: shared by `encode`, `latents append` and `latents repair`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def run_job(config: Any, job: Callable[[Any, Any], int]) -> int:
    """`job(config, accelerator)` on the device and processes that the config asks for. Returns: its exit code."""
    from ldm_vae.errors import UserError
    from ldm_vae.latents.encode import make_accelerator
    from ldm_vae.training.loader import loss_of_worker
    from ldm_vae.training.processes import close_accelerator
    from ldm_vae.training.signals import StopRequest
    from ldm_vae.training.watchdog import Watchdog

    with StopRequest(at_once=True):  # files are published whole: leaving is always safe
        accelerator = make_accelerator(config)
        with Watchdog(accelerator, config.timeout_seconds):
            failure: BaseException | None = None
            try:
                return job(config, accelerator)
            except BaseException as error:
                reason = loss_of_worker(error)
                failure = UserError(reason) if reason else error
                if failure is error:
                    raise
                raise failure from error
            finally:
                close_accelerator(accelerator, failure)
