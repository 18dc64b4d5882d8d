"""Autoencoders in the CompVis checkpoint layout, to diffusers models and back. Tensors keep their bits.

Covers the published latent-diffusion autoencoders (arXiv:2112.10752): kl-f4, kl-f8, kl-f16, kl-f32, vq-f4, vq-f8,
vq-f16, the Stable Diffusion and SDXL ones, and files of the same layout without the 1x1 convolutions around the latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_vae import compat
from ldm_vae import config as configuration
from ldm_vae.errors import UserError
from ldm_vae.tensor_files import count_numbers

compat.repair_torchvision()

from diffusers import AutoencoderKL

from ldm_vae.autoencoder.deterministic import VQModel
from ldm_vae.autoencoder.interop.architecture import Architecture, from_diffusers, from_shapes, is_projection
from ldm_vae.autoencoder.interop.checkpoint_file import read_foreign
from ldm_vae.autoencoder.weights import check_finite

UNKNOWN_SAMPLE_SIZE = 256
"""Pixels; diffusers uses it for tiling only."""


@dataclass(frozen=True)
class CompVisSettings:
    """What a checkpoint file does not say and an LDM configuration does.

    scaling_factor: `model.params.scale_factor`, 1.0 where the configuration states none.
    resolution: `ddconfig.resolution` in pixels.
    """

    scaling_factor: float | None = None
    resolution: int | None = None


def load_compvis(path: str | Path, config: str | Path | None = None) -> tuple[Any, list[str]]:
    """A checkpoint file -> a diffusers `AutoencoderKL` or `VQModel` (float32, eval, frozen) and notes in words.

    Args:
        path: a .ckpt or .safetensors file, of the autoencoder alone or of a whole model.
        config: the YAML of the original repository; its scale_factor and resolution are taken.

    Raises:
        UserError: the file is unsafe or damaged, or the model cannot be expressed in diffusers.
    """
    foreign = read_foreign(Path(path))
    settings = read_settings(Path(config)) if config else CompVisSettings()
    try:
        model = model_from_tensors(foreign.tensors, settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    notes = []
    if foreign.prefix:
        notes.append(f"tensors were found under {foreign.prefix!r}")
    if foreign.dropped:
        listed = ", ".join(f"{name}.* ({count})" for name, count in sorted(foreign.dropped.items()))
        notes.append(f"left out, not part of the autoencoder: {listed}")
    if settings.scaling_factor is None:
        notes.append(
            "scaling_factor is 1.0: the file does not state one (give --config for that of its repository); "
            "ldm_vae measures the statistics of the latents instead"
        )
    return model, notes


def model_from_tensors(tensors: dict[str, Tensor], settings: CompVisSettings | None = None) -> Any:
    """CompVis tensors (names without prefix) -> a diffusers model in float32. Raises: UserError."""
    settings = settings or CompVisSettings()
    architecture = from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    config = architecture.diffusers_config(
        settings.resolution or UNKNOWN_SAMPLE_SIZE, 1.0 if settings.scaling_factor is None else settings.scaling_factor
    )
    names = architecture.tensor_names()
    missing, unknown = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
    if missing or unknown:
        raise UserError(
            f"the tensors do not fit a CompVis autoencoder of widths {architecture.widths}: "
            f"missing {_some(missing)}, unknown {_some(unknown)}"
        )
    model_class: Any = VQModel if architecture.is_quantized else AutoencoderKL
    asked, held = count_numbers(lambda: model_class(**config)), sum(tensor.numel() for tensor in tensors.values())
    if asked > 2 * held:  # before memory is taken; smaller differences are named below
        raise UserError(f"the tensors hold {held} numbers, the architecture that they describe has {asked}")
    model = model_class(**config)
    state = {
        theirs: (tensors[ours].flatten(1) if is_projection(ours) else tensors[ours]).to(torch.float32)
        for ours, theirs in names.items()
    }
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        shapes = " ".join(str(error).split())
        raise UserError(f"shapes do not fit the architecture that the others describe: {shapes[:300]}") from error
    check_finite(state, "the model")
    return model.eval().requires_grad_(False)


def tensors_from_model(model: Any, prefix: str = "") -> dict[str, Tensor]:
    """A diffusers `AutoencoderKL` or `VQModel` -> CompVis tensors, contiguous, attention as 1x1 convolutions.

    Raises:
        UserError: the layout cannot hold this model.
    """
    names = architecture_of(model).tensor_names()
    state = model.state_dict()
    assert state.keys() == set(names.values()), sorted(state.keys() ^ set(names.values()))
    return {
        prefix + ours: (state[theirs][:, :, None, None] if is_projection(ours) else state[theirs]).detach().contiguous()
        for ours, theirs in names.items()
    }


def architecture_of(model: Any) -> Architecture:
    """Raises: UserError where the CompVis layout cannot hold the model."""
    return from_diffusers(type(model).__name__, model.config)


def read_settings(path: Path) -> CompVisSettings:
    """scale_factor and resolution of an LDM configuration file. Raises: UserError when it is not one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the YAML configuration of the original repository")
    values = configuration.read_yaml(path)
    parameters = _mapping(_mapping(values, "model"), "params")
    if not parameters:
        raise UserError(f"{path}: has no model.params, so it is no LDM configuration; leave --config out")
    stage = _mapping(_mapping(parameters, "first_stage_config"), "params") or parameters
    scale = parameters.get("scale_factor", values.get("scale_factor"))
    resolution = _mapping(stage, "ddconfig").get("resolution")
    try:
        return CompVisSettings(None if scale is None else float(scale), None if resolution is None else int(resolution))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: scale_factor {scale!r} or resolution {resolution!r} is no number") from error


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _some(names: list[str]) -> str:
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "nothing"
