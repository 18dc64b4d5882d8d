"""Which autoencoder: the settings, and building or loading one. The only place that chooses between kinds."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ldm_vae import runtime

runtime.repair_torchvision()

import diffusers
from diffusers import AutoencoderKL

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.deterministic import ADAPTED
from ldm_vae.autoencoder.fast_layers import prepare_for_inference
from ldm_vae.autoencoder.frozen import AutoencoderFrozenEncoder
from ldm_vae.autoencoder.quantized import AutoencoderQuantized
from ldm_vae.autoencoder.vector import AutoencoderVector
from ldm_vae.autoencoder.wavelet import PIXELS, AutoencoderWavelet
from ldm_vae.autoencoder.weights import load_weights
from ldm_vae.errors import UserError
from ldm_vae.files import check_checksums

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

VECTOR_PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"encoder_channels": (16, 32, 64), "decoder_channels": (48, 32, 24, 16), "hidden_channels": 64},
}

PRESETS: dict[str, dict[str, Any]] = {"wavelet": WAVELET_PRESETS, "sd": SD_PRESETS, "vector": VECTOR_PRESETS}

KINDS = {"wavelet": ("kl", "ae", "vq", "fsq", "frozen"), "sd": ("kl",), "vector": ("kl", "ae")}
"""Architecture -> the kinds that are built with it."""

MAXIMUM_CODES = 2**20

LINEAR_PATH_MARGIN = 3.0
"""So much lower may log-variances fall: a block's brightness takes several times the nats of its finest pattern."""

OWN_CLASSES: dict[str, Any] = {
    model.__name__: model
    for model in (AutoencoderWavelet, AutoencoderQuantized, AutoencoderFrozenEncoder, AutoencoderVector)
}

