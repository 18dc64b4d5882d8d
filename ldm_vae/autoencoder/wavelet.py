"""`AutoencoderWavelet`: an f8 autoencoder that does its work at 1/4 and 1/8 of the resolution.

About 90 times fewer multiplications than the Stable Diffusion autoencoder at the same interface:
* a Haar transform replaces the encoder's costly first stages (LiteVAE, arXiv:2405.14477);
* plain residual blocks, no attention and no normalization: nothing is global, so the network is
  translation-equivariant and cannot smuggle a gain through one hot latent pixel;
* a light encoder and a heavier decoder (ViTok, arXiv:2501.09755);
* every upsampling is nearest-neighbor + convolution with replicated borders: a constant latent gives a constant
  image, where pixel-shuffle and wavelet heads leave a grid. With many channels that is too little: `linear_path`.

This file owns the network only, and cutting it down to its first latent channels. It is a diffusers model:
`encode(x).latent_dist`, `decode(z).sample`. The other tokenizers are built from its `Encoder` and `Decoder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ldm_vae import runtime

runtime.repair_torchvision()

from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ldm_vae.autoencoder.base import Autoencoder, AutoencoderSettings, deterministic_posterior
from ldm_vae.autoencoder.fast_layers import only_values
from ldm_vae.autoencoder.klt import BlockKLT, fit_klt
from ldm_vae.errors import UserError

Padding = Literal["zeros", "replicate"]

LOGVAR_CEILING = 2.0
INITIAL_LOGVAR = -2.0

LINEAR_PATH_ROWS = (
    "encoder.analysis.basis.weight",
    "encoder.analysis.basis.bias",
    "encoder.analysis.spread",
    "decoder.synthesis.spread",
)
LINEAR_PATH_COLUMNS = "decoder.synthesis.basis.weight"
"""Tensors with a row, or a column, for each latent channel."""


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

LINEAR_PATH_MARGIN = 3.0
"""So much lower may log-variances fall: a block's brightness takes several times the nats of its finest pattern."""


