"""`AutoencoderVector`: one short vector for a whole small gray image, as two numbers for a digit.

The latent has one position, so that with two channels the latent space is a plane one can look at. The network knows
one image size, S = 4 * 2 ** stages (32 with three), and gray only: it takes the mean of red, green and blue and
repeats what it decodes. It is plain on purpose, since a decoder in a web page runs from the same file of weights.

The decoder, in order, with the names of its tensors (`weight` and `bias` each) in
`diffusion_pytorch_model.safetensors`, c latent channels, widths w0 ... w3 = 48, 32, 24, 16 of the preset `digits`,
hidden size 64:

    decoder.first             linear c -> 64                       weight (64, c)           then silu
    decoder.second            linear 64 -> w0 * 4 * 4              weight (w0 * 16, 64)     then silu
                              reshaped to (w0, 4, 4): output channel * 16 + row * 4 + column
    decoder.convolutions.0    nearest-neighbor x2, 3x3 w0 -> w1   weight (w1, w0, 3, 3)    then silu; 8x8
    decoder.convolutions.1    nearest-neighbor x2, 3x3 w1 -> w2   weight (w2, w1, 3, 3)    then silu; 16x16
    decoder.convolutions.2    nearest-neighbor x2, 3x3 w2 -> w3   weight (w3, w2, 3, 3)    then silu; 32x32
    decoder.head              3x3 w3 -> 1                          weight (1, w3, 3, 3)     clamped to [-1, 1]

Convolutions are torch's: a correlation, weights (outputs, inputs, row, column), one pixel of zeros around.

This file owns the network only. It is a diffusers model: `encode(x).latent_dist`, `decode(z).sample`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae import runtime

runtime.repair_torchvision()

from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ldm_vae.autoencoder.base import Autoencoder, AutoencoderSettings, deterministic_posterior
from ldm_vae.autoencoder.wavelet import INITIAL_LOGVAR, LOGVAR_CEILING, soft_clamp
from ldm_vae.errors import UserError

VECTOR_PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"encoder_channels": (16, 32, 64), "decoder_channels": (48, 32, 24, 16), "hidden_channels": 64},
}

SMALLEST_SIDE = 4
"""Side of the feature maps between convolutions and linear layers."""


def initialized(layer: Any, gain: float = 1.4) -> Any:
    """The layer with weights of standard deviation gain / sqrt(fan-in) and zero bias."""
    nn.init.normal_(layer.weight, std=gain / layer.weight[0].numel() ** 0.5)
    nn.init.zeros_(layer.bias)
    return layer


class VectorEncoder(nn.Module):
    """(n, 1, S, S) -> (n, outputs, 1, 1). The vector is made, and read, outside autocast: bfloat16 would round it."""

    def __init__(self, channels: Sequence[int], hidden: int, outputs: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            initialized(nn.Conv2d(before, after, 3, stride=2, padding=1)) for before, after in pairwise((1, *channels))
        )
        self.hidden = initialized(nn.Linear(channels[-1] * SMALLEST_SIDE**2, hidden))
        self.head = initialized(nn.Linear(hidden, outputs), gain=0.3)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.silu(convolution(x))
        with torch.autocast(x.device.type, enabled=False):
            x = x.flatten(1).to(self.head.weight.dtype)
            return self.head(F.silu(self.hidden(x)))[:, :, None, None]


class VectorDecoder(nn.Module):
    """(n, c, 1, 1) -> (n, 1, S, S); layer by layer in the docstring of this file."""

    def __init__(self, channels: Sequence[int], hidden: int, latent_channels: int) -> None:
        super().__init__()
        self.first = initialized(nn.Linear(latent_channels, hidden))
        self.second = initialized(nn.Linear(hidden, channels[0] * SMALLEST_SIDE**2))
        self.convolutions = nn.ModuleList(
            initialized(nn.Conv2d(before, after, 3, padding=1)) for before, after in pairwise(channels)
        )
        self.head = initialized(nn.Conv2d(channels[-1], 1, 3, padding=1), gain=0.5)

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            x = F.silu(self.second(F.silu(self.first(z.flatten(1).to(self.first.weight.dtype)))))
        x = x.unflatten(1, (-1, SMALLEST_SIDE, SMALLEST_SIDE)).contiguous(memory_format=torch.channels_last)
        for convolution in self.convolutions:
            x = F.silu(convolution(F.interpolate(x, scale_factor=2.0, mode="nearest")))
        return self.head(x)


class AutoencoderVector(Autoencoder):
    """An autoencoder of one vector a gray image, KL-regularized or deterministic; of one image size.

    Args:
        latent_channels: numbers c in the vector.
        encoder_channels: width after each halving of the sides, down to 4 x 4.
        decoder_channels: width at 4 x 4 and after each doubling, one entry more than for the encoder.
        hidden_channels: width of the linear layer between convolutions and vector, in both.
        logvar_floor, scaling_factor, deterministic: as in `AutoencoderWavelet`.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 2,
        encoder_channels: tuple[int, ...] = (16, 32, 64),
        decoder_channels: tuple[int, ...] = (48, 32, 24, 16),
        hidden_channels: int = 64,
        logvar_floor: float = -9.0,
        scaling_factor: float = 1.0,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= len(encoder_channels) == len(decoder_channels) - 1 <= 6:
            raise ValueError("AutoencoderVector: needs 1 to 6 encoder stages and one decoder stage more")
        outputs = latent_channels if deterministic else 2 * latent_channels
        self.encoder = VectorEncoder(encoder_channels, hidden_channels, outputs)
        self.decoder = VectorDecoder(decoder_channels, hidden_channels, latent_channels)
        with torch.no_grad():
            self.encoder.head.bias.data[latent_channels:] = INITIAL_LOGVAR

    @classmethod
    def from_settings(cls, settings: AutoencoderSettings, sizes: Mapping[str, Any], logvar_floor: float) -> Autoencoder:
        """Kind kl or ae."""
        plain = settings.kind == "ae"
        return cls(latent_channels=settings.latent_channels, logvar_floor=logvar_floor, deterministic=plain, **sizes)

    @property
    def only_side(self) -> int:
        """S, the side in pixels of the square images that it takes and gives."""
        return int(SMALLEST_SIDE * 2 ** len(self.config.encoder_channels))

    @property
    def downsampling(self) -> int:
        """S: the latent has one position."""
        return self.only_side

    @property
    def deterministic(self) -> bool:
        """Whether there is no log-variance head."""
        return bool(self.config.deterministic)

    @property
    def logvar_bounds(self) -> tuple[float, float]:
        """The soft clamp."""
        return float(self.config.logvar_floor), LOGVAR_CEILING

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Images (n, 3, S, S) in [-1, 1] -> posterior over latents (n, c, 1, 1). Raises: UserError for other sizes."""
        self.check_images(x)
        moments = self.encoder(x.mean(dim=1, keepdim=True))
        if self.config.deterministic:
            return deterministic_posterior(moments)
        mean, logvar = moments.chunk(2, dim=1)
        moments = torch.cat([mean.float(), soft_clamp(logvar, self.config.logvar_floor)], dim=1)
        return DiagonalGaussianDistribution(moments)

    def image(self, z: Tensor) -> Tensor:
        """Latents (n, c, 1, 1) -> images (n, 3, S, S), about [-1, 1], not clamped, the three channels alike.

        Raises:
            UserError: latents of more than one position.
        """
        if tuple(z.shape[-2:]) != (1, 1):
            raise UserError(
                f"AutoencoderVector: latents of {z.shape[-2]} x {z.shape[-1]} positions; a vector has one, so that "
                "latents cannot be scaled, tiled or enlarged; use an autoencoder of architecture wavelet for that"
            )
        return self.decoder(z).expand(-1, 3, -1, -1)