USED_BY: dict[str, str] = {
    "codebook_size": "vq",
    "codebook": "vq",
    "fsq_levels": "fsq",
    "encoder": "frozen",
    "residual_channels": "frozen",
}
"""Setting -> the kind that it is for."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Kind and architecture. `wavelet`: pico, nano, small, base. `sd` (diffusers' AutoencoderKL): tiny, sd. `vector`:
    digits, one vector a grey image of 32 x 32 pixels.

    Args:
        architecture: "sd" is for kind "kl" only, "vector" for "kl" and "ae".
        preset: sizes of encoder and decoder.
        latent_channels: channels of the latent; for "fsq" as many as there are levels; for "frozen" they follow from
            `encoder` and `residual_channels`, so that this stays at its default.
        kind: what the latent is. "kl": a posterior held to a rate. "ae": a point, unregularised. "vq": one of a
            codebook's vectors. "fsq": rounded channels. "frozen": the features of a pretrained vision transformer.
        codebook_size: "vq": number of codes, default 1024.
        codebook: "vq": "rotation" (default), learnt by gradient; "ema", a moving average of the latents.
        fsq_levels: "fsq": levels of each channel, from 3 on, default 8, 5, 5, 5 (1000 codes).
        encoder: "frozen": local directory or hub id of a DINOv2 or DINOv3 vision transformer in safetensors.
        residual_channels: "frozen": channels that a small learnt encoder adds to the features.
        linear_path: "wavelet", "kl" or "ae": the network starts as the best linear code of the training images' 8x8
            blocks and adds to it. For 12 channels and more.
    """

    architecture: Literal["wavelet", "sd", "vector"] = "wavelet"
    preset: str = "nano"
    latent_channels: int = 4
    kind: Literal["kl", "ae", "vq", "fsq", "frozen"] = "kl"
    codebook_size: int | None = None
    codebook: Literal["rotation", "ema"] | None = None
    fsq_levels: list[int] | None = None
    encoder: str | None = None
    residual_channels: int = 0
    linear_path: bool = False

    def __post_init__(self) -> None:
        presets = PRESETS[self.architecture]
        if self.preset not in presets:
            raise UserError(
                f"autoencoder.preset: {self.preset!r} is no preset of architecture {self.architecture!r}; "
                f"choose one of {', '.join(presets)}"
            )
        if not 1 <= self.latent_channels <= 256:
            raise UserError(f"autoencoder.latent_channels: {self.latent_channels} is not between 1 and 256")
        if self.kind not in KINDS[self.architecture]:
            others = [name for name, kinds in KINDS.items() if self.kind in kinds]
            raise UserError(
                f"autoencoder.kind: {self.kind} is built with architecture={' or '.join(others)} only; set that, or "
                "kind=kl"
            )
        for name, kind in USED_BY.items():
            if self.kind != kind and getattr(self, name) not in (None, 0):
                raise UserError(
                    f"autoencoder.{name}: has no effect with autoencoder.kind={self.kind}; remove it, or set {kind}"
                )
        if self.linear_path and (self.architecture != "wavelet" or self.kind not in ("kl", "ae")):
            raise UserError(
                f"autoencoder.linear_path: has no effect with architecture={self.architecture} and kind={self.kind}; "
                "remove it, or set architecture=wavelet and kind=kl"
            )
        if self.linear_path and self.latent_channels > PIXELS:
            raise UserError(
                f"autoencoder.latent_channels: {self.latent_channels} are more than the {PIXELS} numbers of a block of "
                "pixels, which autoencoder.linear_path describes; lower it, or leave linear_path out"
            )
        check = {"vq": self._check_vq, "fsq": self._check_fsq, "frozen": self._check_frozen}.get(self.kind)
        if check is not None:
            check()

    def _check_vq(self) -> None:
        if self.codebook_size is not None and not 2 <= self.codebook_size <= MAXIMUM_CODES:
            raise UserError(
                f"autoencoder.codebook_size: {self.codebook_size} is not between 2 and {MAXIMUM_CODES}; try 1024"
            )

    def _check_fsq(self) -> None:
        levels = self.levels
        if len(levels) != self.latent_channels:
            raise UserError(
                f"autoencoder.fsq_levels: has {len(levels)} entries for {self.latent_channels} latent channels; "
                f"give one level a channel, or set autoencoder.latent_channels={len(levels)}"
            )
        if min(levels) < 3 or math.prod(levels) > MAXIMUM_CODES:
            raise UserError(
                f"autoencoder.fsq_levels: {list(levels)} is not from 3 on with a product up to {MAXIMUM_CODES}; "
                "try 8, 5, 5, 5"
            )

    def _check_frozen(self) -> None:
        if not self.encoder:
            raise UserError(
                "autoencoder.encoder: kind=frozen needs one; give the directory or hub id of a DINOv2 or DINOv3 "
                "vision transformer, such as facebook/dinov2-with-registers-small"
            )
        if not 0 <= self.residual_channels <= 256:
            raise UserError(f"autoencoder.residual_channels: {self.residual_channels} is not between 0 and 256")
        if self.latent_channels != type(self).latent_channels:
            raise UserError(
                "autoencoder.latent_channels: has no effect with autoencoder.kind=frozen, where the encoder sets it; "
                "remove it, or set autoencoder.residual_channels"
            )

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of each channel, "fsq"."""
        return tuple(self.fsq_levels or (8, 5, 5, 5))


def build_autoencoder(config: AutoencoderConfig, logvar_floor: float = -7.0) -> Autoencoder:
    """A new autoencoder with random weights, float32, see `inference`. Seed torch before for reproducible weights.

    `logvar_floor` is for kind "kl", not with architecture "sd". Kind "frozen" reads its encoder here, from disk or,
    when it is a hub id, from the hub; its statistics are still to be fitted.
    """
    if config.architecture == "sd":
        model = _build_sd(config)
    elif config.architecture == "vector":
        model = AutoencoderVector(
            latent_channels=config.latent_channels,
            logvar_floor=logvar_floor,
            deterministic=config.kind == "ae",
            **VECTOR_PRESETS[config.preset],
        )
    elif config.kind in ("vq", "fsq"):
        model = AutoencoderQuantized(
            kind=config.kind,  # type: ignore[arg-type]
            latent_channels=config.latent_channels,
            codebook_size=config.codebook_size or 1024,
            codebook=config.codebook or "rotation",
            fsq_levels=config.levels,
            **WAVELET_PRESETS[config.preset],
        )
    elif config.kind == "frozen":
        model = _build_frozen(config)
    else:
        if config.linear_path:
            logvar_floor -= LINEAR_PATH_MARGIN
        floor = {} if config.kind == "ae" else {"logvar_floor": logvar_floor}
        model = AutoencoderWavelet(
            latent_channels=config.latent_channels,
            deterministic=config.kind == "ae",
            linear_path=config.linear_path,
            **floor,
            **WAVELET_PRESETS[config.preset],
        )
    return as_autoencoder(model)


def _build_sd(config: AutoencoderConfig) -> Any:
    widths = SD_PRESETS[config.preset]
    return AutoencoderKL(
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


def _build_frozen(config: AutoencoderConfig) -> AutoencoderFrozenEncoder:
    """The preset's layers and one more stage at h/16: as wide for the residual encoder, twice for the decoder."""
    preset = WAVELET_PRESETS[config.preset]
    encoder, decoder = preset["encoder_channels"], preset["decoder_channels"]
    return AutoencoderFrozenEncoder.from_encoder(
        str(config.encoder),
        residual_channels=config.residual_channels,
        encoder_channels=(*encoder, encoder[-1]),
        encoder_blocks=(*preset["encoder_blocks"], preset["encoder_blocks"][-1]),
        decoder_channels=(2 * decoder[0], *decoder),
        decoder_blocks=(preset["decoder_blocks"][0], *preset["decoder_blocks"]),
    )


