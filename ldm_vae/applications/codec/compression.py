"""Pictures to files and back: an autoencoder, a grid, an entropy model and the format together.

The levels that a file holds are decoded bit by bit alike everywhere. The picture is then the decoder network's float
arithmetic, which may differ in a last bit of a pixel between machines, as between any two JPEG decoders.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_vae.applications.codec import entropy_models, format
from ldm_vae.applications.codec.entropy_models import (
    EntropyModel,
    Grid,
    StaticModel,
    TooFine,
    best_scale,
    channel_means,
    channel_units,
    step_of,
)
from ldm_vae.applications.codec.format import FittedModel, load_model, short_fingerprint
from ldm_vae.autoencoder.base import decode, encode_moments, is_deterministic
from ldm_vae.autoencoder.models import downsampling, latent_channels, load_autoencoder
from ldm_vae.autoencoder.quantized import AutoencoderQuantized
from ldm_vae.autoencoder.weights import encoder_fingerprint, token_fingerprint
from ldm_vae.data import transforms
from ldm_vae.errors import UserError
from ldm_vae.evaluation.measurement import largest_within

LEVELS_PER_QUALITY = 16
"""Of the search for a size."""


@dataclass(frozen=True)
class Codec:
    """An autoencoder on its device, and the fitted model if there is one. `where` names it in errors."""

    autoencoder: Any
    model: FittedModel | None
    identity: str
    channels: int
    factor: int
    where: str


@dataclass(frozen=True)
class Analysed:
    """A picture's latents, (c, h/f, w/f) float64, what its grid is made of, and its size in pixels."""

    latents: np.ndarray
    mean: np.ndarray
    unit: np.ndarray
    height: int
    width: int
    name: str


@dataclass(frozen=True)
class Compressed:
    """A file, and the bits that a perfect coder would need for its levels under the same model."""

    data: bytes
    levels: np.ndarray
    model: EntropyModel
    step: int

    @property
    def ideal_bits(self) -> float:
        return entropy_models.ideal_bits(self.model, self.levels)


def identity(autoencoder: Any) -> str:
    """What the latents of a file belong to: the encoder's fingerprint, for codes that of the quantizer as well.

    A decoder that was trained further (encoder frozen) keeps it, so that old files get better with it.
    """
    quantized = isinstance(autoencoder, AutoencoderQuantized)
    return token_fingerprint(autoencoder) if quantized else encoder_fingerprint(autoencoder)


def open_codec(autoencoder: str, entropy: str | None = None, device: torch.device | None = None) -> Codec:
    """Load both. Raises: UserError, also when the entropy model was fitted to latents of another autoencoder."""
    model = load_autoencoder(autoencoder).to(device or torch.device("cpu"))
    fitted = load_model(entropy) if entropy is not None else None
    own = identity(model)
    channels = latent_channels(model)
    if channels > format.MOST_CHANNELS:
        raise UserError(f"{autoencoder}: has {channels} latent channels; the codec is for {format.MOST_CHANNELS}")
    if fitted is not None and (fitted.autoencoder != own or fitted.channels != channels):
        raise UserError(
            f"{entropy}: was fitted to the latents of another autoencoder than {autoencoder}; give that one, or fit "
            "this one with `ldm-vae codec-fit`"
        )
    return Codec(model, fitted, own, channels, downsampling(model), autoencoder)


def analyse(codec: Codec, image: np.ndarray, name: str) -> Analysed:
    """Encode uint8 (h, w, 3) of any size. Raises: UserError for a picture that is too large."""
    height, width = image.shape[:2]
    if max(height, width) > format.LARGEST_SIDE or height * width > format.MOST_PIXELS:
        raise UserError(f"{name}: {width} x {height} is too large to compress; reduce or cut the picture")
    tensor = transforms.from_uint8(torch.from_numpy(image.copy()).permute(2, 0, 1)[None]).to(codec.autoencoder.device)
    mean, logvar = encode_moments(codec.autoencoder, tensor)
    if not bool(torch.isfinite(mean).all()):
        raise UserError(f"{name}: the autoencoder gives latents that are not finite; it is damaged or diverged")
    known = None if is_deterministic(codec.autoencoder) else logvar
    latents = mean[0].double().cpu().numpy()
    return Analysed(latents, channel_means(mean), channel_units(mean, known), height, width, name)


def compress(codec: Codec, picture: Analysed, step: int, parts: Sequence[int] = ()) -> Compressed:
    """The file of a picture at a step in 1/1024 units.

    Args:
        parts: numbers of first channels that can be decoded without the rest, rising.
    """
    ends = (*(end for end in parts if end < codec.channels), codec.channels)
    if codec.model is None:
        own = format.SelfFitted.rounded(picture.mean, picture.unit, (0,) * codec.channels)
        levels = Grid(own.mean, own.unit, step).quantise(picture.latents, picture.name)
        scales = tuple(best_scale(plane) for plane in levels)
        entropy: format.SelfFitted | bytes = format.SelfFitted(own.mean, own.unit, scales)
        model: EntropyModel = StaticModel(scales)
    else:
        entropy, model = codec.model.short_fingerprint, codec.model.at(step)
        levels = Grid(codec.model.mean, codec.model.unit, step).quantise(picture.latents, picture.name)
    header = format.Header(
        short_fingerprint(codec.identity), picture.width, picture.height, step, codec.channels, entropy, ends
    )
    data = format.pack(header, entropy_models.encode(model, levels, ends))
    return Compressed(data, levels, model, step)


