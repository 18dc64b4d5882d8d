"""The way of an image through an autoencoder, stage by stage: shapes, parameters, cost, and what a stage really gives.

Owns which modules make a stage, for the architectures of this package and diffusers' `AutoencoderKL`; others are shown
as one encoder and one decoder. Numbers are taken from real passes, by hooks, never from a drawing of the architecture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae import runtime

runtime.repair_torchvision()

from diffusers.models.autoencoders.vae import Decoder as SdDecoder
from diffusers.models.autoencoders.vae import Encoder as SdEncoder

from ldm_vae.applications.explorer.explored import Explored
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.vector import SMALLEST_SIDE, VectorDecoder, VectorEncoder
from ldm_vae.autoencoder.wavelet import BLOCK, Decoder, Encoder, Stage
from ldm_vae.data import transforms
from ldm_vae.errors import UserError
from ldm_vae.runtime import gigamacs

INPUT, MU, SIGMA, SAMPLE, OUTPUT = "input", "mu", "sigma", "sample", "output"
SHOWN_CHANNELS = 64
SMALLEST_TILE = 48
LARGEST_TILE = 192
GAP = 2
"""Sides of a channel's picture, and between two of them, in pixels."""
RANGE = 3.0
"""Standard deviations of a latent channel from black to gray, and from gray to white."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NetworkStage:
    """One step. `name`: in addresses, `title` and `what`: for people; shapes without the batch; `gmacs`: 10^9
    multiply-accumulates for one image, `parameters`: numbers that were learned, 0 for what computes nothing."""

    name: str
    title: str
    what: str
    shape_in: Shape
    shape_out: Shape
    parameters: int
    gmacs: float


@dataclass(frozen=True, eq=False)
class Activation:
    """What one stage gave for one image.

    `mean`, `deviation`, `minimum`, `maximum`: over all its numbers. `mosaic`: uint8, (H, W, 3) the picture itself for
    input and output, else (H, W) its first 64 channels as gray pictures, each from its least to its largest value;
    those of the latent on one scale for all images: gray the channel's mean, black and white three deviations off
    (sigma: black 0, white the largest of all images).
    """

    stage: str
    shape: Shape
    mean: float
    deviation: float
    minimum: float
    maximum: float
    mosaic: np.ndarray


@torch.no_grad()
def stages_of(explored: Explored) -> tuple[NetworkStage, ...]:
    """All stages in the order of the way, measured with the first image."""
    image = transforms.from_uint8(explored.images[:1].to(explored.autoencoder.device))
    latent = explored.mean[:1].to(explored.autoencoder.device)
    encoder, decoder = encoder_parts(explored.autoencoder), decoder_parts(explored.autoencoder)
    picture, shape = tuple(image.shape[1:]), tuple(latent.shape[1:])
    with explored.lock:
        encoding = _measured(encoder, picture, lambda: explored.autoencoder.encode_moments(image))
        decoding = _measured(decoder, shape, lambda: explored.autoencoder.decode_images(latent))
    return (
        NetworkStage(INPUT, "Input", "The image, its red, green and blue scaled to -1 to 1.", picture, picture, 0, 0.0),
        *encoding,
        *_latent_stages(explored, encoding[-1].shape_out if encoding else shape, shape),
        *decoding,
    )


def _latent_stages(explored: Explored, moments: Shape, shape: Shape) -> Iterator[NetworkStage]:
    """mu, sigma and the sample, which compute next to nothing."""
    sigma = "How far the posterior reaches around mu: exp(0.5 logvar), small where the image fixes the latent."
    sample = "mu + noise x sigma x a standard normal draw: what the decoder gets in training."
    if explored.deterministic:
        sigma = "None: this autoencoder is deterministic, it gives a point where a VAE gives a distribution."
        sample = "mu itself: with no sigma there is nothing to draw."
    if explored.kind in ("vq", "fsq"):
        sample = "mu rounded to the nearest code: all that the decoder sees."
    yield NetworkStage(MU, "mu", "The mean of the posterior: the latent itself.", moments, shape, 0, 0.0)
    yield NetworkStage(SIGMA, "sigma", sigma, moments, shape, 0, 0.0)
    quantizer = getattr(explored.autoencoder, "quantizer", None) or getattr(explored.autoencoder, "quantize", None)
    learned = _parameters([quantizer]) if isinstance(quantizer, nn.Module) else 0
    yield NetworkStage(SAMPLE, "Sample", sample, shape, shape, learned, 0.0)


def _measured(parts: Sequence[StageModules], shape_in: Shape, run: Any) -> list[NetworkStage]:
    """Stages of one half of the network. What is computed outside of their modules belongs to the first."""
    modules = [module for part in parts for module in part.modules]
    with _recorded(modules) as calls:
        run()
    costs = [sum(gigamacs(calls[module].again) for module in part.modules if module in calls) for part in parts]
    if costs:
        costs[0] += max(0.0, gigamacs(run) - sum(costs))
    found = []
    for number, (part, cost) in enumerate(zip(parts, costs)):
        first, last = calls[part.modules[0]], calls[part.modules[-1]]
        came = shape_in if number == 0 else _shape(first.arguments[0])
        found.append(
            NetworkStage(
                part.name, part.title, part.what, came, _shape(part.arranged(last.output)), _parameters(part.modules),
                cost,
            )
        )  # fmt: skip
    return found


def measure_activation(
    explored: Explored, index: int, stage: str, noise: float = 1.0, seed: int = 0, sample: bool = True
) -> Activation:
    """What a stage gives for image `index`; `noise`, `seed` and `sample`, see `Explored.latent`, matter from the sample
    on.

    Raises:
        UserError: no stage of that name.
    """
    if stage == INPUT:
        return _described(stage, transforms.from_uint8(explored.images[index]), _picture(explored.images[index]))
    mean, logvar = explored.mean[index], explored.logvar[index]
    if stage == MU:
        return _described(stage, mean, _on_scale(explored, mean))
    if stage == SIGMA:
        sigma = torch.zeros_like(mean) if explored.deterministic else torch.exp(0.5 * logvar)
        return _described(stage, sigma, mosaic(sigma / _largest_sigma(explored)))
    latent = explored.latent(index, noise, sample, seed)
    if stage == SAMPLE:
        if explored.autoencoder.codebook_size is not None:
            with explored.lock, torch.no_grad():
                codes = explored.autoencoder.quantized(latent.to(explored.autoencoder.device))[0].cpu()
            return _described(stage, codes, mosaic(_stretched(codes)))
        return _described(stage, latent[0], _on_scale(explored, latent[0]))
    if stage == OUTPUT:
        decoded = explored.decode(latent)[0]
        return _described(stage, transforms.from_uint8(decoded), _picture(decoded))
    for parts, run in (
        (encoder_parts(explored.autoencoder), lambda: explored.encode(explored.images[index : index + 1])),
        (decoder_parts(explored.autoencoder), lambda: explored.decode(latent)),
    ):
        part = next((part for part in parts if part.name == stage), None)
        if part is not None:
            with explored.lock, _recorded(part.modules[-1:]) as calls:
                run()
            values = part.arranged(calls[part.modules[-1]].output)[0].float().cpu()
            return _described(stage, values, mosaic(_stretched(values)))
    raise UserError(f"stage: {stage!r} is none of this autoencoder's; /api/stages names them")


@dataclass
class _Call:
    """The last call of a module."""

    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor

    def again(self) -> Any:
        return self.module(*self.arguments, **self.keywords)


@contextmanager
def _recorded(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, _Call]]:
    """Inside, every call of a module is kept. The caller holds the lock, so that it is its own."""
    calls: dict[nn.Module, _Call] = {}

    def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        calls[module] = _Call(module, arguments, keywords, output if isinstance(output, Tensor) else output[0])

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _shape(values: Tensor) -> Shape:
    return tuple(int(length) for length in values.shape[1:])


def _parameters(modules: Sequence[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _described(stage: str, values: Tensor, picture: np.ndarray) -> Activation:
    values = values.double()
    return Activation(
        stage, tuple(values.shape), float(values.mean()), float(values.std(correction=0)), float(values.min()),
        float(values.max()), picture,
    )  # fmt: skip


def _picture(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).contiguous().numpy()


def _on_scale(explored: Explored, latent: Tensor) -> np.ndarray:
    """A latent (c, h, w) against all images' means."""
    center = explored.mean.mean(dim=(0, 2, 3))[:, None, None]
    reach = RANGE * explored.channel_deviation[:, None, None].clamp_min(1e-6)
    return mosaic(0.5 + 0.5 * (latent - center) / reach)


