"""The environment of a computation: device, FLOPs, memory allocator and installed packages.

torch is imported inside the functions that need it, because every command imports this module, even for `--help`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ldm_vae.errors import UserError

if TYPE_CHECKING:
    import logging

    import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`, from malloc.h."""

KEPT_BYTES = 2**31 - 1
"""The limit of freed memory that is kept: the largest number that `mallopt` accepts."""

PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
    "ACCELERATE_IN_TPU_POD": "a TPU pod",
}
"""A variable that `accelerate launch` sets to true -> what accelerate would then do with our model and optimizer."""

_libraries: list[object] = []  # torch.library.Library objects undo their definitions when collected


def compute_device(name: str, local_index: int | None = None, where: str = "") -> torch.device:
    """The device called `name`; `auto` is CUDA if torch finds a GPU.

    Args:
        local_index: index of this process on its machine, which selects its GPU.
        where: prefix of the key `device` in messages.

    Raises:
        UserError: the device is unknown or not available.
    """
    import torch

    if name in ("auto", "cuda") and torch.cuda.is_available():
        if local_index is None:
            return torch.device("cuda")
        return torch.device("cuda", local_index % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        what = f"{name!r} is not available ({str(error).splitlines()[0]})"
        raise UserError(f"{where}device", what, "use auto, cpu, cuda or cuda:N") from error
    return device


def check_accelerate(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what `accelerate config` may ask for and training here does not support, before anything is written.

    Raises:
        UserError: naming the plugin or the kind of device.
    """
    advice = "choose no plugin in `accelerate config`, or launch with `torchrun --nproc_per_node N`"
    for variable, plugin in PLUGINS.items():
        alone = "SAGEMAKER" in variable and environment.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE") == "NO"
        if environment.get(variable, "").lower() in ("true", "1", "yes", "on") and not alone:
            raise UserError(f"accelerate: {plugin} is not supported ({variable}={environment[variable]})", advice)
    if environment.get("PJRT_DEVICE", "").upper() == "TPU" or environment.get("XRT_TPU_CONFIG"):
        raise UserError("accelerate: TPUs are not supported; use GPUs or CPUs")


def check_tracker(name: str) -> None:
    """Raises: UserError when the package of `training.tracker` is not installed: the run would not be tracked."""
    import importlib.metadata

    if name == "none":
        return
    try:
        importlib.metadata.version(name)  # a folder called wandb, which wandb itself makes, can be imported too
    except importlib.metadata.PackageNotFoundError:
        what, instead = f"{name} is not installed", f"run `pip install {name}`, or set training.tracker=none"
        raise UserError("training.tracker", what, instead) from None


def repair_torchvision() -> None:
    """Make `import torchvision` work with a torch of another build. Does nothing if they match.

    A CPU-only torch with the package index's CUDA-built torchvision makes `import torchvision` (hence `lpips` and
    diffusers' models) fail with "operator torchvision::nms does not exist": torchvision registers fake kernels for two
    operators whose compiled library did not load. Defining the two schemas first fixes the import. Nothing here calls
    non-maximum suppression; a call still fails.
    """
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


def silence_empty_warning() -> None:
    """Leave out one warning of diffusers: at every `to(dtype)` it names the modules that should be kept in float32,
    also where there are none (`float32: []`). All its other warnings stay."""
    import logging

    logging.getLogger("diffusers.models.modeling_utils").addFilter(_names_something)


def _names_something(record: logging.LogRecord) -> bool:
    return "should be kept in float32: []" not in record.getMessage()


def gigamacs(function: Callable[[], Any]) -> float:
    """Multiply-accumulates of a call in 10^9: half the FLOPs of torch's counter, extended to attention on CPU. The call
    must compute in this thread."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def count(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        function()
    return counter.get_total_flops() / 2e9


@functools.cache
def reuse_freed_memory() -> bool:
    """Let the C library of this process keep freed memory for the next large tensor. Returns: False without glibc.

    By default it returns large blocks to the kernel, which clears each page when it is touched again: for a feature map
    of 100 MB that takes 5 times as long as computing it. At most `KEPT_BYTES` are kept at the end of the heap.
    """
    import ctypes  # not for every --help

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; TypeError: Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
