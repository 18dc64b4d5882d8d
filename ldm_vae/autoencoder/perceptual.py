"""LPIPS (Zhang et al., arXiv:1801.03924): backbone and linear heads from the `lpips` package, the distance ours.

`lpips` 0.1.4 divides by sqrt(sum x^2) + eps: an infinite gradient at a zero feature vector, and NaN in fp16. Here
eps is inside the root. The network runs in float32, frozen, in eval mode for good (its Dropout would come back with
`.train()`).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm_vae import compat
from ldm_vae.autoencoder.weights import check_finite
from ldm_vae.errors import UserError
from ldm_vae.tensor_files import check_tensor_file

Backbone = Literal["vgg", "squeeze", "alex"]

EPSILON = 1e-10
_BACKBONE_NAMES = {"vgg": "vgg16", "squeeze": "squeezenet1_1", "alex": "alexnet"}


class LPIPS(nn.Module):
    """The perceptual distance between images; differentiable in both arguments.

    Args:
        net: backbone; `vgg` is the usual training loss, `alex` the usual metric, `squeeze` the cheapest.
        weights: a safetensors file with the backbone's torchvision `features.*`. None: torchvision's own download.

    Raises:
        UserError: when the weights cannot be had. They are never replaced by random ones.
    """

    def __init__(self, net: Backbone = "vgg", weights: str | None = None) -> None:
        super().__init__()
        network = _network(net, Path(weights) if weights is not None else None)
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


def _network(net: Backbone, weights: Path | None) -> Any:
    """`lpips.LPIPS` with the backbone's weights from a file, or downloaded by torchvision."""
    compat.repair_torchvision()
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision in its old way
        if weights is not None:
            network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
            _load_backbone(network, weights, net)
            return network
        try:
            return lpips.LPIPS(net=net, verbose=False)
        except OSError as error:  # URLError, timeouts, a read-only cache
            raise UserError(
                f"perceptual_net={net}: weights of {_BACKBONE_NAMES[net]} could not be downloaded ({error}); "
                "give a local safetensors file of them as perceptual_weights=FILE, or switch the perceptual term off"
            ) from error


def _load_backbone(network: Any, path: Path, net: Backbone) -> None:
    """Copy torchvision's `features.N.*` into lpips' slices, which keep the layer numbers. Strict in names, shapes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(
            f"perceptual_weights={path}: no such file; give a safetensors file of torchvision's "
            f"{_BACKBONE_NAMES[net]} features, or leave it out to let torchvision download them"
        )
    try:
        check_tensor_file(path)
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"perceptual_weights={path}: not a safetensors file ({error})") from error
    check_finite(tensors, f"perceptual_weights={path}")
    tensors = {
        key.removeprefix("features."): value.float() for key, value in tensors.items() if "classifier" not in key
    }
    wanted = {
        ".".join(key.split(".")[1:]): key for key in network.net.state_dict()
    }  # "slice2.3.squeeze.weight" -> "3..."
    if wanted.keys() - tensors.keys():
        missing = sorted(wanted.keys() - tensors.keys())[0]
        raise UserError(f"perceptual_weights={path}: lacks {missing!r}; it is no {_BACKBONE_NAMES[net]} backbone")
    try:
        network.net.load_state_dict({wanted[key]: tensors[key] for key in wanted})
    except RuntimeError as error:
        raise UserError(
            f"perceptual_weights={path}: a tensor has another shape; it is no {_BACKBONE_NAMES[net]}"
        ) from error