def convolution(
    inputs: int, outputs: int, *, kernel: int = 3, gain: float = 1.0, padding_mode: Padding = "zeros"
) -> nn.Conv2d:
    """A same-size convolution with weights of standard deviation gain / sqrt(fan-in) and zero bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, padding_mode=padding_mode)
    nn.init.normal_(layer.weight, std=gain / (inputs * kernel * kernel) ** 0.5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def soft_clamp(logvar: Tensor, floor: float) -> Tensor:
    """Into [floor, 2], float32, with a gradient on both sides: a hard clamp leaves dead positions at its limits."""
    logvar = LOGVAR_CEILING - F.softplus(LOGVAR_CEILING - logvar.float())
    return floor + F.softplus(logvar - floor)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), the last convolution starting at a tenth of its size. Shape unchanged."""

    def __init__(self, channels: int, padding_mode: Padding) -> None:
        super().__init__()
        self.first = convolution(channels, channels, gain=1.4, padding_mode=padding_mode)
        self.second = convolution(channels, channels, gain=0.14, padding_mode=padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class Stage(nn.Module):
    """A resampling layer, then residual blocks at one resolution. Gradient checkpointing works per block.

    With `fold`, it also sees a picture (n, 3, fold * h, fold * w), before the blocks.
    """

    def __init__(
        self, resample: nn.Module, channels: int, blocks: int, padding_mode: Padding, fold: int | None = None
    ) -> None:
        super().__init__()
        self.resample = resample
        self.fold = fold
        self.view = convolution(3 * fold**2, channels, kernel=1) if fold else None
        self.blocks = nn.ModuleList(ResidualBlock(channels, padding_mode) for _ in range(blocks))
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None  # diffusers sets both

    def forward(self, x: Tensor, picture: Tensor | None = None) -> Tensor:
        x = self.resample(x)
        if self.view is not None:
            assert picture is not None
            assert self.fold is not None
            x = x + self.view(pixel_unshuffle(picture, self.fold))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return x


class HalvingConvolution(nn.Conv2d):
    """A 1x1 convolution of unshuffled pixels, which also takes the pixels themselves: then it is of stride 2.

    It reads its weight in its own forward pass only: offloading brings the weight there when it is called.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(n, 4c, h/2, w/2), or (n, c, h, w) -> (n, o, h/2, w/2)."""
        if input.shape[1] == self.in_channels:
            return super().forward(input)
        kernel = self.weight.view(len(self.weight), -1, 2, 2).contiguous(memory_format=torch.channels_last)
        return F.conv2d(input, kernel, self.bias, stride=2)


class Halving(nn.Sequential):
    """A pixel-unshuffle by 2 and a 1x1 convolution; without gradients, the 2x2 convolution of stride 2 they are."""

    def __init__(self, inputs: int, outputs: int) -> None:
        layer = convolution(4 * inputs, outputs, kernel=1)
        layer.__class__ = HalvingConvolution
        super().__init__(nn.PixelUnshuffle(2), layer)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, o, h/2, w/2)."""
        return self[1](x) if only_values() else super().forward(x)


class Encoder(nn.Module):
    """(n, 3, h, w) -> (n, 2c, h/f, w/f): mean and raw log-variance; `deterministic`: (n, c, h/f, w/f), the latents.

    f is 2 ** (haar_levels + stages - 1): the first stage works at the resolution that the Haar transform leaves.
    """

    def __init__(
        self,
        channels: Sequence[int],
        blocks: Sequence[int],
        haar_levels: int,
        latent_channels: int,
        deterministic: bool = False,
        linear_path: bool = False,
    ) -> None:
        super().__init__()
        self.haar_levels = haar_levels
        stages: list[nn.Module] = []
        previous = 3 * 4**haar_levels
        for level, (width, count) in enumerate(zip(channels, blocks)):
            if level == 0:
                resample: nn.Module = convolution(previous, width)
            else:
                resample = Halving(previous, width)
            stages.append(Stage(resample, width, count, "zeros"))
            previous = width
        self.stages = nn.ModuleList(stages)
        self.head = convolution(previous, latent_channels if deterministic else 2 * latent_channels, gain=0.3)
        with torch.no_grad():
            self.head.bias.data[latent_channels:] = INITIAL_LOGVAR  # type: ignore[union-attr]
        self.analysis = BlockAnalysis(latent_channels) if linear_path else None
        self.added = Added() if linear_path else None

    def forward(self, x: Tensor) -> Tensor:
        coefficients = self.analysis(x) if self.analysis is not None else None
        if only_values():
            x = haar_bands(x, self.haar_levels)
        else:
            for _ in range(self.haar_levels):
                x = haar_forward(x)
        x = 0.5**self.haar_levels * x  # the low band of an image in [-1, 1] would span [-4, 4] after two levels
        x = x.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x = stage(x)
        found = self.head(F.silu(x))
        return found if self.added is None else self.added(found, coefficients)


class Decoder(nn.Module):
    """(n, c, h/f, w/f) -> (n, 3, h, w). `channels` and `blocks` are for the resolutions h/f, ..., h/2, h.

    With `linear_path` (f = 8) every stage above h/8 also sees what the linear code draws, folded to its resolution, and
    the network's image is added to that.
    """

    def __init__(
        self, channels: Sequence[int], blocks: Sequence[int], latent_channels: int, linear_path: bool = False
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        previous = latent_channels
        for level, (width, count) in enumerate(zip(channels, blocks)):
            if level == 0:
                resample: nn.Module = convolution(previous, width, padding_mode="replicate")
            else:
                resample = nn.Sequential(convolution(previous, width, kernel=1), nn.UpsamplingNearest2d(scale_factor=2))
            fold = BLOCK >> level if linear_path and level > 0 else None
            stages.append(Stage(resample, width, count, "replicate", fold))
            previous = width
        self.stages = nn.ModuleList(stages)
        self.tail = convolution(previous, previous, gain=1.4, padding_mode="replicate")
        self.head = convolution(previous, 3, gain=0.5, padding_mode="replicate")
        self.synthesis = BlockSynthesis(latent_channels) if linear_path else None

    @property
    def context(self) -> int:
        """How many latent positions around its own a pixel depends on.

        All is 3x3 convolutions and nearest-neighbor upsampling, so the inputs of a pixel can be counted.
        """
        blocks = [len(stage.blocks) for stage in self.stages]  # type: ignore[arg-type]
        farthest = 0
        for pixel in range(2 ** (len(blocks) - 1)):  # of one latent position
            low, high = pixel - 2, pixel + 2  # the tail and the head
            for level in reversed(range(len(blocks))):
                low, high = low - 2 * blocks[level], high + 2 * blocks[level]
                if level:
                    low, high = low // 2, high // 2
            farthest = max(farthest, 1 - low, 1 + high)  # 1 of the first convolution
        return farthest

    def forward(self, z: Tensor) -> Tensor:
        x = z.contiguous(memory_format=torch.channels_last)
        picture = self.synthesis(x) if self.synthesis is not None else None
        for stage in self.stages:
            x = stage(x, picture)
        image = self.head(F.silu(self.tail(x)))
        return image if picture is None else image + picture


class AutoencoderWavelet(Autoencoder):
    """An autoencoder with 8x downsampling, KL-regularized or deterministic; any size divisible by 8.

    Args:
        latent_channels: channels c of the latent.
        encoder_channels, encoder_blocks: width and residual blocks at each encoder resolution, down to h/8.
        decoder_channels, decoder_blocks: the same for the decoder at h/8, h/4, h/2 and h.
        logvar_floor: the log-variance is softly clamped to [logvar_floor, 2]; a rate of R nats per latent dimension
            needs a floor of about -2 (R + 1).
        scaling_factor: 1; diffusers pipelines read it. Normalization lives with the latents, not here.
        deterministic: a plain autoencoder: no log-variance head, `latent_dist.logvar` is -30 everywhere.
        linear_path: the network adds to a linear code of 8x8 blocks (`linear_path`), for many channels. Call
            `fit_statistics` before training.
    """

    _supports_gradient_checkpointing = True
    downsampling = 8

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        encoder_channels: tuple[int, ...] = (64, 128),
        encoder_blocks: tuple[int, ...] = (2, 2),
        decoder_channels: tuple[int, ...] = (160, 80, 32, 16),
        decoder_blocks: tuple[int, ...] = (3, 3, 1, 0),
        logvar_floor: float = -7.0,
        scaling_factor: float = 1.0,
        deterministic: bool = False,
        linear_path: bool = False,
    ) -> None:
        super().__init__()
        haar_levels = 4 - len(encoder_channels)  # the encoder's stages end at h/8
        if not 1 <= haar_levels <= 2 or len(decoder_channels) != 4:
            raise ValueError("AutoencoderWavelet: needs 2 or 3 encoder stages and 4 decoder stages")
        self.encoder = Encoder(
            encoder_channels, encoder_blocks, haar_levels, latent_channels, deterministic, linear_path
        )
        self.decoder = Decoder(decoder_channels, decoder_blocks, latent_channels, linear_path)

    @classmethod
    def from_settings(cls, settings: AutoencoderSettings, sizes: Mapping[str, Any], logvar_floor: float) -> Autoencoder:
        """Kind kl or ae."""
        floor = {}
        if settings.kind == "kl":
            floor["logvar_floor"] = logvar_floor - (LINEAR_PATH_MARGIN if settings.linear_path else 0.0)
        return cls(
            latent_channels=settings.latent_channels,
            deterministic=settings.kind == "ae",
            linear_path=settings.linear_path,
            **floor,
            **sizes,
        )

    @classmethod
    def check_settings(cls, settings: AutoencoderSettings) -> None:
        """Raises: UserError where a linear code would have more channels than a block has numbers."""
        if settings.linear_path and settings.latent_channels > PIXELS:
            raise UserError(
                f"autoencoder.latent_channels: {settings.latent_channels} are more than the {PIXELS} numbers of a "
                "block of pixels, which autoencoder.linear_path describes; lower it, or leave linear_path out"
            )

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> None:
        """With `linear_path`: start as the linear code of image batches (n, 3, h, w) in [-1, 1].

        Once, before training, and before the weights are copied (for averaging, or to other processes). Afterwards
        `decode(encode(x).latent_dist.mean)` is the block KLT's reconstruction. The noise of each channel falls with
        its variance (reverse water-filling), at most down to the clamp.

        Raises:
            ValueError: no image was given.
        """
        analysis, synthesis, noise = self.encoder.analysis, self.decoder.synthesis, self.encoder.head.bias
        assert analysis is not None, "linear_path is not set"
        assert synthesis is not None
        assert noise is not None
        variances = set_transform(analysis, synthesis, fit_klt(batches, BLOCK, flat=True))
        channels = self.config.latent_channels
        self.encoder.head.weight[:channels].zero_()
        self.decoder.head.weight.zero_()
        if not self.config.deterministic:
            level = variances.log().mean() + 0.5 * self.config.logvar_floor
            noise[channels:] = (level - variances.log()).clamp_min(self.config.logvar_floor + 1)

    @property
    def deterministic(self) -> bool:
        """Whether there is no log-variance head."""
        return bool(self.config.deterministic)

    @property
    def logvar_bounds(self) -> tuple[float, float]:
        """The soft clamp."""
        return float(self.config.logvar_floor), LOGVAR_CEILING

    @property
    def decoder_context(self) -> int:
        """Latent positions around its own that a pixel depends on."""
        return self.decoder.context

    @property
    def needs_statistics(self) -> bool:
        """Whether the linear code is still to be fitted."""
        return bool(self.config.linear_path)

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Images (n, 3, h, w) in [-1, 1] -> posterior over latents (n, c, h/8, w/8). h and w divisible by 8."""
        if self.config.deterministic:
            return deterministic_posterior(self.encoder(x))
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return DiagonalGaussianDistribution(torch.cat([mean, soft_clamp(logvar, self.config.logvar_floor)], dim=1))

    @torch.no_grad()
    def narrow(self, channels: int) -> AutoencoderWavelet:
        """The smaller autoencoder that keeps the first `channels` latent channels and every other weight.

        Exact: its posterior is the first channels of the full one's, and it decodes as the full one decodes the same
        latents followed by zeros. Useful after training with nested channels (DC-AE 1.5, arXiv:2508.00413).

        Raises:
            UserError: not between 1 and the latent channels.
        """
        settings = {name: value for name, value in self.config.items() if not name.startswith("_")}
        present, deterministic = settings["latent_channels"], settings["deterministic"]
        if not 1 <= channels <= present:
            raise UserError(f"channels: {channels} is not between 1 and the {present} channels of this autoencoder")
        narrow = AutoencoderWavelet(**settings | {"latent_channels": channels})
        rows = list(range(channels))
        if not deterministic:
            rows += range(present, present + channels)  # the log-variances follow the means
        tensors = dict(self.state_dict())
        for name in ("encoder.head.weight", "encoder.head.bias"):
            tensors[name] = tensors[name][rows]
        if self.config.linear_path:
            for name in LINEAR_PATH_ROWS:
                tensors[name] = tensors[name][:channels]
            tensors[LINEAR_PATH_COLUMNS] = tensors[LINEAR_PATH_COLUMNS][:, :channels]
        first = "decoder.stages.0.resample.weight"
        tensors[first] = tensors[first][:, :channels]
        narrow.load_state_dict(tensors)
        narrow.requires_grad_(any(parameter.requires_grad for parameter in self.parameters()))
        narrow = narrow.to(self.device, self.dtype).to(memory_format=torch.channels_last)
        return narrow.train(self.training)


