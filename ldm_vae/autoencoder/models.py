"""The kinds of autoencoders: one table, the configuration that chooses from it, building and loading.

A new kind is a file with a subclass of `Autoencoder` and a line in `KINDS`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_vae import runtime

runtime.repair_torchvision()

import diffusers
from diffusers.models.modeling_utils import ModelMixin

from ldm_vae.autoencoder.base import Autoencoder, AutoencoderSettings
from ldm_vae.autoencoder.deterministic import ADAPTED
from ldm_vae.autoencoder.fast_layers import prepare_for_inference
from ldm_vae.autoencoder.frozen import AutoencoderFrozenEncoder
from ldm_vae.autoencoder.quantized import AutoencoderQuantized
from ldm_vae.autoencoder.vector import VECTOR_PRESETS, AutoencoderVector
from ldm_vae.autoencoder.wavelet import WAVELET_PRESETS, AutoencoderWavelet
from ldm_vae.autoencoder.weights import load_weights
from ldm_vae.errors import UserError
from ldm_vae.files import check_checksums
from ldm_vae.paths import AUTOENCODER


class AutoencoderKL(diffusers.AutoencoderKL, Autoencoder):
    """diffusers' `AutoencoderKL`, the autoencoder of Stable Diffusion, under its own name."""

    __module__ = diffusers.AutoencoderKL.__module__  # what a saved pipeline names

    @classmethod
    def from_settings(cls, settings: AutoencoderSettings, sizes: Mapping[str, Any], logvar_floor: float) -> Autoencoder:
        """A new autoencoder of Stable Diffusion's architecture."""
        widths = sizes["block_out_channels"]
        return cls(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            latent_channels=settings.latent_channels,
            norm_num_groups=min(32, widths[0] // 2),
            sample_size=512,
            scaling_factor=1.0,
            **sizes,
        )


SD_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1},
    "sd": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
}


@dataclass(frozen=True)
class Kind:
    """A kind of one architecture: its class, the sizes by preset, and the settings that are for it alone."""

    model: type[Autoencoder]
    presets: Mapping[str, Mapping[str, Any]]
    settings: tuple[str, ...] = ()


KINDS: dict[tuple[str, str], Kind] = {
    ("wavelet", "kl"): Kind(AutoencoderWavelet, WAVELET_PRESETS, ("linear_path",)),
    ("wavelet", "ae"): Kind(AutoencoderWavelet, WAVELET_PRESETS, ("linear_path",)),
    ("wavelet", "vq"): Kind(AutoencoderQuantized, WAVELET_PRESETS, ("codebook_size", "codebook")),
    ("wavelet", "fsq"): Kind(AutoencoderQuantized, WAVELET_PRESETS, ("fsq_levels",)),
    ("wavelet", "frozen"): Kind(AutoencoderFrozenEncoder, WAVELET_PRESETS, ("encoder", "residual_channels")),
    ("sd", "kl"): Kind(AutoencoderKL, SD_PRESETS),
    ("vector", "kl"): Kind(AutoencoderVector, VECTOR_PRESETS),
    ("vector", "ae"): Kind(AutoencoderVector, VECTOR_PRESETS),
}
"""(architecture, kind) -> how it is built. Saved models are found by the name of the class."""


@dataclass(frozen=True)
class AutoencoderConfig(AutoencoderSettings):
    """`AutoencoderSettings` that a row of `KINDS` can build."""

    def __post_init__(self) -> None:
        for name in ("architecture", "kind"):
            known = list(dict.fromkeys(key[name == "kind"] for key in KINDS))
            if getattr(self, name) not in known:
                raise UserError(
                    f"autoencoder.{name}: {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}"
                )
        if (self.architecture, self.kind) not in KINDS:
            others = [architecture for architecture, kind in KINDS if kind == self.kind]
            raise UserError(
                f"autoencoder.kind: {self.kind} is built with autoencoder.architecture={' or '.join(others)} only; set "
                "that, or autoencoder.kind=kl"
            )
        chosen = KINDS[self.architecture, self.kind]
        if self.preset not in chosen.presets:
            raise UserError(
                f"autoencoder.preset: {self.preset!r} is not a preset of architecture {self.architecture!r}; "
                f"choose one of {', '.join(chosen.presets)}"
            )
        if not 1 <= self.latent_channels <= 256:
            raise UserError(f"autoencoder.latent_channels: {self.latent_channels} is not between 1 and 256")
        for (architecture, kind), row in KINDS.items():
            for name in row.settings:
                if name not in chosen.settings and getattr(self, name) not in (None, 0):
                    raise UserError(
                        f"autoencoder.{name}: has no effect with autoencoder.architecture={self.architecture} and "
                        f"autoencoder.kind={self.kind}; remove it, or set autoencoder.architecture={architecture} and "
                        f"autoencoder.kind={kind}"
                    )
        chosen.model.check_settings(self)


