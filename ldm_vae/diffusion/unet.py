"""`LatentUNet`: diffusers' `UNet2DModel` on pixel-unshuffled latents, from a noisy latent to its velocity.

    x_t (n, c, h, w) -> tokens (n, c patch^2, h / patch, w / patch), with `coordinates` also those of the tokens
    -> UNet2DModel at 1000 t and the labels -> `prediction` -> velocity (n, c, h, w)

Contains the network, its settings and presets, and the crops for training. Coordinates are the centers of latent
positions, from -1 to 1 over the whole image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae import runtime

runtime.repair_torchvision()

from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers looks for it in a pipeline's modules

from ldm_vae.autoencoder.weight_files import SavedCompletely
from ldm_vae.diffusion import flow
from ldm_vae.errors import UserError
from ldm_vae.random import generator

GROUP_CHANNELS = 32
"""Channels per normalization group. On CPU, GroupNorm of a bfloat16 channels_last tensor takes 10 to 25 times as long
with 4 to 24 channels per group as with 32 (torch 2.13, AVX-512): longer than the convolution before it."""

HEAD_CHANNELS = 32
SMALLEST_VARIANCE = 1e-3
"""Smallest variance of a principal direction, which prevents a division by zero for a dead one."""

TIME_SCALE = 1000.0
"""Factor from t in [0, 1] to the input of the sinusoidal embedding of `UNet2DModel`."""

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"patch": 4, "widths": (96, 192), "layers": 1, "attention": ()},
    "small": {"patch": 2, "widths": (96, 192, 288), "layers": 2, "attention": (2,)},
    "base": {"patch": 2, "widths": (192, 384, 576), "layers": 3, "attention": (1, 2)},
}


@dataclass(frozen=True)
class UNetConfig:
    """The network: a preset, and the settings that differ from it (None keeps the preset's value).

    Attributes:
        preset: tiny, small or base.
        prediction: output of the last layer: the clean latent relative to its linear estimate (`x`), the `clean` latent
            itself, or the `velocity`. The loss is that of the velocity for all three.
        patch: latent positions per token along one side; a patch of 2 costs about 4 times a patch of 4.
        widths: channels per level, multiples of 32; each level has half the resolution of the one before.
        layers: residual blocks per level on the way down (one more on the way up).
        attention: levels with self-attention, 0 being the finest. The middle block always has it.
        dropout: probability inside the residual blocks.
        coordinates: adds two input channels with the position of a token in the image, which training on crops needs.
    """

    preset: Literal["tiny", "small", "base"] = "small"
    prediction: Literal["x", "clean", "velocity"] = "x"
    patch: int | None = None
    widths: tuple[int, ...] | None = None
    layers: int | None = None
    attention: tuple[int, ...] | None = None
    dropout: float = 0.0
    coordinates: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"unet.preset: {self.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
        shape = self.shape()
        widths, levels = shape["widths"], range(len(shape["widths"]))
        if not widths or any(width < GROUP_CHANNELS or width % GROUP_CHANNELS for width in widths):
            raise UserError(f"unet.widths: {list(widths)} must be multiples of {GROUP_CHANNELS}, one per level")
        if any(level not in levels for level in shape["attention"]):
            raise UserError(f"unet.attention: {list(shape['attention'])} names levels outside 0..{len(widths) - 1}")
        for name in ("patch", "layers"):
            if shape[name] < 1:
                raise UserError(f"unet.{name}: {shape[name]} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"unet.dropout: {self.dropout} is not a probability below 1")

    def shape(self) -> dict[str, Any]:
        """patch, widths, layers, attention, with the preset's values as defaults."""
        chosen = {name: getattr(self, name) for name in ("patch", "widths", "layers", "attention")}
        chosen = {name: tuple(v) if isinstance(v, list) else v for name, v in chosen.items() if v is not None}
        return PRESETS[self.preset] | chosen


def build_unet(config: UNetConfig, latent_channels: int, num_classes: int = 0) -> LatentUNet:
    """A new network with random weights, float32, channels_last. Seed torch before for reproducible weights.

    Args:
        config: The settings.
        latent_channels: c of the latents (n, c, h, w).
        num_classes: Number of class labels; 0 builds an unconditional network.
    """
    model = LatentUNet(
        latent_channels=latent_channels,
        num_classes=num_classes,
        prediction=config.prediction,
        dropout=config.dropout,
        coordinates=config.coordinates,
        **config.shape(),
    )
    return model.to(memory_format=torch.channels_last)  # type: ignore[return-value]


class LatentUNet(SavedCompletely, ConfigMixin):
    """Velocity of the flow at a noisy normalized latent of any size.

    A token is a patch of the latent. The result is the velocity for every `prediction`. With prediction `x`, the
    network corrects the best linear estimate of each clean token. This needs the tokens' principal directions, so call
    `measure_tokens` before training. They are saved with the weights.

    Labels run from 0 to num_classes - 1; `null_label` (= num_classes) stands for "no label".
    """

    _supports_gradient_checkpointing = True

    directions: Tensor
    variance: Tensor

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        num_classes: int = 0,
        prediction: str = "x",
        patch: int = 2,
        widths: tuple[int, ...] = (96, 192, 288),
        layers: int = 2,
        attention: tuple[int, ...] = (2,),
        dropout: float = 0.0,
        coordinates: bool = False,
    ) -> None:
        super().__init__()
        levels = range(len(widths))
        groups = math.gcd(*widths) // GROUP_CHANNELS
        channels = latent_channels * patch**2
        self.multiple = patch * 2 ** (len(widths) - 1)
        self.null_label = num_classes
        self.network = UNet2DModel(
            in_channels=channels + (2 if coordinates else 0),
            out_channels=channels,
            block_out_channels=tuple(widths),
            down_block_types=tuple("AttnDownBlock2D" if i in attention else "DownBlock2D" for i in levels),
            up_block_types=tuple("AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(levels)),
            layers_per_block=layers,
            attention_head_dim=HEAD_CHANNELS,
            norm_num_groups=groups,
            attn_norm_num_groups=groups,
            resnet_time_scale_shift="scale_shift",
            dropout=dropout,
            num_class_embeds=num_classes + 1 if num_classes else None,
        )
        nn.init.zeros_(self.network.conv_out.weight)
        assert self.network.conv_out.bias is not None
        nn.init.zeros_(self.network.conv_out.bias)
        self.register_buffer("directions", torch.eye(channels))
        self.register_buffer("variance", torch.ones(channels))

    @torch.no_grad()
    def measure_tokens(self, latents: Tensor) -> None:
        """Set the principal directions of tokens and the variance along each from normalized latents (n, c, h, w).

        A hundred latents are enough, since each has hundreds of tokens. The same latents give the same directions.
        """
        tokens = F.pixel_unshuffle(latents.double(), self.config["patch"])
        tokens = tokens.movedim(1, -1).flatten(0, -2)
        variance, directions = torch.linalg.eigh(tokens.T @ tokens / len(tokens))
        self.directions.copy_(directions)
        self.variance.copy_(variance.clamp(min=SMALLEST_VARIANCE))

    def forward(
        self, noisy: Tensor, times: Tensor, labels: Tensor | None = None, coordinates: Tensor | None = None
    ) -> Tensor:
        """Velocity (n, c, h, w), float32 for every precision and `prediction` of the network.

        Args:
            noisy: x_t (n, c, h, w), any h and w; sides that the network cannot halve are padded and cropped back.
            times: t (n,) or a scalar, in [0, 1], 1 being pure noise.
            labels: Class ids (n,) for a class-conditional network; None stands for the null label everywhere.
            coordinates: Coordinates of a crop, (n, 2, h, w), from `Crops.cut`; None: `noisy` is a whole image.

        Raises:
            ValueError: labels for a network without classes, coordinates for one that was built without them.
        """
        count, _, height, width = noisy.shape
        times = times.to(noisy.device, torch.float32).expand(count)
        tokens = self._tokens(noisy.float())
        inputs = self._with_coordinates(tokens, noisy, coordinates)
        inputs = inputs.to(self.dtype).contiguous(memory_format=torch.channels_last)
        output = self.network(inputs, times * TIME_SCALE, self._class_labels(labels, noisy)).sample.float()
        if self.config["prediction"] == "x":
            with torch.autocast(noisy.device.type, enabled=False):
                directions = self.directions.float()
                tokens = torch.einsum("nchw,cd->ndhw", tokens, directions)
                velocity = flow.velocity_from_clean_head(tokens, output, times, self.variance)
                output = torch.einsum("ndhw,cd->nchw", velocity, directions)
        output = F.pixel_shuffle(output, self.config["patch"])[..., :height, :width]
        return (
            flow.velocity_from_clean(noisy.float(), output, times) if self.config["prediction"] == "clean" else output
        )

    def velocity_target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The target of the velocity (n, c, h, w) in the loss, from x0, eps and times (n,)."""
        if self.config["prediction"] == "clean":
            return flow.clipped_velocity_target(clean, noise, times)
        return flow.velocity_target(clean, noise)

    def _tokens(self, noisy: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c patch², ⌈h / multiple⌉ multiple / patch, the same of w)."""
        return F.pixel_unshuffle(self._padded(noisy), self.config["patch"])

    def _padded(self, maps: Tensor) -> Tensor:
        bottom, right = (-side % self.multiple for side in maps.shape[-2:])
        return F.pad(maps, (0, right, 0, bottom), mode="replicate") if bottom or right else maps

    def _with_coordinates(self, tokens: Tensor, noisy: Tensor, coordinates: Tensor | None) -> Tensor:
        """The tokens and, in a network with coordinates, those of each token's center."""
        if not self.config["coordinates"]:
            if coordinates is not None:
                raise ValueError("LatentUNet: coordinates given to a network without them; pass coordinates=None")
            return tokens
        if coordinates is None:
            coordinates = whole_coordinates(*noisy.shape[-2:]).to(noisy.device).expand(len(noisy), -1, -1, -1)
        return torch.cat([tokens, F.avg_pool2d(self._padded(coordinates), self.config["patch"])], dim=1)

    def _class_labels(self, labels: Tensor | None, like: Tensor) -> Tensor | None:
        if self.null_label == 0:
            if labels is not None:
                raise ValueError("LatentUNet: labels given to an unconditional network; pass labels=None")
            return None
        if labels is None:
            return torch.full((len(like),), self.null_label, device=like.device)
        return labels


# Patch Diffusion (Wang et al. 2023, arXiv:2304.12526): training on crops, and the coordinates that locate them.


@dataclass(frozen=True)
class CropsConfig:
    """Crops of latents on a share of the steps; needs `unet.coordinates=true`.

    Attributes:
        size: side of the crops in latent positions; None trains on whole latents alone.
        share: share of the steps that train on crops, with the whole batch.
    """

    size: int | None = None
    share: float = 0.6

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise UserError(f"crops.size: {self.size} is below 1; give latent positions, or null for whole latents")
        if not 0 <= self.share <= 1:
            raise UserError(f"crops.share: {self.share} is not between 0 and 1")

    def check(self, latent_shape: tuple[int, ...], multiple: int) -> None:
        """Raises: UserError if crops do not fit the latents (c, h, w), or are not a multiple of `multiple`."""
        if self.size is None:
            return
        if self.size > min(latent_shape[1:]):
            raise UserError(
                f"crops.size: {self.size} is larger than the latents ({latent_shape[1]}x{latent_shape[2]}); "
                f"give at most {min(latent_shape[1:])}, or null"
            )
        if self.size % multiple:
            raise UserError(
                f"crops.size: {self.size} is not a multiple of {multiple}, which this U-Net needs; "
                f"give {max(1, self.size // multiple) * multiple}, or null"
            )


@dataclass(frozen=True)
class Crops:
    """One crop per sample of a global batch, or (`size` None) the whole of each. `tops`, `lefts`: int64 (n,)."""

    size: int | None
    tops: Tensor
    lefts: Tensor

    def cut(self, latents: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Crops (n, c, size, size) of whole latents (n, c, h, w), which are `rows` of the batch; their coordinates."""
        if self.size is None:
            return latents, None
        everywhere = whole_coordinates(*latents.shape[-2:]).to(latents.device)
        cut, coordinates = [], []
        for latent, top, left in zip(latents, self.tops[rows].tolist(), self.lefts[rows].tolist()):
            place = (..., slice(top, top + self.size), slice(left, left + self.size))
            cut.append(latent[place])
            coordinates.append(everywhere[0][place])
        return torch.stack(cut), torch.stack(coordinates)


def draw_crops(config: CropsConfig, seed: int, step: int, count: int, height: int, width: int) -> Crops:
    """The crops of a step. (seed, step) decides whether there are any, (seed, step, row) their positions."""
    rng = generator(seed, "crops", step)
    if config.size is None or torch.rand((), generator=rng) >= config.share:
        nowhere = torch.zeros(count, dtype=torch.int64)
        return Crops(None, nowhere, nowhere)
    tops = torch.randint(0, height - config.size + 1, (count,), generator=rng)
    lefts = torch.randint(0, width - config.size + 1, (count,), generator=rng)
    return Crops(config.size, tops, lefts)


def whole_coordinates(height: int, width: int) -> Tensor:
    """Row and column of every position of a whole latent, (1, 2, h, w) in (-1, 1), float32."""
    rows, columns = ((2 * torch.arange(side) + 1) / side - 1 for side in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]