def _largest_sigma(explored: Explored) -> Tensor:
    return torch.exp(0.5 * explored.logvar.amax(dim=(0, 2, 3)))[:, None, None].clamp_min(1e-6)


def _stretched(values: Tensor) -> Tensor:
    """(c, h, w) -> each channel from 0 to 1, 0.5 where it is constant; channels of one number, also (c,), together."""
    flat = values.reshape(len(values), -1)
    if flat.shape[1] == 1:
        flat = flat.T
    low, high = flat.min(dim=1, keepdim=True).values, flat.max(dim=1, keepdim=True).values
    scaled = torch.where(high > low, (flat - low) / (high - low).clamp_min(1e-30), 0.5)
    return scaled.reshape(values.shape)


def mosaic(channels: Tensor) -> np.ndarray:
    """The first 64 channels of (c, h, w) or (c,), values from 0 to 1, as one gray picture, uint8 (H, W).

    Small ones are enlarged by a whole number of times, large ones shrunk; up to four stand in one row.
    """
    tiles = channels[:SHOWN_CHANNELS].reshape(min(len(channels), SHOWN_CHANNELS), 1, *channels.shape[1:] or (1, 1))
    longest = max(tiles.shape[-2:])
    if longest > LARGEST_TILE:
        height, width = (max(1, round(side * LARGEST_TILE / longest)) for side in tiles.shape[-2:])
        tiles = F.interpolate(tiles.float(), (height, width), mode="area")
    elif longest < SMALLEST_TILE:
        tiles = F.interpolate(tiles.float(), scale_factor=float(SMALLEST_TILE // longest), mode="nearest")
    gray = (
        (transforms.finite_pixels(tiles[:, 0].float(), "activations").clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    )
    count, height, width = gray.shape
    root = math.sqrt(count)
    whole = [columns for columns in range(math.ceil(root), int(2 * root) + 1) if count % columns == 0]
    columns = count if count <= 4 else whole[0] if whole else math.ceil(root)
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), np.uint8)
    for number, tile in enumerate(gray):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = tile
    return sheet


# Which modules of an autoencoder make a stage of the way through it, by architecture.

MOMENTS = "Mean and log-variance of the posterior, one channel after the other."
LATENT = "The last layer of the encoder: the latent."


@dataclass(frozen=True, eq=False)
class StageModules:
    """A stage that computes. `modules` in the order of their calls; the last one's output is what the stage gives.

    `side`: of the square feature maps that a flat output stands for; None: it is taken as it is.
    """

    name: str
    title: str
    what: str
    modules: tuple[nn.Module, ...]
    side: int | None = None

    def arranged(self, output: Tensor) -> Tensor:
        """(1, c, h, w), or (1, c): the output of the last module. Tokens (1, t, c) become a square, leading ones left
        out."""
        if self.side is not None:
            return output.unflatten(1, (-1, self.side, self.side))
        if output.ndim == 3:
            side = math.isqrt(output.shape[1])
            return output[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))
        return output


