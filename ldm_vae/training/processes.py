"""The processes of one job: starting, waiting for one another, deciding together.

A collective of tensors has `timeout_seconds`. Where one process works and the others wait (validation, saving, the last
shard), they wait on a group of their own, as long as the watchdog sees signs of life.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch

from ldm_vae.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ldm_vae.training import watchdog
from ldm_vae.training.signals import die_with_launcher

TIMEOUT_SECONDS = 300
"""The longest wait of a process for the others, for its data, for anything: default of every command."""

LONGEST_WAIT = timedelta(hours=24)
"""Of a process that has finished its share for the slowest one. Whether that one gets on is the watchdog's business."""

POLL_SECONDS = 0.001

Answer = TypeVar("Answer")

_patient: Any = None


class LaunchSettings(Protocol):
    """What every command that runs on several processes is configured with."""

    @property
    def device(self) -> str: ...

    @property
    def processes(self) -> int | None: ...

    @property
    def timeout_seconds(self) -> int: ...


def open_accelerator(settings: LaunchSettings, where: str = "", **options: Any) -> Any:
    """An Accelerator on the device and processes asked for; `options` are its own. `where`: of the keys, for messages.

    Raises:
        UserError: the device or the number of processes is not there.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.processes is not None and settings.processes != launched:
        raise UserError(
            f"{where}processes: {settings.processes} were asked for, {launched} started; launch with `torchrun "
            f"--nproc_per_node {settings.processes}`, or on CPU `accelerate launch --multi_gpu --num_processes "
            f"{settings.processes}` with {where}device=cpu"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{where}device: cuda was asked for, and torch sees no CUDA device; set {where}device=auto")
    die_with_launcher()
    timeout = timedelta(seconds=settings.timeout_seconds)
    join_restarted("gloo" if is_on_cpu(settings) else "nccl", timeout)
    handlers = [InitProcessGroupKwargs(timeout=timeout)]
    accelerator = Accelerator(cpu=is_on_cpu(settings), kwargs_handlers=handlers, **options)
    if accelerator.num_processes > 1:
        patient_group()
    return accelerator


def join_restarted(backend: str, timeout: timedelta) -> None:
    """After a restart by torchrun on one machine: form the process group under keys of this attempt.

    torchrun keeps one store for all attempts, where the addresses of the dead processes still stand (pytorch#135712).
    Its count of restarts is the same everywhere on one machine only; on several, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE
    to 1 for torchrun.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from torch import distributed

    if distributed.is_initialized():
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, is_master=False, timeout=timeout)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store_of_attempt = distributed.PrefixStore(f"attempt {attempt}", store)
    distributed.init_process_group(backend, store=store_of_attempt, rank=rank, world_size=processes, timeout=timeout)


def is_on_cpu(settings: LaunchSettings) -> bool:
    return settings.device == "cpu" or not torch.cuda.is_available()


def check_timeout(seconds: int, where: str = "") -> None:
    """Raises: UserError when it is no time to wait."""
    if seconds < 1:
        raise UserError(f"{where}timeout_seconds: {seconds} is below 1; the default is {TIMEOUT_SECONDS}")


def patient_group() -> Any:
    """The group for waiting, on the CPU: all processes must ask for it first at the same place."""
    global _patient
    from torch import distributed

    if _patient is None:
        _patient = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return _patient


def close_accelerator(accelerator: Any, failure: BaseException | None = None) -> None:
    """End its trackers and leave the other processes. Nothing else may hold a group then, see `Engine.close`.

    After a failure messages may be on their way that nobody will answer, and torch waits for them at the end of the
    program, for as long as the group allows: the program then ends without that.
    """
    global _patient
    if failure is not None and accelerator.num_processes > 1:
        for tracker in accelerator.trackers:
            tracker.finish()
        atexit.register(leave, exit_code(failure))
        return
    _patient = None
    accelerator.end_training()


def leave(code: int) -> None:
    """End this process and its children now."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def exit_code(failure: BaseException) -> int:
    """That of a command which ends by this."""
    if isinstance(failure, UserError):
        return EXIT_USER_ERROR
    if isinstance(failure, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return failure.code if isinstance(failure, SystemExit) and isinstance(failure.code, int) else 1


def wait_for_all(accelerator: Any) -> None:
    """Until every process is here.

    Raises:
        UserError: one of them is gone; it names which.
    """
    if accelerator.num_processes == 1:
        return
    from torch import distributed

    with watchdog.waiting():
        wait(distributed.barrier(group=patient_group(), async_op=True))


def wait(work: Any) -> None:
    """For a message on its way, open to signals. Raises: UserError that names the process which is gone."""
    try:
        while not work.is_completed():
            time.sleep(POLL_SECONDS)
        work.wait()
    except RuntimeError as error:
        explained = watchdog.explained(error)
        if explained is None:
            raise
        raise explained from error


def main_decides(accelerator: Any, decide: Callable[[], Answer]) -> Answer:
    """Run `decide` in the main process and tell all of them the answer. Its error ends them all, and is shown once."""
    from torch import distributed

    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        with watchdog.solo():
            try:
                told[0] = decide()
            except UserError as error:
                told[1] = str(error)
    wait_for_all(accelerator)
    if accelerator.num_processes > 1:
        distributed.broadcast_object_list(told, group=patient_group())
    if told[1] is not None:
        raise UserError(told[1]) if accelerator.is_main_process else SystemExit(EXIT_USER_ERROR)
    return told[0]
