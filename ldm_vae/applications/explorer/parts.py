"""Which modules of an autoencoder make a stage of the way through it, by architecture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ldm_vae import compat

compat.repair_torchvision()

from diffusers.models.autoencoders.vae import Decoder as SdDecoder
from diffusers.models.autoencoders.vae import Encoder as SdEncoder
from torch import Tensor, nn

from ldm_vae.autoencoder.frozen import AutoencoderFrozenEncoder
from ldm_vae.autoencoder.interface import is_deterministic
from ldm_vae.autoencoder.linear_path import BLOCK
from ldm_vae.autoencoder.vector import SMALLEST_SIDE, VectorDecoder, VectorEncoder
from ldm_vae.autoencoder.wavelet import Decoder, Encoder, Stage

MOMENTS = "Mean and log-variance of the posterior, one channel after the other."
LATENT = "The last layer of the encoder: the latent."


@dataclass(frozen=True, eq=False)
class Part:
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


def encoder_parts(autoencoder: Any) -> list[Part]:
    """From the image to the moments."""
    if isinstance(autoencoder, AutoencoderFrozenEncoder):
        learnt = [] if autoencoder.residual is None else [("A small learnt encoder beside it.", autoencoder.residual)]
        return _numbered("encoder", "Encoder", [("A frozen vision transformer.", autoencoder.vision), *learnt])
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


def decoder_parts(autoencoder: Any) -> list[Part]:
    """From the latent to the image."""
    decoder = getattr(autoencoder, "decoder", None)
    title = "The last layer: red, green and blue."
    if isinstance(decoder, Decoder):
        parts = _numbered("decoder", "Decoder", _wavelet_decoder(decoder))
        return [*parts, Part("output", "Output", title, (decoder.head,))]
    if isinstance(decoder, VectorDecoder):
        parts = _numbered("decoder", "Decoder", _vector_decoder(decoder), {2: SMALLEST_SIDE})
        return [*parts, Part("output", "Output", "The last layer: grey.", (decoder.head,))]
    if isinstance(decoder, SdDecoder):
        first = getattr(autoencoder, "post_quant_conv", None)
        parts = _numbered("decoder", "Decoder", _sd_decoder(decoder, first))
        return [*parts, Part("output", "Output", title, (decoder.conv_norm_out, decoder.conv_out))]
    return [Part("output", "Output", "The whole decoder.", (decoder,))] if isinstance(decoder, nn.Module) else []


Inside = Iterable[tuple[str, Any]]
"""What a stage does, in words, and its modules, one or several."""


def _numbered(name: str, title: str, inside: Inside, sides: dict[int, int] | None = None) -> list[Part]:
    """`encoder-1`, `encoder-2` and so on. `sides`: number -> side of the feature maps of a flat output."""
    return [
        Part(
            f"{name}-{number}", f"{title} {number}", what, modules if isinstance(modules, tuple) else (modules,),
            (sides or {}).get(number),
        )
        for number, (what, modules) in enumerate(inside, start=1)
    ]  # fmt: skip


def _moments(autoencoder: Any, *modules: Any) -> Part:
    title, what = ("Latent", LATENT) if is_deterministic(autoencoder) else ("Moments", MOMENTS)
    return Part("moments", title, what, tuple(module for module in modules if module is not None))


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
