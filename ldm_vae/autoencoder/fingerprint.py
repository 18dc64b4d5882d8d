"""The identity of an autoencoder: a hash of its architecture and weights, carried by everything made with it."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch

from ldm_vae.files import canonical_json

DECODER_PARTS = ("decoder", "post_quant_conv", "quantize", "quantizer")
"""Top-level names of the parameters that act on latents only, in this package and in diffusers."""


def architecture(autoencoder: Any) -> dict[str, Any]:
    """The class name and the settings that shape the network (bookkeeping keys that start with `_` left out)."""
    settings = {key: value for key, value in dict(autoencoder.config).items() if not key.startswith("_")}
    return {"class": type(autoencoder).__name__, "config": settings}


def _identity(autoencoder: Any) -> dict[str, Any]:
    """The architecture without settings at their defaults: one that a later release adds changes no fingerprint."""
    parameters = inspect.signature(type(autoencoder).__init__).parameters
    described = architecture(autoencoder)
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    described["config"] = {
        key: value
        for key, value in described["config"].items()
        if key not in defaults or canonical_json(value) != canonical_json(_plain(defaults[key]))
    }
    return described


def _plain(default: Any) -> Any:
    return None if default is inspect.Parameter.empty else default


def fingerprint(autoencoder: Any) -> str:
    """`sha256:HEX` over the architecture and every tensor (name, shape, float32 bytes), in sorted order.

    Casting to a lower precision changes the weights, so it changes the fingerprint; saving and loading does not.
    """
    return _digest(autoencoder, except_parts=())


def encoder_fingerprint(autoencoder: Any) -> str:
    """The same without the tensors that only decode: autoencoders with this in common make the same latents.

    A decoder that was trained further (encoder frozen) keeps it, so latents that exist stay valid with it.
    """
    return _digest(autoencoder, except_parts=DECODER_PARTS)


def token_fingerprint(autoencoder: Any) -> str:
    """The same without the decoder only: quantized autoencoders with this in common make the same codes."""
    return _digest(autoencoder, except_parts=("decoder",))


def _digest(autoencoder: Any, except_parts: tuple[str, ...]) -> str:
    digest = hashlib.sha256(canonical_json(_identity(autoencoder)).encode())
    for name, tensor in sorted(autoencoder.state_dict().items()):
        if name.split(".")[0] in except_parts:
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
