"""What a safetensors file or a model folder of others says of its size, judged before memory or time is spent on it.

Measured: a header of 65 MB with a million empty tensors costs safetensors 14 s and 1.7 GB; a `config.json` of a few
lines can ask for terabytes. Owns no reading of tensors, and no checksums (`seal`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_vae.errors import UserError

MAXIMUM_HEADER_BYTES = 8 << 20
"""Stable Diffusion with all its parts has 0.3 MB; some files carry a small picture as well."""
MAXIMUM_TENSORS = 20_000
MAXIMUM_JSON_BYTES = 16 << 20


def check_tensor_file(path: str | Path) -> None:
    """Raises: UserError for a header that is larger than the file or than any model's. No such file is no error."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            check_tensor_header(file.read(length) if length <= MAXIMUM_HEADER_BYTES else b"", length, path)
    except (FileNotFoundError, IsADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable, or restore it") from error


def check_tensor_header(header: bytes, length: int, where: str | Path) -> None:
    """`header`: what follows the eight bytes that gave `length`, or more. Raises: UserError."""
    if length > MAXIMUM_HEADER_BYTES or length > len(header):
        raise UserError(f"{where}: is no readable safetensors file (a header of {length} bytes); fetch it again")
    if (tensors := header.count(b'"data_offsets"', 0, length)) > MAXIMUM_TENSORS:
        raise UserError(f"{where}: holds {tensors} tensors, more than {MAXIMUM_TENSORS}; this is no model")


def check_model_folder(folder: Path, model_class: Any = None) -> None:
    """For a folder with `config.json` and weights. No such folder is no error.

    Args:
        model_class: diffusers' class of the model; with it, a configuration that asks for more numbers than the
            files hold is refused.

    Raises:
        UserError: a header or a description is larger than any model's, or describes more than is there.
    """
    for path in folder.glob("*.json"):
        if path.is_file() and path.stat().st_size > MAXIMUM_JSON_BYTES:
            raise UserError(f"{path}: is larger than {MAXIMUM_JSON_BYTES} bytes; this describes no model")
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        check_tensor_file(path)
    if model_class is None or not files:
        return
    config = model_class.load_config(folder)
    tensors, numbers = (sum(found) for found in zip(*map(_held, files)))
    layers = _layers(config)
    if layers > tensors:
        raise UserError(f"{folder}/config.json: asks for {layers} layers, the files hold {tensors} tensors; restore it")
    asked = count_numbers(lambda: model_class.from_config(config))
    if asked > 2 * numbers:  # what is missing of less is named by the one who loads it
        raise UserError(f"{folder}/config.json: asks for {asked} numbers, the files hold {numbers}; restore it")


def _held(path: Path) -> tuple[int, int]:
    """(tensors, numbers in them) of a file whose header was judged."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    size_bytes = path.stat().st_size
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    return len(tensors), sum(min(_product(tensor["shape"]), 8 * size_bytes) for tensor in tensors)


def _product(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _layers(config: Any) -> int:
    """The numbers of layers that a configuration names, together: each layer has a tensor at least."""
    named = [value for key, value in config.items() if "blocks" in key or "layers" in key]
    named += [count for value in named if isinstance(value, (list, tuple)) for count in value]
    return sum(value for value in named if isinstance(value, int))


def count_numbers(build: Callable[[], Any]) -> int:
    """Numbers in the state of the module that `build` makes, for which no memory is taken."""
    import torch
    from torch.overrides import TorchFunctionMode

    sized = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full}

    class WithoutMemory(TorchFunctionMode):
        """In this thread alone: accelerate's `init_empty_weights` patches torch for the others as well. Tensors made
        of given numbers stay, since some modules compute with them when they are built."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function in sized and kwargs.get("device") is None:
                kwargs["device"] = "meta"
            return function(*args, **kwargs)

    with WithoutMemory():
        return sum(tensor.numel() for tensor in build().state_dict().values())