def build_autoencoder(config: AutoencoderConfig, logvar_floor: float = -7.0) -> Autoencoder:
    """A new autoencoder with random weights, float32, see `fast_layers`. Seed torch before for reproducible weights.

    `logvar_floor` is for kind "kl", not with architecture "sd". Kind "frozen" reads its encoder here, from disk or,
    when it is a hub id, from the hub; its statistics are still to be fitted.
    """
    kind = KINDS[config.architecture, config.kind]
    return as_autoencoder(kind.model.from_settings(config, kind.presets[config.preset], logvar_floor))


def load_autoencoder(path: str | Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """An autoencoder from a diffusers directory (or hub id), ready for inference: eval, frozen, channels_last.

    A run directory of `train-vae` works too: its `autoencoder/` is taken. Where the folder has no plain safetensors,
    another variant (`fp16`) or `.bin` files are taken, with a line that says so; `.bin` files are read as tensors only.
    diffusers' `AutoencoderTiny`, `AutoencoderDC` and `VQModel` get the interface of a posterior. Its other classes are
    taken where they encode RGB images.

    Raises:
        UserError: naming the path, when it holds no autoencoder of RGB images of any size in [-1, 1] (but one of video
            or sound, or with other channels), or a damaged one: see `files` and `weights`.
    """
    found = AUTOENCODER.find(path)
    if found is not None:
        path = found
        check_checksums(found)
    model_class, config = _model_class(path)
    check_channels(model_class, config, f"{path}: ")
    if not issubclass(model_class, Autoencoder):
        check_dimensions(model_class, config, f"{path}: ")
    model = load_weights(model_class, path, dtype)
    return as_autoencoder(model.requires_grad_(False))


def as_autoencoder(model: Any) -> Autoencoder:
    """The same model, ready for inference, with the interface of `Autoencoder`."""
    return prepare_for_inference(adapted(model))


def adapted(model: Any) -> Any:
    """The same model: one of diffusers' classes gets the interface of `Autoencoder`, and keeps its name when saved.

    Raises:
        UserError: it is not an autoencoder of RGB images.
    """
    plain = getattr(model, "_orig_mod", model)  # of torch.compile
    check_channels(type(plain), plain.config)
    if not isinstance(plain, Autoencoder):
        adapter: type = _adapter(plain.__class__)
        if issubclass(adapter, MeasuredGrid):
            check_dimensions(type(plain), plain.config)
            plain.latent_grid = latent_grid(plain)
        plain.__class__ = adapter
    return model


class MeasuredGrid(Autoencoder):
    """Goes behind a class of diffusers that this package does not know: its latents are as `latent_grid` found them."""

    latent_grid: tuple[int, int]

    @property
    def latent_channels(self) -> int:
        return self.latent_grid[0]

    @property
    def downsampling(self) -> int:
        return self.latent_grid[1]


@functools.cache
def _adapter(model_class: type) -> type:
    """A class of diffusers with the interface of `Autoencoder` behind it, saved under diffusers' name."""
    name = model_class.__name__
    names = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    return _known_classes().get(name) or type(name, (model_class, MeasuredGrid), names)


# What an autoencoder takes: RGB images, and no video, sound or other channels.

INSTEAD = "give an autoencoder of RGB images, for example AutoencoderKL"
PROBE_SIDE = 64
"""Side in pixels of the image with which an autoencoder is tested."""


def check_channels(model_class: type, config: Mapping[str, Any], where: str = "") -> None:
    """Raises: UserError for a class of diffusers whose settings say another number of image channels than 3."""
    if not any(base.__module__.startswith("diffusers.models.autoencoders") for base in model_class.__mro__):
        return
    for name in ("in_channels", "input_channels", "audio_channels", "out_channels", "output_channels"):
        channels = config.get(name)
        if isinstance(channels, int) and channels != 3:
            what = f"has {channels} image channels ({name}), and images have 3"
            raise UserError(f"{where}{model_class.__name__}", what, INSTEAD)


def check_dimensions(model_class: type, config: Mapping[str, Any], where: str = "") -> None:
    """Raises: UserError for a class of diffusers that is for video or sound, by its convolutions. Takes no memory."""
    model = _without_weights(model_class, config)
    if model is None:  # its loader says what is wrong with the settings
        return
    layers = {kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) for part in model.modules() if isinstance(part, kind)}
    name = f"{where}{model_class.__name__}"
    if nn.Conv3d in layers:
        raise UserError(name, "is for video (it has Conv3d layers)", INSTEAD)
    if nn.Conv1d in layers and nn.Conv2d not in layers:
        raise UserError(name, "is for sound (it has Conv1d layers)", INSTEAD)


