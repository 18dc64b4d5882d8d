"""Heat maps: one value every four pixels, averaged over a window, the same grid for every score.

Differences of pixels or features are brought to that grid here; what they mean belongs to `measurement`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_vae.autoencoder.perceptual import LPIPS

STRIDE = 4
"""Pixels from one value of a heat map to the next."""
WINDOW = 3
"""Values that are averaged along each side: 12 pixels, a little more than a latent position at f8."""
SCALES = 3
CONTRAST_FLOOR = 0.06**2
LUMINANCE_FLOOR = 0.02**2
"""C2 and C1 of SSIM (Wang 2004) for the range -1 to 1."""


def of_pixels(values: Tensor) -> Tensor:
    """(n, 1, h, w), a value each pixel -> (n, h/4, w/4)."""
    return smooth(F.avg_pool2d(values.float(), STRIDE))


def of_positions(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 1, h, w) of a coarser grid, as of latent positions -> (n, *size)."""
    return smooth(F.interpolate(values.float(), size=size, mode="bilinear", align_corners=False))


def smooth(maps: Tensor) -> Tensor:
    """(n, 1, h, w) -> (n, h, w): the mean over the window, which ends at the border."""
    return F.avg_pool2d(maps, WINDOW, stride=1, padding=WINDOW // 2, count_include_pad=False)[:, 0]


def structural_dissimilarity(images: Tensor, references: Tensor) -> Tensor:
    """(n, 3, h, w) twice -> (n, 1, h/4, w/4) in [0, 1]: (1 - SSIM) / 2, mean over three scales and RGB.

    As in MS-SSIM the finer scales compare contrast and structure, the coarsest one brightness as well; their mean
    takes the place of the product, which is one number for an image and no map.
    """
    found = images.new_zeros(())
    for scale in range(SCALES):
        similarity = _similarity(images, references, with_luminance=scale == SCALES - 1)
        found = found + F.avg_pool2d((1 - similarity) / 2, STRIDE >> scale).mean(dim=1, keepdim=True) / SCALES
        images, references = F.avg_pool2d(images, 2), F.avg_pool2d(references, 2)
    return found


def _similarity(x: Tensor, y: Tensor, with_luminance: bool) -> Tensor:
    """SSIM at every pixel, Gaussian window of 11 pixels and sigma 1.5, borders replicated."""
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    variance_x = _local_mean(x * x) - mean_x.square()
    variance_y = _local_mean(y * y) - mean_y.square()
    covariance = _local_mean(x * y) - mean_x * mean_y
    found = (2 * covariance + CONTRAST_FLOOR) / (variance_x + variance_y + CONTRAST_FLOOR)
    if with_luminance:
        found = found * (2 * mean_x * mean_y + LUMINANCE_FLOOR) / (mean_x**2 + mean_y**2 + LUMINANCE_FLOOR)
    return found.clamp(-1, 1)


def _local_mean(x: Tensor) -> Tensor:
    offsets = torch.arange(-5, 6, device=x.device)
    weights = torch.softmax(-offsets.square() / (2 * 1.5**2), dim=0).to(x)
    channels = x.shape[1]
    x = F.pad(x, (5, 5, 5, 5), mode="replicate")
    x = F.conv2d(x, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def perceptual_distance(lpips: LPIPS, images: Tensor, references: Tensor) -> Tensor:
    """LPIPS at every place: (n, 3, h, w) twice -> (n, 1, h/4, w/4), the layers' maps summed."""
    size = (images.shape[-2] // STRIDE, images.shape[-1] // STRIDE)
    found = images.new_zeros(())
    for head, x, y in zip(lpips.heads, lpips.features(images), lpips.features(references)):
        found = found + F.interpolate(head((x - y).square()), size=size, mode="bilinear", align_corners=False)
    return found
