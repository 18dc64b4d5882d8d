"""Starting from an autoencoder that exists, and training only a part of it."""

from __future__ import annotations

from typing import Any

from ldm_vae.autoencoder.deterministic import VQModel
from ldm_vae.autoencoder.fingerprint import DECODER_PARTS
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.errors import UserError


def start_from(path: str) -> Any:
    """The autoencoder at `path`, every parameter trainable, float32.

    Raises: UserError for diffusers' VQModel, whose codebook loss is of another shape.
    """
    autoencoder = load_autoencoder(path)
    if isinstance(autoencoder, VQModel):
        raise UserError(
            f"initial={path}: diffusers' VQModel can be evaluated and encoded with, not trained here; "
            "train one with autoencoder.kind=vq"
        )
    return autoencoder.train().requires_grad_(True)


def select_trained(autoencoder: Any, names: list[str] | None) -> None:
    """Freeze every parameter whose name does not start with one of `names`; None leaves all as they are.

    `decoder` includes diffusers' `post_quant_conv`. Raises: UserError for a name that matches nothing.
    """
    if names is None:
        return
    prefixes = [*names, *(DECODER_PARTS if "decoder" in names else ())]
    found = [name for name, _ in autoencoder.named_parameters()]
    for name in names:
        if not any(parameter.startswith(name) for parameter in found):
            parts = ", ".join(sorted({parameter.split(".")[0] for parameter in found}))
            raise UserError(f"train: no parameter's name starts with {name!r}; the parts are {parts}")
    for name, parameter in autoencoder.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(tuple(prefixes)))


def encoder_is_frozen(autoencoder: Any) -> bool:
    """Nothing that makes the latents is trained."""
    parameters = autoencoder.named_parameters()
    return not any(p.requires_grad for name, p in parameters if name.split(".")[0] not in DECODER_PARTS)
