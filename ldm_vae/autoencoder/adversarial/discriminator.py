"""The patch discriminator and the augmentation of what it sees. Losses and schedules are in `game.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae.autoencoder.haar import haar_forward


class PatchDiscriminator(nn.Module):
    """Images (n, 3, h, w) in [-1, 1] -> one logit per patch of 70 pixels, (n, 1, h/8 - 2, w/8 - 2).

    PatchGAN (Isola et al., arXiv:1611.07004) without normalisation: batch statistics would tie the result to how a
    batch is split. The three detail bands of a Haar level stand beside the colours, so that sharpness is easy to see.
    """

    SMALLEST_SIDE = 32

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        previous = 12
        for level, channels in enumerate(widths):
            stride = 2 if level < 3 else 1
            layers += [nn.Conv2d(previous, channels, 4, stride, padding=1), nn.LeakyReLU(0.2)]
            previous = channels
        self.layers = nn.Sequential(*layers, nn.Conv2d(previous, 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=0.2)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        details = haar_forward(images)[:, 3:]
        seen = torch.cat([images, F.interpolate(details, scale_factor=2.0, mode="nearest")], dim=1)
        return self.layers(seen.contiguous(memory_format=torch.channels_last))


def augment(images: Tensor, chance: Tensor) -> Tensor:
    """Differentiable augmentation (Zhao et al., arXiv:2006.10738): brightness, saturation, contrast, shift, cutout.

    Args:
        images: (n, 3, h, w) in [-1, 1].
        chance: (n, 7) uniform in [0, 1]: equal rows give an image and its reconstruction equal treatment.
    """
    brightness, saturation, contrast, shift_x, shift_y, hole_x, hole_y = chance.to(images)[
        :, :, None, None, None
    ].unbind(1)
    images = images + (brightness - 0.5) * 0.5
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (0.5 + saturation)
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    images = level + (images - level) * (0.75 + 0.5 * contrast)
    return _cutout(_shift(images, shift_x, shift_y), hole_x, hole_y)


def _shift(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Whole pixels up to 1/8 of the side, borders replicated."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) + ((y.flatten()[:, None] - 0.5) * height / 4).round().long()
    columns = torch.arange(width, device=images.device) + ((x.flatten()[:, None] - 0.5) * width / 4).round().long()
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[
        batch, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    ]
    return moved.permute(0, 3, 1, 2)


def _cutout(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A grey square of a quarter of the side."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    hole = ((rows - y * height).abs() <= height / 8) & ((columns - x * width).abs() <= width / 8)
    return images.masked_fill(hole, 0.0)
