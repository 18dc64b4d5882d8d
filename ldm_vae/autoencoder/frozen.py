"""`AutoencoderFrozenEncoder`: latents are the features of a frozen vision transformer, and only a decoder is learned.

A representation autoencoder (RAE, arXiv:2510.11690) with a convolutional decoder; with `residual_channels` a small
learned encoder adds what the features lack (SVG, arXiv:2510.15301). The transformer is one of `transformers`',
kept completely inside the saved model, so loading it fetches nothing. This file owns the network and the
statistics of its features; fitting them before training, and all losses, belong to the training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from ldm_vae import runtime

runtime.repair_torchvision()

from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ldm_vae.autoencoder.base import Autoencoder, AutoencoderSettings, deterministic_posterior
from ldm_vae.autoencoder.wavelet import Decoder, Encoder
from ldm_vae.autoencoder.weights import check_complete, check_finite
from ldm_vae.errors import UserError
from ldm_vae.files import check_model_folder

DOWNSAMPLING = 16
RESIDUAL_BOUND = 3.0
"""Residual channels are softly bounded to this: three standard deviations of the features beside them."""

SUPPORTED = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Supported values of `model_type`: transformers that accept any size and put class and register tokens first."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BOOKKEEPING = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


class AutoencoderFrozenEncoder(Autoencoder):
    """A deterministic autoencoder with 16x downsampling around a frozen vision transformer.

    Latent channels: the transformer's features, standardized per channel by fixed statistics (`fit_statistics`), then
    `residual_channels` learned ones in [-3, 3], which have no statistics because training changes them.

    Args:
        vision_config: the transformer's configuration as a plain dictionary with `model_type`, one of `SUPPORTED`.
        residual_channels: 0, or the channels that the learned residual encoder adds.
        encoder_channels, encoder_blocks: width and residual blocks of that encoder at h/4, h/8 and h/16, or from h/2.
        decoder_channels, decoder_blocks: the same for the decoder at h/16, h/8, h/4, h/2 and h.
        latent_channels: the sum of both parts by default; saved models record it.
        scaling_factor: 1; diffusers pipelines read it.
    """

    _supports_gradient_checkpointing = True
    kind = "frozen"
    deterministic = True
    downsampling = DOWNSAMPLING
    needs_statistics = True

    @register_to_config
    def __init__(
        self,
        vision_config: dict[str, Any],
        residual_channels: int = 0,
        encoder_channels: tuple[int, ...] = (64, 128, 128),
        encoder_blocks: tuple[int, ...] = (2, 2, 2),
        decoder_channels: tuple[int, ...] = (320, 160, 80, 32, 16),
        decoder_blocks: tuple[int, ...] = (3, 3, 3, 1, 0),
        latent_channels: int | None = None,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        haar_levels = 5 - len(encoder_channels)  # the encoder's stages end at h/16
        if not 1 <= haar_levels <= 2 or len(decoder_channels) != 5:
            raise ValueError("AutoencoderFrozenEncoder: needs 3 or 4 encoder stages and 5 decoder stages")
        self.vision: Any = _untrained_vision(vision_config).requires_grad_(False).eval()
        features = int(self.vision.config.hidden_size)
        if latent_channels not in (None, features + residual_channels):
            raise ValueError(f"AutoencoderFrozenEncoder: {latent_channels} is not {features} + {residual_channels}")
        self.register_to_config(latent_channels=features + residual_channels)
        self.patch = int(self.vision.config.patch_size)
        self.prefix_tokens = 1 + int(getattr(self.vision.config, "num_register_tokens", 0))
        self.residual = (
            Encoder(encoder_channels, encoder_blocks, haar_levels, residual_channels, deterministic=True)
            if residual_channels
            else None
        )
        self.decoder = Decoder(decoder_channels, decoder_blocks, features + residual_channels)
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        self.register_buffer("statistics_positions", torch.zeros((), dtype=torch.int64))
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD).reshape(3, 1, 1), persistent=False)

    @classmethod
    def from_settings(cls, settings: AutoencoderSettings, sizes: Mapping[str, Any], logvar_floor: float) -> Autoencoder:
        """The preset's layers and a stage at h/16: as wide in the residual encoder, twice as wide in the decoder."""
        encoder, decoder = sizes["encoder_channels"], sizes["decoder_channels"]
        return cls.from_encoder(
            str(settings.encoder),
            residual_channels=settings.residual_channels,
            encoder_channels=(*encoder, encoder[-1]),
            encoder_blocks=(*sizes["encoder_blocks"], sizes["encoder_blocks"][-1]),
            decoder_channels=(2 * decoder[0], *decoder),
            decoder_blocks=(sizes["decoder_blocks"][0], *sizes["decoder_blocks"]),
        )

    @classmethod
    def check_settings(cls, settings: AutoencoderSettings) -> None:
        """Raises: UserError without an encoder, and for unsupported channel counts."""
        if not settings.encoder:
            raise UserError(
                "autoencoder.encoder: kind=frozen needs one; give the directory or hub id of a DINOv2 or DINOv3 "
                "vision transformer, such as facebook/dinov2-with-registers-small"
            )
        if not 0 <= settings.residual_channels <= 256:
            raise UserError(f"autoencoder.residual_channels: {settings.residual_channels} is not between 0 and 256")
        if settings.latent_channels != type(settings).latent_channels:
            raise UserError(
                "autoencoder.latent_channels: has no effect with autoencoder.kind=frozen, where the encoder sets it; "
                "remove it, or set autoencoder.residual_channels"
            )

    @classmethod
    def from_encoder(cls, encoder: str, **settings: Any) -> AutoencoderFrozenEncoder:
        """A new autoencoder around a pretrained transformer: a local directory or hub id with safetensors weights.

        Raises:
            UserError: naming `encoder`, if it does not exist, is not supported, or has no safetensors weights.
        """
        vision = _pretrained_vision(encoder)
        model = cls(vision_config=plain_config(vision.config), **settings)
        model.vision.load_state_dict(vision.state_dict())
        return model

    def train(self, mode: bool = True) -> AutoencoderFrozenEncoder:
        """Training mode for everything but the transformer, which stays in inference mode."""
        super().train(mode)
        self.vision.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> AutoencoderFrozenEncoder:
        """Set `requires_grad` for everything but the transformer, which stays frozen."""
        super().requires_grad_(requires_grad)
        self.vision.requires_grad_(False)
        return self

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [-1, 1], h and w multiples of 16 -> features (n, d, h/16, w/16), as the transformer
        gives them after its last normalization, without class and register tokens."""
        height, width = x.shape[-2] // DOWNSAMPLING, x.shape[-1] // DOWNSAMPLING
        if x.shape[-2] % DOWNSAMPLING or x.shape[-1] % DOWNSAMPLING or not height or not width:
            raise ValueError(
                f"AutoencoderFrozenEncoder: {tuple(x.shape[-2:])} pixels; give multiples of {DOWNSAMPLING}"
            )
        if self.patch != DOWNSAMPLING:
            size = (height * self.patch, width * self.patch)
            x = F.interpolate(x.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
        x = ((0.5 * x + 0.5 - self.image_mean) / self.image_std).to(self.dtype)
        tokens = self.vision(pixel_values=x.contiguous()).last_hidden_state[:, self.prefix_tokens :]
        return tokens.transpose(1, 2).reshape(len(x), -1, height, width)

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set the mean and standard deviation of each feature channel from image batches (n, 3, h, w) in [-1, 1].

        Once, before training, and before the weights are copied (for averaging, or to other processes). Sums are
        float64; the standard deviation is of the population, at least 1e-6.

        Raises:
            ValueError: no image was given.
        """
        count = 0
        total = square = torch.zeros(len(self.feature_mean), dtype=torch.float64)
        for images in batches:
            images = images.to(self.device)
            with torch.autocast(self.device.type, enabled=False):
                values = self.features(images).transpose(0, 1).flatten(1).to("cpu", torch.float64)
            count += values.shape[1]
            total, square = total + values.sum(dim=1), square + values.square().sum(dim=1)
        if count == 0:
            raise ValueError("fit_statistics: no images; give at least one batch")
        mean = total / count
        self.feature_mean.copy_(mean)
        self.feature_std.copy_((square / count - mean.square()).clamp(min=1e-12).sqrt())
        self.statistics_positions.fill_(count)

    @property
    def decoder_context(self) -> int:
        """Number of latent positions on each side of its own that a pixel depends on."""
        return self.decoder.context

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Images (n, 3, h, w) in [-1, 1] -> latents (n, c, h/16, w/16), as a narrow posterior.

        No gradient reaches the features; one reaches the residual encoder.
        """
        shape = (1, -1, 1, 1)
        latents = (self.features(x) - self.feature_mean.view(shape)) / self.feature_std.view(shape)
        if self.residual is not None:
            residual = RESIDUAL_BOUND * torch.tanh(self.residual(x) / RESIDUAL_BOUND)
            latents = torch.cat([latents, residual.to(latents.dtype)], dim=1)
        return deterministic_posterior(latents)


def plain_config(config: Any) -> dict[str, Any]:
    """A `transformers` configuration as JSON-able settings, without bookkeeping and general defaults."""
    common = _transformers().PretrainedConfig().to_dict()
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _BOOKKEEPING and (name not in common or common[name] != value)
    }
    return settings | {"model_type": config.model_type}


def _untrained_vision(settings: dict[str, Any]) -> Any:
    transformers = _transformers()
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    _check_model_type(model_type, "vision_config")
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **settings))


def _pretrained_vision(encoder: str) -> Any:
    transformers = _transformers()
    looks_local = encoder.count("/") != 1 or encoder.startswith((".", "~", "/"))
    if looks_local and not Path(encoder).is_dir():
        raise UserError(f"autoencoder.encoder: {encoder}: no such folder; give one, or a hub id like OWNER/NAME")
    try:
        check_model_folder(Path(encoder))
        _check_model_type(transformers.AutoConfig.from_pretrained(encoder).model_type, encoder)
        vision, loading = transformers.AutoModel.from_pretrained(
            encoder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        # a checkpoint of a classifier has the head as well
        check_complete(loading, f"autoencoder.encoder: {encoder}: as {type(vision).__name__}", unexpected=False)
        check_finite(vision.state_dict(), f"autoencoder.encoder: {encoder}")
        return vision
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"autoencoder.encoder: {encoder}: cannot be loaded ({reason}); give a directory that holds config.json and "
            "model.safetensors, or a hub id that you may read"
        ) from error


def _check_model_type(model_type: Any, where: str) -> None:
    if model_type not in SUPPORTED:
        raise UserError(f"{where}: model type {model_type!r} is not supported; use one of {', '.join(SUPPORTED)}")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError('autoencoder.kind: frozen needs transformers; run pip install "ldm_vae[tokenizers]"') from error
    return transformers
