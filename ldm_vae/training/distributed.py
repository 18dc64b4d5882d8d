"""The processes of one job: starting, waiting for one another, deciding together, sharing work.

`open_accelerator` joins them for training and encoding, `joined_processes` for measuring. A collective of tensors has
`timeout_seconds`. Where one process works and the others wait (validation, saving, the last shard), they wait on a
group of their own, as long as the watchdog receives heartbeats.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ldm_vae.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ldm_vae.runtime import check_accelerate, compute_device
from ldm_vae.training import watchdog
from ldm_vae.training.watchdog import die_with_launcher
from ldm_vae.utils.progress import say

TIMEOUT_SECONDS = 300
"""The default of `timeout_seconds`: the longest wait of a process for its data or for other processes."""

LONGEST_WAIT = timedelta(hours=24)
"""The longest wait of a finished process for the slowest one. If that one hangs, its watchdog ends it."""

POLL_SECONDS = 0.001

Answer = TypeVar("Answer")
Item = TypeVar("Item")

_patient: Any = None
_opened = False
"""Whether the Accelerator of this process is one that this module opened and that is not closed."""


class LaunchSettings(Protocol):
    """The settings of every command that runs on several processes."""

    @property
    def device(self) -> str: ...

    @property
    def processes(self) -> int | None: ...

    @property
    def timeout_seconds(self) -> int: ...


class Place(Protocol):
    """This process's place in its job: an Accelerator, or `Processes`."""

    @property
    def process_index(self) -> int: ...

    @property
    def num_processes(self) -> int: ...

    @property
    def is_main_process(self) -> bool: ...


def open_accelerator(
    settings: LaunchSettings, where: str = "", *, mixed_precision: str | None = None, **options: Any
) -> Any:
    """An Accelerator on the device and processes asked for, whatever accelerate's own configuration says.

    Accelerate takes what its arguments leave open from the environment: gradient accumulation, which would divide the
    loss a second time, precision, compilation and plugins. What this program decides is given here, plugins are
    refused, and what has no effect is said.

    Args:
        settings: device, processes and time limit.
        where: of the keys, for messages.
        mixed_precision: of `accelerator.autocast`; None where it is not used.
        options: further arguments of the Accelerator.

    Raises:
        UserError: the device or the number of processes is not there, accelerate is set up for a plugin, or another
            Accelerator with another precision is in this process.
    """
    global _opened
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    launched = check_launched(settings.processes, where)
    device = compute_device(settings.device, where=where)
    forget_accelerator()  # of a call that ended before `close_accelerator`
    if not AcceleratorState._shared_state and launched == 1:
        PartialState._reset_state()  # `generate` keeps its device in it
    of_others = AcceleratorState().mixed_precision if AcceleratorState._shared_state else None
    if of_others is not None and mixed_precision not in (None, of_others):
        what = f"an Accelerator with mixed_precision={of_others} is in this process, and {mixed_precision} is asked for"
        raise UserError(f"{where}precision", what, "start a process of its own for this")
    die_with_launcher()
    timeout = timedelta(seconds=settings.timeout_seconds)
    join_restarted("gloo" if device.type == "cpu" else "nccl", timeout)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=mixed_precision or of_others or "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        **options,
    )
    _opened = of_others is None
    if accelerator.device.type != device.type:
        theirs, key = accelerator.device.type, f"{where}device"
        what = f"accelerate is set up for {theirs}, and {key}={settings.device} is {device.type}"
        raise UserError("accelerate", what, f"set {key}={theirs}, or change `accelerate config`")
    if accelerator.num_processes > 1:
        patient_group()
    for line in unused_by_us(mixed_precision):
        say(line)
    return accelerator


