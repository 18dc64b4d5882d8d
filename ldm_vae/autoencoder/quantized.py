"""`AutoencoderQuantized`: the wavelet autoencoder with a discrete latent, by a codebook (VQ) or by rounding (FSQ).

The search in the codebook, its averaging and the rounding are vector-quantize-pytorch's; the gradient estimator and
the two losses are applied here, so that they are the same in training and in inference. Sources: VQ-VAE
(arXiv:1711.00937), the rotation trick (arXiv:2410.06424), FSQ (arXiv:2309.15505). How codes are used is measured here
too. The network's layers are in wavelet.py; the weights of the losses belong to the training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae import runtime

runtime.repair_torchvision()

from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution

from ldm_vae.autoencoder.base import (
    Autoencoder,
    AutoencoderSettings,
    Decoded,
    called_like_forward,
    deterministic_posterior,
    weights_at_hand,
)
from ldm_vae.autoencoder.wavelet import Decoder, Encoder
from ldm_vae.errors import UserError

MAXIMUM_CODES = 2**20

SEARCHED_POSITIONS = 4096
"""Positions that are compared with the codebook at once; bounds the memory of the distances."""

INITIAL_CODE_STD = 0.1
"""Initial deviation of a codebook learned by gradient. Latents begin at 0.02 to 0.04 and grow to about 0.1 within 150
steps; on the synthetic images 0.1 left 45 % of 1024 codes unused after these, the library's 0.02 left 80 %."""

FSQ_INITIAL_GAIN = 20.0
"""On the first latents of FSQ, which would all be rounded to zero. After 150 steps on the synthetic images the squared
error was the same with and without (22.9 dB), the perplexity of the codes 112 against 53."""

EMA_DECAY = 0.99
DEAD_CODE_COUNT = 0.1
"""A moving-average code that wins fewer positions a forward pass than this is replaced by a latent of the batch."""


class Quantized(NamedTuple):
    """`latents` (n, c, h, w), quantized, with the estimated gradient to the latents before. `losses`: scalar means per
    element, each to be weighted and added by the training. `indices` (n, h, w), int64, in [0, codebook_size)."""

    latents: Tensor
    losses: dict[str, Tensor]
    indices: Tensor


