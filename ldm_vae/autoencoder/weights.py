"""Weights of a model from its folder: complete, nothing else beside them, every number finite.

diffusers itself only warns about a missing tensor, and gives it random values. The class and purpose of a model are up
to the caller.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_vae.autoencoder.weight_files import choose_layout
from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json, check_model_folder

INSTEAD = "restore it from a copy, or make it again"


def load_weights(
    model_class: Any, path: str | Path, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Any:
    """A diffusers model in eval mode, from a directory or hub id.

    Args:
        model_class: diffusers' class, or one of this package.
        path: of the model itself, which has its config.json.
        dtype: of its weights.
        variant: of the files, as in diffusers; None: the plain ones, or the variant that is there (`weight_files`).

    Raises:
        UserError: naming the tensor that is missing, unknown, of another shape or not finite; or the reason why the
            files cannot be read.
    """
    name = model_class.__name__
    try:
        check_model_folder(Path(path), model_class)
        safe = True
        if Path(path).is_dir():
            layout = choose_layout(Path(path), variant)
            variant, safe = layout.variant or None, layout.format == "safetensors"
        model, loading = model_class.from_pretrained(
            path,
            torch_dtype=dtype,
            use_safetensors=safe,
            variant=variant,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: cannot be loaded as {name}: {_reason(error)}; {INSTEAD}") from error
    check_complete(loading, f"{path}: as {name}")
    check_finite(model.state_dict(), str(path))
    if Path(path).exists():
        model.register_to_config(_name_or_path=Path(path).name)  # else it would save the path in its config.json
    return model.eval()


def check_complete(loading: Mapping[str, Any], where: str, unexpected: bool = True) -> None:
    """Raises: UserError for weights that were `missing_keys` or, unless allowed, `unexpected_keys` when loading."""
    wrong = {"lacks": loading["missing_keys"], "does not know": loading["unexpected_keys"] if unexpected else []}
    for what, names in wrong.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where} it {what} the tensor {min(names)!r}{more}; {INSTEAD}")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises: UserError naming the first tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: the tensor {name!r} is not finite; {INSTEAD}")


def _reason(error: Exception) -> str:
    """The first lines of diffusers' messages, whose very first says nothing of a tensor."""
    return " ".join(" ".join(str(error).split()).split()[:40]) or type(error).__name__


# The identity of an autoencoder: a hash of its architecture and weights, carried by everything made with it.


def describe_architecture(model: Any) -> dict[str, Any]:
    """The class name and the settings that shape the network (bookkeeping keys that start with `_` left out)."""
    settings = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    return {"class": type(model).__name__, "config": settings}


def _identity(model: Any) -> dict[str, Any]:
    """The architecture without settings at their defaults: one that a later release adds changes no fingerprint."""
    parameters = inspect.signature(type(model).__init__).parameters
    described = describe_architecture(model)
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    described["config"] = {
        key: value
        for key, value in described["config"].items()
        if key not in defaults or canonical_json(value) != canonical_json(_plain(defaults[key]))
    }
    return described


def _plain(default: Any) -> Any:
    return None if default is inspect.Parameter.empty else default


def fingerprint(model: Any, without: Collection[str] = ()) -> str:
    """`sha256:HEX` over the architecture and every tensor (name, shape, float32 bytes), in sorted order.

    Casting to a lower precision changes the weights, so it changes the fingerprint; saving and loading does not.
    Tensors whose names start with one of `without` are left out.
    """
    digest = hashlib.sha256(canonical_json(_identity(model)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.split(".")[0] in without:
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
