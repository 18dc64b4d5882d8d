"""The reconstruction loss: a weighted sum of terms, each a mean per element, each reported unweighted.

Images are (n, 3, h, w) in [-1, 1], float32, outside autocast. The adversarial term is a training stage of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae import runtime
from ldm_vae.autoencoder.wavelet import haar_forward
from ldm_vae.autoencoder.weights import check_finite
from ldm_vae.errors import UserError
from ldm_vae.files import check_tensor_file
from ldm_vae.metrics import MS_SSIM_WEIGHTS, multiscale_similarity
from ldm_vae.random import generator


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms; 0 switches a term off. The KL is not here: `rate` owns it.

    Args:
        l1: weight of the mean absolute difference.
        mse: weight of the mean squared difference.
        ms_ssim: weight of 1 - MS-SSIM.
        perceptual: weight of LPIPS.
        random_perceptual: weight of the distance in features of a network with random weights.
        high_frequency: weight of the difference of high-pass images.
        texture_energy: weight of the difference of local energies of high-pass images.
        perceptual_net: the LPIPS network.
        perceptual_weights: a local safetensors file of its backbone; null: torchvision's download.
    """

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
            raise UserError("loss: every weight is 0, so nothing would be learned; set loss.l1=1")

    def weights(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.type == "float"}


class ReconstructionLoss(nn.Module):
    """The reconstruction terms. Frozen networks inside hold no trainable parameter."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        uses_lpips = config.perceptual > 0
        self.lpips = LPIPS(config.perceptual_net, config.perceptual_weights, "loss.") if uses_lpips else None

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
        if name == "perceptual":
            assert self.lpips is not None
            return self.lpips(images, targets).mean()
        return TERMS[name](images, targets, step)


def crop_ms_ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Multi-scale SSIM, a scalar in [0, 1]: 9x9 window, sigma 1; 5 scales from 192 px, 3 from 36 px, else 2."""
    window, side = 9, min(images.shape[-2:])
    scales = 5 if side >= 192 else 3 if side >= 4 * window else 2
    weights = [weight / sum(MS_SSIM_WEIGHTS[:scales]) for weight in MS_SSIM_WEIGHTS[:scales]]
    return multiscale_similarity(images, targets, weights, window, sigma=1.0).mean()


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


TERMS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "l1": lambda images, targets, step: F.l1_loss(images, targets),
    "mse": lambda images, targets, step: F.mse_loss(images, targets),
    "ms_ssim": lambda images, targets, step: 1 - crop_ms_ssim(images, targets),
    "random_perceptual": random_perceptual,
    "high_frequency": lambda images, targets, step: high_frequency(images, targets),
    "texture_energy": lambda images, targets, step: texture_energy(images, targets),
}
"""Field of `LossConfig` -> the term of (images, targets, step); LPIPS holds weights, so `ReconstructionLoss` has it."""


# LPIPS (Zhang et al., arXiv:1801.03924): backbone and linear heads from the `lpips` package, the distance ours.

Backbone = Literal["vgg", "squeeze", "alex"]

EPSILON = 1e-10
_BACKBONE_NAMES = {"vgg": "vgg16", "squeeze": "squeezenet1_1", "alex": "alexnet"}


class LPIPS(nn.Module):
    """The perceptual distance between images; differentiable in both arguments.

    Args:
        net: backbone; `vgg` is the usual training loss, `alex` the usual metric, `squeeze` the cheapest.
        weights: a safetensors file with the backbone's torchvision `features.*`. None: torchvision's own download.
        where: of the keys `perceptual_net` and `perceptual_weights`, for messages.

    Raises:
        UserError: when the weights cannot be had. They are never replaced by random ones.
    """

    def __init__(self, net: Backbone = "vgg", weights: str | None = None, where: str = "") -> None:
        super().__init__()
        network = _network(net, Path(weights) if weights is not None else None, where)
        self.backbone: Any = network.net
        self.scaling: Any = network.scaling_layer
        self.heads = nn.ModuleList(head.model[-1] for head in network.lins)  # the 1x1 convolution after the Dropout
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval mode whatever its parent does."""
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (n, 3, h, w) in [-1, 1] -> unit-length features per layer, each (n, c_l, h_l, w_l), float32."""
        with torch.autocast(images.device.type, enabled=False):
            layers = self.backbone(self.scaling(images.float()))
            return [x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + EPSILON) for x in layers]

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distance of (n, 3, h, w) in [-1, 1] to `targets` of the same shape: (n,), float32, >= 0.

        No gradient is computed for targets that do not require one.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and targets.requires_grad):
            target_features = self.features(targets)
        distance = images.new_zeros(len(images), dtype=torch.float32)
        for head, x, y in zip(self.heads, self.features(images), target_features):
            distance = distance + head((x - y).square()).mean(dim=(1, 2, 3))
        return distance


def _network(net: Backbone, weights: Path | None, where: str) -> Any:
    """`lpips.LPIPS` with the backbone's weights from a file, or downloaded by torchvision."""
    runtime.repair_torchvision()
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision in its old way
        if weights is not None:
            network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
            _load_backbone(network, weights, net, where)
            return network
        try:
            return lpips.LPIPS(net=net, verbose=False)
        except OSError as error:  # URLError, timeouts, a read-only cache
            raise UserError(
                f"{where}perceptual_net={net}: weights of {_BACKBONE_NAMES[net]} could not be downloaded ({error}); "
                f"give a local safetensors file of them as {where}perceptual_weights=FILE, or switch the "
                "perceptual term off"
            ) from error


def _load_backbone(network: Any, path: Path, net: Backbone, where: str) -> None:
    """Copy torchvision's `features.N.*` into lpips' slices, which keep the layer numbers. Strict in names, shapes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(
            f"{where}perceptual_weights={path}: no such file; give a safetensors file of torchvision's "
            f"{_BACKBONE_NAMES[net]} features, or leave it out to let torchvision download them"
        )
    try:
        check_tensor_file(path)
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{where}perceptual_weights={path}: not a safetensors file ({error})") from error
    check_finite(tensors, f"{where}perceptual_weights={path}")
    tensors = {
        key.removeprefix("features."): value.float() for key, value in tensors.items() if "classifier" not in key
    }
    wanted = {
        ".".join(key.split(".")[1:]): key for key in network.net.state_dict()
    }  # "slice2.3.squeeze.weight" -> "3..."
    if wanted.keys() - tensors.keys():
        missing = sorted(wanted.keys() - tensors.keys())[0]
        raise UserError(
            f"{where}perceptual_weights={path}: lacks {missing!r}; it is not the backbone of {_BACKBONE_NAMES[net]}"
        )
    try:
        network.net.load_state_dict({wanted[key]: tensors[key] for key in wanted})
    except RuntimeError as error:
        raise UserError(
            f"{where}perceptual_weights={path}: a tensor has another shape; it is not the backbone of "
            f"{_BACKBONE_NAMES[net]}"
        ) from error