def unused_by_us(mixed_precision: str | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each setting of `accelerate config` that has no effect here.

    Args:
        mixed_precision: that of the run; None where it does not matter.
        environment: as `accelerate launch` sets it.
    """
    precision = "fp32" if mixed_precision == "no" else mixed_precision
    decided = {
        "GRADIENT_ACCUMULATION_STEPS": ("1", "the micro-batch decides"),
        "MIXED_PRECISION": (mixed_precision, f"training.precision is {precision}"),
        "DYNAMO_BACKEND": ("no", "training.compile decides"),
    }
    found = {name: environment.get(f"ACCELERATE_{name}", "no").lower() for name in decided}
    return [
        f"accelerate's {name.lower()}={found[name]} is not used: {reason}"
        for name, (ours, reason) in decided.items()
        if ours is not None and found[name] not in (ours, "no")
    ]


def forget_accelerator() -> None:
    """Accelerate keeps one device and one precision for a process: the next run would get those of our last one."""
    global _opened
    from accelerate.state import AcceleratorState

    if _opened:
        AcceleratorState._reset_state(reset_partial_state=True)
        _opened = False


def check_launched(expected: int | None, where: str = "") -> int:
    """The number of processes that torchrun or `accelerate launch` started. Raises: UserError: it is not `expected`, or
    accelerate is set up for a plugin."""
    check_accelerate()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if expected is not None and expected != launched:
        raise UserError(
            f"{where}processes: {expected} were asked for, {launched} started; launch with `torchrun "
            f"--nproc_per_node {expected}`, or on CPU `accelerate launch --multi_gpu --num_processes {expected}` "
            f"with {where}device=cpu"
        )
    return launched


def join_restarted(backend: str, timeout: timedelta) -> None:
    """After a restart by torchrun on one machine: form the process group under keys of this attempt.

    torchrun keeps one store for all attempts, which still has the addresses of the dead processes (pytorch#135712).
    Its count of restarts is the same in all processes of one machine only. With several machines, set
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE to 1 for torchrun.
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


def check_timeout(seconds: int, where: str = "") -> None:
    """Raises: UserError for a timeout below 1 second."""
    if seconds < 1:
        raise UserError(f"{where}timeout_seconds: {seconds} is below 1; the default is {TIMEOUT_SECONDS}")


def patient_group() -> Any:
    """The group for waiting, on the CPU. All processes must make the first call at the same point."""
    global _patient
    from torch import distributed

    if _patient is None:
        _patient = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return _patient


def close_accelerator(accelerator: Any, failure: BaseException | None = None) -> None:
    """End its trackers and leave the process group. Nothing else may refer to the group then, see `Engine.close`.

    After a failure, messages may be pending that no process will answer. Torch would wait for them at the end of the
    program until the group's timeout, so the program ends without that wait.
    """
    global _patient
    if failure is not None and accelerator.num_processes > 1:
        for tracker in accelerator.trackers:
            tracker.finish()
        atexit.register(leave, exit_code(failure))
        return
    _patient = None
    accelerator.end_training()
    forget_accelerator()


def leave(code: int) -> None:
    """End this process and its children now."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def exit_code(failure: BaseException) -> int:
    """The exit code of a command that ends by this error."""
    if isinstance(failure, UserError):
        return EXIT_USER_ERROR
    if isinstance(failure, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return failure.code if isinstance(failure, SystemExit) and isinstance(failure.code, int) else 1


def wait_for_all(place: Place) -> None:
    """Wait until every process is here.

    Raises:
        UserError: a process has ended; the message names it.
    """
    if place.num_processes == 1:
        return
    from torch import distributed

    with watchdog.waiting():
        wait(distributed.barrier(group=patient_group(), async_op=True))


def wait(work: Any) -> None:
    """Wait for a message; signals are handled meanwhile. Raises: UserError that names a process that has ended."""
    try:
        while not work.is_completed():
            time.sleep(POLL_SECONDS)
        work.wait()
    except RuntimeError as error:
        lost = watchdog.lost_process(error)
        if lost is None:
            raise
        raise lost from error


def run_on_main(place: Place, decide: Callable[[], Answer]) -> Answer:
    """Run `decide` in the main process and return its result in all. Its UserError ends all, and is shown once."""
    if place.num_processes == 1:
        with watchdog.solo():
            return decide()
    from torch import distributed

    answer: list[Any] = [None, False]
    refused: UserError | None = None
    if place.is_main_process:
        with watchdog.solo():
            try:
                answer[0] = decide()
            except UserError as error:
                answer[1], refused = True, error
    wait_for_all(place)
    distributed.broadcast_object_list(answer, group=patient_group())
    if answer[1]:
        raise refused or SystemExit(EXIT_USER_ERROR)
    return answer[0]


def check_same_data(place: Place, fingerprint: str, where: str = "data") -> None:
    """Check that every process has the same data; otherwise shares would overlap or miss samples.

    Args:
        place: this process's place in its job.
        fingerprint: of the data in this process.
        where: the setting that names the data.

    Raises:
        UserError: in every process, if the fingerprints differ.
    """
    if place.num_processes == 1:
        return
    from torch import distributed

    found: list[Any] = [None] * place.num_processes
    wait_for_all(place)
    distributed.all_gather_object(found, fingerprint, group=patient_group())
    if len(set(found)) > 1:
        others = ", ".join(str(rank) for rank, one in enumerate(found) if one != found[0])
        raise UserError(
            where,
            f"process {others} and process 0 see other files",
            "give all machines the same data, and start again when no program is writing it",
        )


# Processes that share the work of a measurement, without an Accelerator.


@dataclass(frozen=True)
class Processes:
    """This process's place in its job. `local_process_index` chooses the GPU of its machine."""

    process_index: int = 0
    num_processes: int = 1
    local_process_index: int = 0

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def share(self, units: Sequence[Item]) -> list[tuple[int, Item]]:
        """(number, unit) of this process's units."""
        return [pair for pair in enumerate(units) if pair[0] % self.num_processes == self.process_index]

    def gather(self, found: list[tuple[int, Item]], count: int) -> list[Item]:
        """The results of all processes for their units, in the order of the units, on every process.

        Args:
            found: (number, result) of each unit of this process's share.
            count: number of units of all processes.

        Raises:
            UserError: a unit has no result, or two.
        """
        parts = [found]
        if self.num_processes > 1:
            from torch import distributed

            parts = [[] for _ in range(self.num_processes)]
            distributed.all_gather_object(parts, found)
        pairs = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
        if [number for number, _ in pairs] != list(range(count)):
            what = f"{len({number for number, _ in pairs})} of {count} parts of the work have one result"
            raise UserError("processes", what, "give every process the same settings and data, and run it again")
        return [item for _, item in pairs]

    def compute_device(self, name: str) -> torch.device:
        """The device called `name`. Each of several processes on one machine gets its own GPU."""
        return compute_device(name, self.local_process_index if self.num_processes > 1 else None)


@contextlib.contextmanager
def joined_processes(expected: int | None = None) -> Iterator[Processes]:
    """The process group of torchrun or `accelerate launch` until the end of the block; otherwise a single process.

    Raises:
        UserError: another number of processes than `expected` was started.
    """
    global _patient
    from torch import distributed

    die_with_launcher()
    if check_launched(expected) == 1:
        yield Processes()
        return
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        yield Processes(distributed.get_rank(), distributed.get_world_size(), local)
    finally:
        _patient = None
        distributed.destroy_process_group()


# After every step the processes compare their step, their weights, and whether to stop.


class RankConsistency:
    """One message per step: numbers whose largest and smallest value over the processes are compared."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._checksum = 0
        self._sent: tuple[int, Tensor, Any] | None = None

    def set_checksum(self, checksum: int) -> None:
        """Compare checksums of these weights from now on; call it at the same step in all processes."""
        self._checksum = checksum % 2**62

    def stop_agreed(self, step: int, first_index: int, stop: bool) -> bool:
        """Whether every process must stop after `step`. `first_index`: index of the first sample of the global batch.

        Raises:
            UserError: the processes were in different steps, or had different samples or weights.
        """
        if self.processes == 1:
            return stop
        agreed = self.finish()
        from torch import distributed

        numbers = [step, first_index, self._checksum]
        message = torch.tensor([stop, *numbers, *(-number for number in numbers)], dtype=torch.int64)
        work = distributed.all_reduce(message, distributed.ReduceOp.MAX, group=patient_group(), async_op=True)
        self._sent = (step, message, work)
        return agreed

    def finish(self) -> bool:
        """Wait for the last message. Returns: whether to stop."""
        if self._sent is None:
            return False
        (step, message, work), self._sent = self._sent, None
        wait(work)
        stop, *most = message.tolist()
        largest, smallest = most[:3], [-number for number in most[3:]]
        differences = [
            f"in steps {smallest[0]} to {largest[0]}",
            "at other samples: their data differ, or its order",
            "with other weights",
        ]
        for words, low, high in zip(differences, smallest, largest):
            if low != high:
                raise UserError(
                    f"step {step}: the processes are out of step, {words}; give all the same settings and data, "
                    "and run the same command again: it continues from the last checkpoint"
                )
        return bool(stop)


def weights_checksum(modules: list[nn.Module], device: torch.device) -> Tensor:
    """A bit-exact checksum, on the device: the sum of all trained weights as integers, times the parameter's number."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for module in modules:
        for number, parameter in enumerate(module.parameters(), start=1):
            if parameter.requires_grad:
                total += number * parameter.detach().float().view(torch.int32).sum(dtype=torch.int64)
    return total