def load_autoencoder(path: str | Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """An autoencoder from a diffusers directory (or hub id), ready for inference: eval, frozen, see `inference`.

    A run directory of `train-vae` works too: its `autoencoder/` is taken. Weights come from safetensors only.
    diffusers' `AutoencoderTiny`, `AutoencoderDC` and `VQModel` get the interface of a posterior.

    Raises:
        UserError: naming the path, when it holds no autoencoder of images of any size in [-1, 1], or a damaged one:
            see `seal` and `weights`.
    """
    directory = Path(path)
    could_be_on_the_hub = str(path).count("/") == 1 and not str(path).startswith(".") and not directory.parent.is_dir()
    if not directory.exists() and not could_be_on_the_hub:
        raise UserError(f"{path}: no such directory; give the directory that `ldm-vae train-vae` wrote, or a hub id")
    if directory.exists():
        found = model_directory(directory)
        if found is None:
            raise UserError(
                f"{directory}: holds no config.json, so it is no autoencoder; "
                "a finished training run has one in RUN/autoencoder"
            )
        path = found
        check_checksums(found)
    model_class = _model_class(path)
    model = load_weights(model_class, path, dtype)
    return as_autoencoder(model.requires_grad_(False))


def as_autoencoder(model: Any) -> Autoencoder:
    """The same model, ready for inference, with the interface of `Autoencoder`."""
    return prepare_for_inference(adapted(model))


def adapted(model: Any) -> Any:
    """The same model: one of diffusers' classes gets the interface of `Autoencoder`, and keeps its name when saved."""
    plain = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(plain, Autoencoder):
        plain.__class__ = _adapter(plain.__class__)
    return model


@functools.cache
def _adapter(model_class: type) -> type:
    """A class of diffusers with the interface of `Autoencoder` behind it, saved under diffusers' name."""
    name = model_class.__name__
    names = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    return ADAPTED.get(name) or type(name, (model_class, Autoencoder), names)


def model_directory(path: Path) -> Path | None:
    """The directory with the model's config.json: `path`, or the `autoencoder/` of a run; None where there is none."""
    for directory in (path, path / "autoencoder"):
        if (directory / "config.json").is_file():
            return directory
    return None


def _model_class(path: str | Path) -> Any:
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
                f"{path}: no such directory, and as a hub id it gives no config.json "
                f"({' '.join(str(error).split())[:150]}); give the directory of an autoencoder, or a hub id"
            ) from error
    name = str(config.get("_class_name"))
    if name in OWN_CLASSES or name in ADAPTED:
        return OWN_CLASSES.get(name) or ADAPTED[name]
    if name == "AutoencoderRAE":
        raise UserError(
            f"{path}: AutoencoderRAE works at one image size only and on [0, 1]; "
            "train one for any size with autoencoder.kind=frozen"
        )
    model_class = getattr(diffusers, name, None)
    if not name.startswith("Autoencoder") or model_class is None:
        raise UserError(f"{path}/config.json: _class_name {name!r} is no autoencoder of this package or of diffusers")
    return model_class
