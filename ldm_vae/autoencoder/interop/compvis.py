"""Autoencoders in the CompVis checkpoint layout, to diffusers models and back. Tensors keep their bits.

Covers the published latent-diffusion autoencoders (arXiv:2112.10752): kl-f4, kl-f8, kl-f16, kl-f32, vq-f4, vq-f8,
vq-f16, the Stable Diffusion and SDXL ones, and files of the same layout without the 1x1 convolutions around the latent.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae import runtime

runtime.repair_torchvision()

from diffusers import AutoencoderKL

from ldm_vae import config as configuration
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.deterministic import VQModel
from ldm_vae.autoencoder.interop.architecture import Architecture, from_diffusers, from_shapes, is_projection
from ldm_vae.autoencoder.models import adapted, load_autoencoder, model_directory
from ldm_vae.autoencoder.weights import check_finite
from ldm_vae.errors import UserError
from ldm_vae.files import check_tensor_file, count_numbers

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


def load_compvis(path: str | Path, config: str | Path | None = None) -> tuple[Autoencoder, list[str]]:
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


def model_from_tensors(tensors: dict[str, Tensor], settings: CompVisSettings | None = None) -> Autoencoder:
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
    return adapted(model.eval().requires_grad_(False))


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
        raise UserError(f"{path}: has no model.params, so it is not an LDM configuration; leave --config out")
    stage = _mapping(_mapping(parameters, "first_stage_config"), "params") or parameters
    scale = parameters.get("scale_factor", values.get("scale_factor"))
    resolution = _mapping(stage, "ddconfig").get("resolution")
    try:
        return CompVisSettings(None if scale is None else float(scale), None if resolution is None else int(resolution))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: scale_factor {scale!r} or resolution {resolution!r} is not a number") from error


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _some(names: list[str]) -> str:
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "nothing"


# Foreign checkpoint files: `.ckpt` and `.safetensors` become a plain dictionary of the autoencoder's tensors.

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
        raise UserError(f"{path}: is not a readable safetensors file ({error}); fetch it again") from error


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
        raise UserError(f"{path}: is not a readable checkpoint ({_first_line(error)}); fetch it again") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors; save its state_dict()")
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
        return  # the format before torch 1.6 is not an archive
    if unpacked > path.stat().st_size:
        raise UserError(f"{path}: unpacks to {unpacked} bytes, more than it has; fetch it again")


def _has_all_its_numbers(tensor: Tensor) -> bool:
    """False for a tensor that repeats one number, or has none: a small file could ask for any memory."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# The normalization of latents, folded into the 1x1 convolutions of an `AutoencoderKL`: same images, unit latents.


@torch.no_grad()
def fold_normalizer(model: Any, mean: Sequence[float], std: Sequence[float]) -> Autoencoder:
    """A new `AutoencoderKL` (float32, eval, frozen) that encodes to, and decodes from, normalized latents.

    decode(folded, (z - m) / s) = decode(model, z); the posterior of the folded model has mean (mu - m) / s and
    log-variance logvar - 2 ln s. Equal up to rounding of float32; computed in float64. diffusers clamps log-variances
    to [-30, 20], which now happens in the new units. A model without the 1x1 convolutions gets them.

    Args:
        model: diffusers' `AutoencoderKL`; stays as it is.
        mean, std: of its latents (c,), as `LatentNormalizer` has them.

    Raises:
        UserError: another class, which has no such convolutions, or another number of channels.
    """
    if type(model).__name__ != AutoencoderKL.__name__:
        raise UserError(
            f"{type(model).__name__}: statistics fold into the 1x1 convolutions of diffusers' AutoencoderKL only; "
            "train with autoencoder.architecture=sd, or use --to onnx, which records them beside the model"
        )
    channels = int(model.config["latent_channels"])
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"latent statistics: {len(mean)} channels for an autoencoder of {channels}; use those of one")
    center, width = (torch.tensor(list(values), dtype=torch.float64) for values in (mean, std))
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    config |= {"use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 1.0}
    folded = AutoencoderKL(**config | {"shift_factor": None, "latents_mean": None, "latents_std": None})
    state = {name: value.float().cpu() for name, value in model.state_dict().items()}
    weight, bias = _layer(model.quant_conv, 2 * channels)
    scale = torch.cat([1 / width, torch.ones(channels, dtype=torch.float64)])
    shift = torch.cat([-center / width, -2 * width.log()])
    state |= _named("quant_conv", weight * scale[:, None], bias * scale + shift)
    weight, bias = _layer(model.post_quant_conv, channels)
    state |= _named("post_quant_conv", weight * width, bias + weight @ center)
    folded.load_state_dict(state, strict=True)
    return adapted(folded.eval().requires_grad_(False))


def _layer(layer: nn.Conv2d | None, channels: int) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a 1x1 convolution in float64; of the identity where there is none."""
    if layer is None:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    assert layer.bias is not None
    return layer.weight.double().cpu().flatten(1), layer.bias.double().cpu()


def _named(name: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {f"{name}.weight": weight.float()[:, :, None, None], f"{name}.bias": bias.float()}


# Open whatever a user calls an autoencoder: a directory, a run, a hub id, or a checkpoint file of another project.


@dataclass(frozen=True)
class Opened:
    """A model (float32, eval, frozen), notes about its opening, and its local directory where it has one."""

    model: Autoencoder
    notes: list[str] = field(default_factory=list)
    directory: Path | None = None


def open_autoencoder(source: str | Path, config: str | Path | None = None) -> Opened:
    """Load from a diffusers directory, a run of `train-vae`, a hub id, a .ckpt or a .safetensors file.

    Args:
        source: what to load; .ckpt and .safetensors are read as CompVis checkpoints.
        config: the LDM configuration of a checkpoint file; refused for anything else, which states its own.

    Raises:
        UserError: nothing there, or nothing that is an autoencoder.
    """
    path = Path(source)
    if path.suffix in SUFFIXES and not path.is_dir():
        model, notes = load_compvis(path, config)
        return Opened(model, notes)
    if config is not None:
        raise UserError(f"--config: {source} states its own settings; give it for .ckpt and .safetensors files only")
    return Opened(load_autoencoder(source), [], model_directory(path))