def _without_weights(model_class: Any, config: Mapping[str, Any]) -> Any:
    """The network with shapes only; None where it cannot be built so."""
    try:
        with torch.device("meta"):
            return model_class.from_config(dict(config)).eval()
    except Exception:  # whatever its constructor makes of the settings
        return None


def latent_grid(model: Any) -> tuple[int, int]:
    """(latent channels, pixels per latent position along a side), from one image of `PROBE_SIDE` pixels.

    Raises:
        UserError: it does not encode RGB images (n, 3, h, w) to a posterior over latents (n, c, h/f, w/f), or does not
            decode these to such images.
    """
    shapes = _without_weights(type(model), model.config)
    for network in filter(None, (shapes, model)):  # not every class computes without numbers
        try:
            latents, images = _probe(network)
            break
        except Exception as error:  # whatever it makes of such images
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:150]
    else:
        raise UserError(type(model).__name__, f"does not encode and decode RGB images ({failure})", INSTEAD)
    factor = PROBE_SIDE // latents[-1]
    if images != (1, 3, PROBE_SIDE, PROBE_SIDE) or latents[2:] != (PROBE_SIDE // factor,) * 2:
        what = f"makes latents {tuple(latents)} and images {tuple(images)} of images (1, 3, {PROBE_SIDE}, {PROBE_SIDE})"
        raise UserError(type(model).__name__, what, INSTEAD)
    return int(latents[1]), int(factor)


@torch.no_grad()
def _probe(model: Any) -> tuple[torch.Size, torch.Size]:
    """The shapes of the latents and of the decoded image."""
    weight = next(model.parameters())
    image = torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, device=weight.device, dtype=weight.dtype)
    latents = model.encode(image).latent_dist.mode()
    return latents.shape, model.decode(latents).sample.shape


def _known_classes() -> dict[str, Any]:
    """The classes of this package by their names in config.json."""
    return ADAPTED | {kind.model.__name__: kind.model for kind in KINDS.values()}


def model_directory(path: Path) -> Path | None:
    """The directory with the model's config.json: `path`, or the `autoencoder/` of a run; None where there is none."""
    for directory in (path, path / "autoencoder"):
        if (directory / "config.json").is_file():
            return directory
    return None


def _model_class(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """The class that config.json names, and its settings. Raises: UserError."""
    if Path(path).exists():
        try:
            config = dict(json.loads((Path(path) / "config.json").read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}/config.json: not valid JSON ({error}); restore the directory") from error
    else:
        try:
            config = AutoencoderKL.load_config(str(path))
        except OSError as error:
            raise UserError(
                f"{path}: no such folder, and as a hub id it gives no config.json "
                f"({' '.join(str(error).split())[:150]}); give the directory of an autoencoder, or a hub id"
            ) from error
    name = str(config.get("_class_name"))
    if name in (known := _known_classes()):
        return known[name], config
    if name == "AutoencoderRAE":
        raise UserError(
            f"{path}: AutoencoderRAE works at one image size only and on [0, 1]; "
            "train one for any size with autoencoder.kind=frozen"
        )
    model_class = getattr(diffusers, name, None)
    is_model = isinstance(model_class, type) and issubclass(model_class, ModelMixin)
    if not is_model or not (hasattr(model_class, "encode") and hasattr(model_class, "decode")):
        raise UserError(
            f"{path}/config.json: _class_name {name!r} is not an autoencoder of this package or of diffusers"
        )
    return model_class, config
