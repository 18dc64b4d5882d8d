"""What a reconstruction is judged by: a weighted sum of terms, each a mean per element, each reported unweighted.

Images are (n, 3, h, w) in [-1, 1], float32, outside autocast. The adversarial term is a training stage of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae.autoencoder.haar import haar_forward
from ldm_vae.autoencoder.perceptual import LPIPS, Backbone
from ldm_vae.errors import UserError
from ldm_vae.random import generator


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms; 0 switches a term off. The KL is not here: `rate` owns it."""

    l1: float = 1.0
    mse: float = 0.0
    ms_ssim: float = 0.0
    perceptual: float = 0.0
    random_perceptual: float = 0.0
    high_frequency: float = 0.0
    texture_energy: float = 0.0
    perceptual_net: Backbone = "vgg"
    perceptual_weights: str | None = None

    def __post_init__(self) -> None:
        if any(weight < 0 for weight in self.weights().values()):
            raise UserError("loss: a weight is below 0; weights are >= 0")
        if not any(self.weights().values()):
            raise UserError("loss: every weight is 0, so nothing would be learnt; set loss.l1=1")

    def weights(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.type == "float"}


class ReconstructionLoss(nn.Module):
    """The reconstruction terms. Frozen networks inside hold no trainable parameter."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        uses_lpips = config.perceptual > 0
        self.lpips = LPIPS(config.perceptual_net, config.perceptual_weights) if uses_lpips else None

    def forward(
        self, images: Tensor, targets: Tensor, step: int, perceptual_scale: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum (scalar) and each term unweighted (scalars, with gradient).

        `perceptual_scale` multiplies the LPIPS weight (0 skips its cost): phases of a run use it.
        """
        images, targets = images.float(), targets.float()
        terms: dict[str, Tensor] = {}
        total = images.new_zeros(())
        for name, weight in self.config.weights().items():
            weight = weight * perceptual_scale if name == "perceptual" else weight
            if weight > 0:
                terms[name] = self._term(name, images, targets, step)
                total = total + weight * terms[name]
        if not terms:  # only LPIPS was asked for, and this phase scales it to nothing
            raise UserError("phases: perceptual=0 leaves no loss term; give loss.l1 a weight")
        return total, terms

    def _term(self, name: str, images: Tensor, targets: Tensor, step: int) -> Tensor:
        match name:
            case "l1":
                return F.l1_loss(images, targets)
            case "mse":
                return F.mse_loss(images, targets)
            case "ms_ssim":
                return 1 - ms_ssim(images, targets)
            case "perceptual":
                assert self.lpips is not None
                return self.lpips(images, targets).mean()
            case "random_perceptual":
                return random_perceptual(images, targets, step)
            case "high_frequency":
                return high_frequency(images, targets)
            case "texture_energy":
                return texture_energy(images, targets)
        raise AssertionError(f"no loss term is called {name!r}")


def ms_ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Multi-scale SSIM with a 7x7 window: 3 scales below 192 px, 5 from there. Scalar in about [0, 1]."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli, Bovik 2003
    betas = weights if min(images.shape[-2:]) >= 192 else tuple(w / sum(weights[:3]) for w in weights[:3])
    value = measure(
        (images + 1) / 2, (targets + 1) / 2, kernel_size=7, sigma=1.0, betas=betas, data_range=1.0, normalize="relu"
    )
    assert isinstance(value, Tensor)
    return value


def high_frequency(images: Tensor, targets: Tensor) -> Tensor:
    """L1 between the three detail bands of one Haar level. Softens images unless LPIPS or a GAN stands beside it."""
    channels = images.shape[1]
    return F.l1_loss(haar_forward(images)[:, channels:], haar_forward(targets)[:, channels:])


def texture_energy(images: Tensor, targets: Tensor) -> Tensor:
    """|difference of log local energy| on Haar levels 2 and 3. On level 1 it would breed a screen-door texture."""
    total, x, y = images.new_zeros(()), images, targets
    for level in range(3):
        low_x, *details_x = haar_forward(x).chunk(4, dim=1)
        low_y, *details_y = haar_forward(y).chunk(4, dim=1)
        if level > 0:
            energy_x, energy_y = (
                F.avg_pool2d(torch.cat(d, dim=1).square(), 4, stride=2, padding=1, count_include_pad=False)
                for d in (details_x, details_y)
            )
            total = total + ((energy_x + 1e-4).log() - (energy_y + 1e-4).log()).abs().mean() / 2
        x, y = low_x / 2, low_y / 2
    return total


REDRAW_EVERY = 500


def random_perceptual(images: Tensor, targets: Tensor, step: int) -> Tensor:
    """Features of a random convolution pyramid, redrawn every 500 steps (arXiv:2103.10571). Not an LPIPS substitute."""
    rng = generator(0, "random_perceptual", step // REDRAW_EVERY)
    total, x, y = images.new_zeros(()), images, targets
    for level, width in enumerate((32, 48, 64)):
        kernel = torch.randn(width, x.shape[1], 3, 3, generator=rng) * (2 / (9 * x.shape[1])) ** 0.5
        if level == 0:
            kernel = kernel - kernel.mean(dim=(1, 2, 3), keepdim=True)
        kernel = kernel.to(images.device)
        x, y = (F.avg_pool2d(F.relu(F.conv2d(t, kernel, padding=1)), 2) for t in (x, y))
        contrast = y.detach().abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-3
        total = total + ((x - y) / contrast).abs().mean() / 3
    return total