# The orthonormal two-dimensional Haar transform: half the size, four times the channels, the same energy.


def haar_forward(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, 4c, h/2, w/2), bands [low, horizontal, vertical, diagonal], each of c channels.

    Orthonormal: the sum of squares is unchanged. `h` and `w` must be even.
    """
    top_left, top_right = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
    bottom_left, bottom_right = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
    top_sum, top_difference = top_left + top_right, top_left - top_right
    bottom_sum, bottom_difference = bottom_left + bottom_right, bottom_left - bottom_right
    return 0.5 * torch.cat(
        [
            top_sum + bottom_sum,
            top_difference + bottom_difference,
            top_sum - bottom_sum,
            top_difference - bottom_difference,
        ],
        dim=1,
    )


def haar_bands(x: Tensor, levels: int) -> Tensor:
    """`haar_forward` that many times, as one product with a matrix: (n, c, h, w) -> (n, 4^l c, h/2^l, w/2^l).

    The result is channels_last and in the precision of `x`, which each number is rounded to once.
    """
    count, channels, height, width = x.shape
    side = 2**levels
    block = channels * side**2
    bands = torch.eye(block, dtype=x.dtype, device=x.device).reshape(block, side, side, channels).movedim(-1, 1)
    for _ in range(levels):
        bands = haar_forward(bands)  # what a block with a single 1 becomes
    pixels = x.reshape(count, channels, height // side, side, width // side, side).permute(0, 2, 4, 3, 5, 1)
    with torch.autocast(x.device.type, enabled=False):
        found = pixels.reshape(-1, block) @ bands.reshape(block, block)
    return found.reshape(count, height // side, width // side, block).permute(0, 3, 1, 2)


def haar_inverse(y: Tensor) -> Tensor:
    """(n, 4c, h, w) -> (n, c, 2h, 2w), the exact inverse (and transpose) of `haar_forward`."""
    low, horizontal, vertical, diagonal = (0.5 * y).chunk(4, dim=1)
    n, c, h, w = low.shape
    x = y.new_empty((n, c, 2 * h, 2 * w))
    x[..., 0::2, 0::2] = low + horizontal + vertical + diagonal
    x[..., 0::2, 1::2] = low - horizontal + vertical - diagonal
    x[..., 1::2, 0::2] = low + horizontal - vertical - diagonal
    x[..., 1::2, 1::2] = low - horizontal - vertical + diagonal
    return x


# The linear code of blocks as a part of a network: what a trained autoencoder starts from and adds to.

BLOCK = 8
PIXELS = 3 * BLOCK**2


class BlockAnalysis(nn.Module):
    """(n, 3, h, w) in [-1, 1] -> (n, c, h/8, w/8): each block's coefficients, of variance 1 where they were fitted."""

    spread: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.basis = nn.Conv2d(PIXELS, channels, 1)
        self.register_buffer("spread", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 / (PIXELS**0.5 * self.spread)
        return self.basis(pixel_unshuffle(x, BLOCK)) * scale.to(x.dtype).view(1, -1, 1, 1)


class BlockSynthesis(nn.Module):
    """(n, c, h/8, w/8) -> (n, 3, h, w): the sum of each block's patterns, and the mean block."""

    spread: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.basis = nn.Conv2d(channels, PIXELS, 1)
        self.register_buffer("spread", torch.ones(channels))

    def forward(self, z: Tensor) -> Tensor:
        scale = self.spread / PIXELS**0.5
        return pixel_shuffle(self.basis(z * scale.to(z.dtype).view(1, -1, 1, 1)), BLOCK)


class Added(nn.Module):
    """(n, c or more, h, w), what the network found, and (n, c, h, w), coefficients: their sum, the rest as it is."""

    def forward(self, found: Tensor, coefficients: Tensor) -> Tensor:
        channels = coefficients.shape[1]
        return torch.cat([found[:, :channels] + coefficients, found[:, channels:]], dim=1)


@torch.no_grad()
def set_transform(analysis: BlockAnalysis, synthesis: BlockSynthesis, klt: BlockKLT) -> Tensor:
    """Both maps from the first components of a transform; the (c,) variances of the coefficients, float32."""
    channels = len(analysis.spread)
    components, variances = klt.components[:channels].float(), klt.eigenvalues[:channels].float().clamp_min(1e-6)
    rows = PIXELS**0.5 * components
    for module in (analysis, synthesis):
        module.spread.copy_(variances.sqrt())
    analysis.basis.weight.copy_(rows[:, :, None, None])
    analysis.basis.bias.copy_(-(rows @ klt.mean.float()))  # type: ignore[union-attr]
    synthesis.basis.weight.copy_(rows.T[:, :, None, None])
    synthesis.basis.bias.copy_(klt.mean.float())  # type: ignore[union-attr]
    return variances