def compress_within(codec: Codec, picture: Analysed, bits_per_pixel: float, parts: Sequence[int] = ()) -> Compressed:
    """The best file of at most so many bits per pixel. Raises: UserError where even quality 1 takes more."""
    budget = bits_per_pixel * picture.width * picture.height / 8
    found: dict[int, Compressed] = {}

    def size(level: int) -> int:
        if level not in found:
            try:
                found[level] = compress(codec, picture, step_of(level / LEVELS_PER_QUALITY), parts)
            except TooFine:
                return sys.maxsize
        return len(found[level].data)

    best = largest_within(size, LEVELS_PER_QUALITY, 100 * LEVELS_PER_QUALITY, budget)
    if best is None:
        least = 8 * len(compress(codec, picture, step_of(1.0), parts).data) / (picture.width * picture.height)
        raise UserError(
            f"{picture.name}: its smallest file has {least:.3f} bits per pixel, more than {bits_per_pixel:g}; give a "
            "higher --target-bpp, or leave it out and take --quality 1"
        )
    size(best)
    return found[best]


def decompress(codec: Codec, data: bytes, name: str, channels: int | None = None) -> np.ndarray:
    """The picture in a file's bytes, uint8 (h, w, 3); see `decompress_file`."""
    return _decompress(codec, *format.read(io.BytesIO(data), len(data), name, channels), name)


def decompress_file(codec: Codec, path: Path, channels: int | None = None) -> np.ndarray:
    """The picture in a file, uint8 (h, w, 3).

    Args:
        channels: a preview from so many first channels, the others zero; only their part of the file is read, and
            the rest may be missing.

    Raises:
        UserError: damaged, cut off, newer, or of another autoencoder or entropy model.
    """
    with open(path, "rb") as file:
        return _decompress(codec, *format.read(file, os.fstat(file.fileno()).st_size, str(path), channels), str(path))


def levels_of(codec: Codec, header: format.Header, data: list[bytes], name: str) -> tuple[Grid, np.ndarray]:
    """The grid and the levels of the channels in `data`. Raises: UserError."""
    check_origin(codec, header, name)
    size = -(-header.height // codec.factor), -(-header.width // codec.factor)
    own, fitted = header.entropy, codec.model
    if isinstance(own, format.SelfFitted):
        model: EntropyModel = StaticModel(own.scales)
        grid = Grid(own.mean, own.unit, header.step)
    else:
        assert fitted is not None, "check_origin asks for it"
        model, grid = fitted.at(header.step), Grid(fitted.mean, fitted.unit, header.step)
    return grid, entropy_models.decode(model, data, header.parts, size, name)


def check_origin(codec: Codec, header: format.Header, name: str) -> None:
    """Raises: UserError unless autoencoder and entropy model are those of the file."""
    if header.autoencoder != short_fingerprint(codec.identity) or header.channels != codec.channels:
        raise UserError(
            f"{name}: was compressed with autoencoder {header.autoencoder.hex()}, and {codec.where} is "
            f"{short_fingerprint(codec.identity).hex()}; give the one that compressed it"
        )
    if isinstance(header.entropy, format.SelfFitted):
        return
    if codec.model is None:
        raise UserError(f"{name}: needs the entropy model {header.entropy.hex()}; give its file with --entropy")
    if codec.model.short_fingerprint != header.entropy:
        raise UserError(
            f"{name}: was compressed with entropy model {header.entropy.hex()}, this one is "
            f"{codec.model.short_fingerprint.hex()}; give the one that compressed it"
        )


def latents_of(codec: Codec, data: bytes, name: str) -> np.ndarray:
    """The latents in a file's bytes, (c, h/f, w/f) float32. Raises: UserError."""
    grid, levels = levels_of(codec, *format.read(io.BytesIO(data), len(data), name), name)
    return grid.restore(levels)


def picture_of(codec: Codec, latents: np.ndarray, height: int, width: int) -> np.ndarray:
    """What latents (c, h/f, w/f) decode to, cropped to uint8 (height, width, 3)."""
    tensor = torch.from_numpy(latents)[None].to(codec.autoencoder.device)
    image = decode(codec.autoencoder, tensor)[0, :, :height, :width]
    return transforms.to_uint8(image).permute(1, 2, 0).cpu().contiguous().numpy()


def _decompress(codec: Codec, header: format.Header, data: list[bytes], name: str) -> np.ndarray:
    grid, levels = levels_of(codec, header, data, name)
    latents = np.zeros((codec.channels, *levels.shape[1:]), np.float32)
    latents[: len(levels)] = grid.restore(levels)
    return picture_of(codec, latents, header.height, header.width)