def encoder_parts(autoencoder: Autoencoder) -> list[StageModules]:
    """From the image to the moments."""
    if autoencoder.kind == "frozen":
        learned = [] if autoencoder.residual is None else [("A small learned encoder beside it.", autoencoder.residual)]
        return _numbered("encoder", "Encoder", [("A frozen vision transformer.", autoencoder.vision), *learned])
    encoder = getattr(autoencoder, "encoder", None)
    if isinstance(encoder, (Encoder, VectorEncoder)):
        inside = list(_wavelet_encoder(encoder) if isinstance(encoder, Encoder) else _vector_encoder(encoder))
        return [
            *_numbered("encoder", "Encoder", inside),
            _moments(autoencoder, encoder.head, getattr(encoder, "added", None)),
        ]
    if isinstance(encoder, SdEncoder):
        last = [encoder.conv_norm_out, encoder.conv_out, getattr(autoencoder, "quant_conv", None)]
        return [*_numbered("encoder", "Encoder", _sd_encoder(encoder)), _moments(autoencoder, *last)]
    return _numbered("encoder", "Encoder", [("The whole encoder.", encoder)] if isinstance(encoder, nn.Module) else [])


def decoder_parts(autoencoder: Autoencoder) -> list[StageModules]:
    """From the latent to the image."""
    decoder = getattr(autoencoder, "decoder", None)
    title = "The last layer: red, green and blue."
    if isinstance(decoder, Decoder):
        parts = _numbered("decoder", "Decoder", _wavelet_decoder(decoder))
        return [*parts, StageModules("output", "Output", title, (decoder.head,))]
    if isinstance(decoder, VectorDecoder):
        parts = _numbered("decoder", "Decoder", _vector_decoder(decoder), {2: SMALLEST_SIDE})
        return [*parts, StageModules("output", "Output", "The last layer: gray.", (decoder.head,))]
    if isinstance(decoder, SdDecoder):
        first = getattr(autoencoder, "post_quant_conv", None)
        parts = _numbered("decoder", "Decoder", _sd_decoder(decoder, first))
        return [*parts, StageModules("output", "Output", title, (decoder.conv_norm_out, decoder.conv_out))]
    return (
        [StageModules("output", "Output", "The whole decoder.", (decoder,))] if isinstance(decoder, nn.Module) else []
    )