class AutoencoderQuantized(Autoencoder):
    """An autoencoder with 8x downsampling whose decoder sees one of `codebook_size` vectors at every position.

    `encode` gives the latents before quantization, as diffusers' `VQModel` does, and `decode` quantizes first.

    Args:
        kind: "vq", nearest vector of a learned codebook; "fsq", each channel rounded to a few levels.
        latent_channels: channels c of the latent; for "fsq" the number of levels.
        encoder_channels, encoder_blocks, decoder_channels, decoder_blocks: as in `AutoencoderWavelet`.
        codebook_size: number of codes, "vq" only.
        codebook: "vq" only. "rotation": learned by gradient, and the decoder's gradient reaches the encoder through the
            rotation that takes latent to code: a micro-batch or a process more changes nothing. "ema": a moving
            average of the latents that chose the code, straight-through gradient, unused codes replaced; every
            training-mode `quantize` of a micro-batch moves it, in one step for all processes.
        fsq_levels: levels of each channel, "fsq" only.
        scaling_factor: 1; diffusers pipelines read it.
    """

    _supports_gradient_checkpointing = True
    deterministic = True
    downsampling = 8
    has_codes = True
    loss_weights: Mapping[str, float] = MappingProxyType({"codebook": 1.0, "commitment": 0.25})
    """van den Oord et al., arXiv:1711.00937, eq. 3."""

    @register_to_config
    def __init__(
        self,
        kind: Literal["vq", "fsq"] = "vq",
        latent_channels: int = 4,
        encoder_channels: tuple[int, ...] = (64, 128),
        encoder_blocks: tuple[int, ...] = (2, 2),
        decoder_channels: tuple[int, ...] = (160, 80, 32, 16),
        decoder_blocks: tuple[int, ...] = (3, 3, 1, 0),
        codebook_size: int = 1024,
        codebook: Literal["rotation", "ema"] = "rotation",
        fsq_levels: tuple[int, ...] = (8, 5, 5, 5),
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        haar_levels = 4 - len(encoder_channels)  # the encoder's stages end at h/8
        if not 1 <= haar_levels <= 2 or len(decoder_channels) != 4:
            raise ValueError("AutoencoderQuantized: needs 2 or 3 encoder stages and 4 decoder stages")
        self.encoder = Encoder(encoder_channels, encoder_blocks, haar_levels, latent_channels, deterministic=True)
        self.quantizer: Any = (
            make_codebook(latent_channels, codebook_size, codebook)
            if kind == "vq"
            else make_rounding(latent_channels, fsq_levels)
        )
        self.decoder = Decoder(decoder_channels, decoder_blocks, latent_channels)
        if kind == "fsq":
            with torch.no_grad():
                self.encoder.head.weight.mul_(FSQ_INITIAL_GAIN)

    @classmethod
    def from_settings(cls, settings: AutoencoderSettings, sizes: Mapping[str, Any], logvar_floor: float) -> Autoencoder:
        """Kind vq or fsq."""
        return cls(
            kind=settings.kind,  # type: ignore[arg-type]
            latent_channels=settings.latent_channels,
            codebook_size=settings.codebook_size or 1024,
            codebook=settings.codebook or "rotation",
            fsq_levels=settings.levels,
            **sizes,
        )

    @classmethod
    def check_settings(cls, settings: AutoencoderSettings) -> None:
        """Raises: UserError for a codebook or levels that cannot be."""
        size, levels = settings.codebook_size, settings.levels
        if size is not None and not 2 <= size <= MAXIMUM_CODES:
            raise UserError(f"autoencoder.codebook_size: {size} is not between 2 and {MAXIMUM_CODES}; try 1024")
        if settings.kind == "fsq" and len(levels) != settings.latent_channels:
            raise UserError(
                f"autoencoder.fsq_levels: has {len(levels)} entries for {settings.latent_channels} latent channels; "
                f"give one level a channel, or set autoencoder.latent_channels={len(levels)}"
            )
        if settings.kind == "fsq" and (min(levels) < 3 or math.prod(levels) > MAXIMUM_CODES):
            raise UserError(
                f"autoencoder.fsq_levels: {list(levels)} is not from 3 on with a product up to {MAXIMUM_CODES}; "
                "try 8, 5, 5, 5"
            )

    @property
    def kind(self) -> str:
        """vq or fsq."""
        return str(self.config.kind)

    @property
    def decoder_context(self) -> int:
        """Latent positions around its own that a pixel depends on."""
        return self.decoder.context

    @property
    def codebook_size(self) -> int:
        """Number of different codes."""
        return int(self.quantizer.codebook_size)

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Images (n, 3, h, w) in [-1, 1] -> latents before quantization (n, c, h/8, w/8), as a narrow posterior."""
        return deterministic_posterior(self.encoder(x))

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents (n, c, h, w) -> quantized latents, losses and indices, all computed in float32, outside autocast.

        Losses of a codebook that is learned by gradient: `codebook` moves the codes, `commitment` the encoder (equation
        3 of arXiv:1711.00937, with weights 1 and 0.25 there); of "ema": `commitment`; of FSQ: none.

        In training mode this moves an averaged codebook ("ema"): call it once for every micro-batch.
        """
        return self._quantize(latents, update=self.training and self.config.codebook == "ema")

    @called_like_forward
    def _quantize(self, latents: Tensor, update: bool) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            if self.config.kind == "fsq":
                codes, indices = self.quantizer(latents)  # rounding, straight-through
                return Quantized(codes, {}, indices.long())
            by_gradient = self.config.codebook == "rotation"
            # before the search, which moves an averaged codebook
            codebook = self._codebook() if by_gradient else self._codebook().clone()
            indices = self._search(latents, update)
            codes = F.embedding(indices, codebook.float()).permute(0, 3, 1, 2)
            losses = {"commitment": F.mse_loss(latents, codes.detach())}
            if by_gradient:
                losses["codebook"] = F.mse_loss(codes, latents.detach())
            return Quantized(pass_gradient(latents, codes.detach(), rotate=by_gradient), losses, indices)

    def _codebook(self) -> Tensor:
        """The codes (codebook_size, c), also of a model whose weights are offloaded."""
        with weights_at_hand(self.quantizer._codebook):
            return self.quantizer.codebook

    @torch.no_grad()
    def _search(self, latents: Tensor, update: bool) -> Tensor:
        """Indices (n, h, w) of the nearest codes of (n, c, h, w); `update` moves an averaged codebook."""
        count, channels, height, width = latents.shape
        positions = latents.permute(0, 2, 3, 1).reshape(-1, channels)
        parts = [positions] if update else positions.split(SEARCHED_POSITIONS)
        found = [self.quantizer(part[None], freeze_codebook=not update)[1][0] for part in parts]
        return torch.cat(found).reshape(count, height, width)

    def decode_indices(self, indices: Tensor, return_dict: bool = True) -> DecoderOutput | tuple:
        """Codes (n, h, w), integers in [0, codebook_size) -> images (n, 3, 8h, 8w), about [-1, 1], not clamped."""
        if indices.dtype.is_floating_point or indices.ndim != 3:
            raise ValueError(
                f"decode_indices: {indices.dtype} of shape {tuple(indices.shape)}; give integers (n, h, w)"
            )
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codebook_size:
            raise ValueError(f"decode_indices: the codes are not all from 0 to {self.codebook_size - 1}")
        return self.decode(self.codes(indices), force_not_quantize=True, return_dict=return_dict)

    @called_like_forward
    def codes(self, indices: Tensor) -> Tensor:
        """Codes (n, h, w) -> quantized latents (n, c, h, w), float32."""
        if self.config.kind == "fsq":
            with weights_at_hand(self.quantizer):
                return self.quantizer.indices_to_codes(indices).float()
        return F.embedding(indices, self._codebook().float()).permute(0, 3, 1, 2)

    @called_like_forward
    def decode(self, z: Tensor, return_dict: bool = True, force_not_quantize: bool = False) -> DecoderOutput | tuple:
        """Latents (n, c, h, w) -> images (n, 3, 8h, 8w), about [-1, 1], not clamped. Changes no codebook.

        Quantizes first, unless `force_not_quantize`: give that with latents that are quantized already, since FSQ
        bounds what it rounds, so that rounding twice is not rounding once.
        """
        if not force_not_quantize:
            z = self._quantize(z, update=False).latents
        image = self.decoder(z.to(self.dtype))
        return DecoderOutput(sample=image) if return_dict else (image,)

    def quantized(self, latents: Tensor) -> Tensor:
        """The nearest codes; changes no codebook."""
        return self._quantize(latents, update=False).latents

    def decode_with_losses(self, latents: Tensor) -> Decoded:
        """`quantize`, then decode: once for every micro-batch."""
        latents, losses, indices = self.quantize(latents)
        return Decoded(self.decode(latents, force_not_quantize=True).sample, dict(losses), indices)

    @torch.no_grad()
    def token_indices(self, images: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [-1, 1], any size -> codes (n, ⌈h/8⌉, ⌈w/8⌉), int64."""
        return self._quantize(self.encode_moments(images)[0], update=False).indices


def pass_gradient(latents: Tensor, codes: Tensor, rotate: bool) -> Tensor:
    """The values of `codes` with an estimate of the gradient to `latents`; both (n, c, h, w).

    `rotate`: through the rotation and rescaling that takes each latent to its code, held constant (equations 1 and 4 of
    arXiv:2410.06424). Otherwise straight through, as if the code were the latent.
    """
    if not (torch.is_grad_enabled() and latents.requires_grad):
        return codes
    moved = latents
    if rotate:
        fixed = latents.detach()
        length = fixed.norm(dim=1, keepdim=True).clamp(min=1e-6)
        source, target = F.normalize(fixed, dim=1, eps=1e-6), F.normalize(codes, dim=1, eps=1e-6)
        mirror = F.normalize(source + target, dim=1, eps=1e-6)
        moved = latents - 2 * mirror * (mirror * latents).sum(dim=1, keepdim=True)
        moved = moved + 2 * target * (source * latents).sum(dim=1, keepdim=True)
        moved = moved * codes.norm(dim=1, keepdim=True) / length
    return moved + (codes - moved).detach()


def make_codebook(channels: int, size: int, kind: str) -> nn.Module:
    """A `VectorQuantize` that searches, and for "ema" averages. Gradients and losses are not its business here."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    how: dict[str, Any] = {"learnable_codebook": True, "ema_update": False}
    if kind == "ema":
        how = {"decay": EMA_DECAY, "threshold_ema_dead_code": DEAD_CODE_COUNT}
    quantizer = _library().VectorQuantize(
        dim=channels,
        codebook_size=size,
        rotation_trick=False,
        commitment_weight=0.0,
        sync_codebook=together and torch.distributed.get_world_size() > 1,
        **how,
    )
    if kind == "rotation":
        nn.init.normal_(quantizer._codebook.embed, std=INITIAL_CODE_STD)
    else:  # at the limit: what the first batch does not choose is replaced by latents of that batch
        quantizer._codebook.cluster_size.fill_(DEAD_CODE_COUNT)
        quantizer._codebook.embed_avg.mul_(DEAD_CODE_COUNT)
    return quantizer


def make_rounding(channels: int, levels: Sequence[int]) -> nn.Module:
    """An `FSQ` without projections: one channel for each entry of `levels`."""
    if channels != len(levels):
        raise ValueError(f"AutoencoderQuantized: {channels} latent channels, {len(levels)} FSQ levels; they must agree")
    return _library().FSQ(levels=list(levels))


def _library() -> Any:
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise UserError(
            'autoencoder.kind: vq and fsq need vector-quantize-pytorch; run pip install "ldm_vae[tokenizers]"'
        ) from error
    return vector_quantize_pytorch
