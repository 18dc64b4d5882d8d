"""Which autoencoder: the settings, and building or loading one. The only place that chooses between architectures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ldm_vae import compat
from ldm_vae.errors import UserError

compat.repair_torchvision()

import diffusers
from diffusers import AutoencoderKL

from ldm_vae.autoencoder.wavelet import AutoencoderWavelet

WAVELET_PRESETS: dict[str, dict[str, tuple[int, ...]]] = {
    "pico": {
        "encoder_channels": (48, 96),
        "encoder_blocks": (1, 2),
        "decoder_channels": (128, 64, 32, 16),
        "decoder_blocks": (2, 2, 0, 0),
    },
    "nano": {
        "encoder_channels": (64, 128),
        "encoder_blocks": (2, 2),
        "decoder_channels": (160, 80, 32, 16),
        "decoder_blocks": (3, 3, 1, 0),
    },
    "small": {
        "encoder_channels": (32, 96, 192),
        "encoder_blocks": (1, 2, 3),
        "decoder_channels": (256, 128, 48, 16),
        "decoder_blocks": (4, 4, 2, 0),
    },
    "base": {
        "encoder_channels": (64, 128, 256),
        "encoder_blocks": (2, 3, 3),
        "decoder_channels": (384, 192, 96, 32),
        "decoder_blocks": (4, 4, 3, 0),
    },
}

SD_PRESETS: dict[str, tuple[int, ...]] = {
    "tiny": (16, 16, 32, 32),
    "sd": (128, 256, 512, 512),
}


@dataclass(frozen=True)
class AutoencoderConfig:
    """The architecture. `wavelet`: pico, nano, small, base. `sd` (diffusers' AutoencoderKL): tiny, sd."""

    architecture: Literal["wavelet", "sd"] = "wavelet"
    preset: str = "nano"
    latent_channels: int = 4

    def __post_init__(self) -> None:
        presets = WAVELET_PRESETS if self.architecture == "wavelet" else SD_PRESETS
        if self.preset not in presets:
            raise UserError(
                f"autoencoder.preset: {self.preset!r} is no preset of architecture {self.architecture!r}; "
                f"choose one of {', '.join(presets)}"
            )
        if not 1 <= self.latent_channels <= 256:
            raise UserError(f"autoencoder.latent_channels: {self.latent_channels} is not between 1 and 256")


def build_autoencoder(config: AutoencoderConfig, logvar_floor: float = -7.0) -> Any:
    """A new autoencoder with random weights, float32, channels_last. Seed torch before for reproducible weights."""
    if config.architecture == "wavelet":
        model: Any = AutoencoderWavelet(
            latent_channels=config.latent_channels, logvar_floor=logvar_floor, **WAVELET_PRESETS[config.preset]
        )
    else:
        widths = SD_PRESETS[config.preset]
        model = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=2 if config.preset == "sd" else 1,
            latent_channels=config.latent_channels,
            norm_num_groups=min(32, widths[0] // 2),
            sample_size=512,
            scaling_factor=1.0,
        )
    return model.to(memory_format=torch.channels_last)


def load_autoencoder(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """An autoencoder from a diffusers directory (or hub id), ready for inference: eval, frozen, channels_last.

    A run directory of `train-vae` works too: its `autoencoder/` is taken. Weights come from safetensors only.

    Raises:
        UserError: naming the path, when it holds no autoencoder that encodes to a latent distribution.
    """
    directory = Path(path)
    if not directory.exists() and (str(path).count("/") != 1 or str(path).startswith(".")):
        raise UserError(f"{path}: no such directory; give the directory that `ldm-vae train-vae` wrote, or a hub id")
    if directory.exists():
        if not (directory / "config.json").is_file() and (directory / "autoencoder" / "config.json").is_file():
            directory = directory / "autoencoder"
        if not (directory / "config.json").is_file():
            raise UserError(
                f"{directory}: holds no config.json, so it is no autoencoder; "
                "a finished training run has one in RUN/autoencoder"
            )
        path = directory
    model_class = _model_class(path)
    try:
        model = model_class.from_pretrained(path, torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be loaded as {model_class.__name__}: {str(error).splitlines()[0]}") from error
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _model_class(path: str | Path) -> Any:
    if Path(path).exists():
        try:
            config = json.loads((Path(path) / "config.json").read_text())
        except ValueError as error:
            raise UserError(f"{path}/config.json: not valid JSON ({error}); restore the directory") from error
    else:
        config = AutoencoderKL.load_config(str(path))
    name = str(config.get("_class_name"))
    if name == AutoencoderWavelet.__name__:
        return AutoencoderWavelet
    model_class = getattr(diffusers, name, None)
    if not name.startswith("Autoencoder") or model_class is None:
        raise UserError(f"{path}/config.json: _class_name {name!r} is no autoencoder of this package or of diffusers")
    return model_class


def latent_channels(autoencoder: Any) -> int:
    """Channels of the latent."""
    return int(autoencoder.config.latent_channels)


def downsampling(autoencoder: Any) -> int:
    """Image pixels per latent position along one side (8 for every f8 autoencoder)."""
    if isinstance(autoencoder, AutoencoderWavelet):
        return 8
    widths = getattr(autoencoder.config, "block_out_channels", None)
    return 2 ** (len(widths) - 1) if widths else 8