Inside = Iterable[tuple[str, Any]]
"""What a stage does, in words, and its modules, one or several."""


def _numbered(name: str, title: str, inside: Inside, sides: dict[int, int] | None = None) -> list[StageModules]:
    """`encoder-1`, `encoder-2` and so on. `sides`: number -> side of the feature maps of a flat output."""
    return [
        StageModules(
            f"{name}-{number}", f"{title} {number}", what, modules if isinstance(modules, tuple) else (modules,),
            (sides or {}).get(number),
        )
        for number, (what, modules) in enumerate(inside, start=1)
    ]  # fmt: skip


def _moments(autoencoder: Autoencoder, *modules: Any) -> StageModules:
    title, what = ("Latent", LATENT) if autoencoder.deterministic else ("Moments", MOMENTS)
    return StageModules("moments", title, what, tuple(module for module in modules if module is not None))


def _blocks(stage: Stage, before: str) -> str:
    count = len(stage.blocks)
    blocks = {0: "", 1: " and a residual block"}.get(count, f" and {count} residual blocks")
    text = f"{before}a convolution{blocks}."
    return text[0].upper() + text[1:]


def _wavelet_encoder(encoder: Encoder) -> Iterator[tuple[str, Any]]:
    for number, stage in enumerate(encoder.stages):
        before = (
            f"A Haar transform to 1/{2**encoder.haar_levels} of the side, then "
            if number == 0
            else "Half the side, then "
        )
        if number == 0 and encoder.analysis is not None:
            linear = f"The linear code of {BLOCK} x {BLOCK} blocks, which the latent starts from. Beside it: "
            yield linear + _blocks(stage, before), (encoder.analysis, stage)  # type: ignore[arg-type]
        else:
            yield _blocks(stage, before), stage  # type: ignore[arg-type]


def _wavelet_decoder(decoder: Decoder) -> Iterator[tuple[str, Any]]:
    for number, stage in enumerate(decoder.stages):
        what = _blocks(stage, "Twice the side, then " if number else "")  # type: ignore[arg-type]
        if number == 0 and decoder.synthesis is not None:
            linear = f"The linear code of {BLOCK} x {BLOCK} blocks draws what the image starts from. Beside it: "
            yield linear + what, (decoder.synthesis, stage)
        else:
            yield what, stage
    yield "A convolution at full size.", decoder.tail


def _vector_encoder(encoder: VectorEncoder) -> Iterator[tuple[str, Any]]:
    for layer in encoder.convolutions:
        yield "A convolution to half the side.", layer
    yield "A linear layer over all positions.", encoder.hidden


def _vector_decoder(decoder: VectorDecoder) -> Iterator[tuple[str, Any]]:
    yield "A linear layer.", decoder.first
    yield f"A linear layer to feature maps of {SMALLEST_SIDE} x {SMALLEST_SIDE}.", decoder.second
    for layer in decoder.convolutions:
        yield "Twice the side, then a convolution.", layer


def _sd_encoder(encoder: Any) -> Iterator[tuple[str, Any]]:
    first, *others = encoder.down_blocks
    yield _resnets("A convolution and", first, "half"), (encoder.conv_in, first)
    for block in others:
        yield _resnets("", block, "half"), block
    yield "The middle: residual blocks with attention between.", encoder.mid_block


def _sd_decoder(decoder: Any, first: Any) -> Iterator[tuple[str, Any]]:
    before = (decoder.conv_in,) if first is None else (first, decoder.conv_in)
    yield "A convolution, then the middle: residual blocks with attention between.", (*before, decoder.mid_block)
    for block in decoder.up_blocks:
        yield _resnets("", block, "twice"), block


def _resnets(before: str, block: Any, change: str) -> str:
    samplers = getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None)
    text = f"{before} {len(block.resnets)} residual blocks".strip()
    return f"{text}, then {change} the side." if samplers else f"{text}."
