"""Foreign checkpoint files: `.ckpt` and `.safetensors` become a plain dictionary of the autoencoder's tensors.

Owns the safe reading and the finding of the autoencoder among other things in the file. What the tensors mean is in
`architecture.py`. A `.ckpt` is a pickle; it is opened with `weights_only=True`, which builds tensors and containers
and refuses everything else, so no code of the file runs.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm_vae.errors import UserError
from ldm_vae.tensor_files import check_tensor_file

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")
LANDMARK = "encoder.conv_in.weight"
TRAINING_ONLY = ("loss.", "model_ema.")
"""Keys beside the autoencoder in CompVis training checkpoints: the perceptual loss, discriminator, running averages."""


@dataclass(frozen=True)
class ForeignState:
    """The autoencoder's tensors without prefix, the prefix they had, and what else the file held (word -> count)."""

    tensors: dict[str, Tensor]
    prefix: str
    dropped: dict[str, int]


def read_foreign(path: Path) -> ForeignState:
    """Read a checkpoint file and keep what belongs to the autoencoder, on the CPU, in the file's own precision.

    Raises:
        UserError: no such file, damaged, a pickle that holds more than tensors, or no CompVis autoencoder in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .ckpt or .safetensors file in the CompVis layout")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if any(
        name.endswith(("encoder.down_blocks.0.resnets.0.conv1.weight", "encoder.stages.0.resample.weight"))
        for name in state
    ):
        raise UserError(
            f"{path}: has the tensor names of a diffusers model; give its directory, whose config.json says what it is"
        )
    prefix = _prefix(path, state)
    tensors: dict[str, Tensor] = {}
    dropped: Counter[str] = Counter()
    for name, tensor in state.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix):
            dropped[name.split(".")[0]] += 1
        elif inner.startswith(TRAINING_ONLY):
            dropped[inner.split(".")[0]] += 1
        else:
            tensors[inner] = tensor
    return ForeignState(tensors, prefix, dict(dropped))


def _prefix(path: Path, state: dict[str, Tensor]) -> str:
    """What stands before `encoder.conv_in.weight`: empty, `first_stage_model.` or another one."""
    found = sorted(name.removesuffix(LANDMARK) for name in state if name.endswith(LANDMARK))
    found = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    if not found:
        raise UserError(f"{path}: no CompVis autoencoder in it (no tensor named [PREFIX.]{LANDMARK})")
    if len(found) > 1 and "first_stage_model." not in found:
        raise UserError(
            f"{path}: holds several autoencoders ({', '.join(map(repr, found))}); save the wanted one alone"
        )
    return "first_stage_model." if len(found) > 1 else found[0]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_tensor_file(path)
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is no readable safetensors file ({error}); fetch it again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    _check_unpacked_size(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes is the file's fault
        unsafe = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|operand) ([\w.]+)", str(error))
        if unsafe or "weights_only" in str(error) or "Weights only" in str(error):
            what = f"{unsafe[1] or unsafe[2]!s}, " if unsafe else ""
            raise UserError(
                f"{path}: is a pickle with more than tensors in it ({what}which loading could run as code), so it "
                "is not opened; get the .safetensors version of the model"
            ) from error
        raise UserError(f"{path}: is no readable checkpoint ({_first_line(error)}); fetch it again") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, no dictionary of tensors; save its state_dict()")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if not _has_all_its_numbers(tensor):
            raise UserError(f"{path}: the tensor {name!r} has a shape without the numbers for it; fetch it again")
    return tensors


def _check_unpacked_size(path: Path) -> None:
    """Raises: UserError for a packed archive, which could unpack to any size. Torch packs nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # the format before torch 1.6 is no archive
    if unpacked > path.stat().st_size:
        raise UserError(f"{path}: unpacks to {unpacked} bytes, more than it has; fetch it again")


def _has_all_its_numbers(tensor: Tensor) -> bool:
    """False for a tensor that repeats one number, or has none: a small file could ask for any memory."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
