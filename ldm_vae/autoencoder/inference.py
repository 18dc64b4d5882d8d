"""Running an autoencoder without gradients in less time: the same weights, the same results but for rounding.

Nothing here changes a weight, a name, a setting or the class that is saved. What is faster replaces the plain forward
where nothing but the values of the result is asked for (`only_values`): training, exporting and compiling see the plain
network. How the package's own networks use this is written in `wavelet`.
"""

from __future__ import annotations

from typing import Any

import torch

from ldm_vae import compat

compat.repair_torchvision()

import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


def only_values() -> bool:
    """Neither a gradient nor the operations themselves are wanted."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, c, h, w) -> (n, o, 2h, 2w): `conv2d(nearest-neighbour upsampling of x, weight, bias, padding=1)` with 4/9 of
    the multiplications. `weight` is (o, c, 3, 3).

    Each of the four output phases sees 2x2 different inputs: the rows and columns of the kernel that meet the same
    input are added up first, in float32.
    """
    count, _, height, width = x.shape
    kernels = _phases(_phases(weight.float(), 2), 3)  # the phase of a column comes before that of a row
    output: Tensor | None = None
    for column, by_row in enumerate(kernels.unbind(0)):
        for row, kernel in enumerate(by_row.unbind(0)):
            kernel = kernel.to(weight.dtype).contiguous(memory_format=torch.channels_last)
            phase = F.conv2d(x, kernel, bias, padding=1)
            if output is None:
                shape = (count, len(weight), 2 * height, 2 * width)
                output = torch.empty(shape, dtype=phase.dtype, device=x.device, memory_format=torch.channels_last)
            output[..., row::2, column::2] = phase[..., row : row + height, column : column + width]
    assert output is not None
    return output


def _phases(kernel: Tensor, dim: int) -> Tensor:
    """Stacked in front: the two taps along `dim` of the even outputs and of the odd ones."""
    dim = dim + kernel.ndim - 4
    before, centre, after = kernel.unbind(dim)
    even = torch.stack([before, centre + after], dim)
    odd = torch.stack([before + centre, after], dim)
    return torch.stack([even, odd])


class FoldedUpsample2D(Upsample2D):
    """diffusers' `Upsample2D` with the upsampling folded into its convolution, on the CPU and without gradients."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """(n, c, h, w) -> (n, o, 2h, 2w), or `output_size` by the plain way."""
        if output_size is not None or hidden_states.device.type != "cpu" or not only_values():
            return super().forward(hidden_states, output_size, *args, **kwargs)
        layer: Any = self.conv
        return upsampled_convolution(hidden_states, layer.weight, layer.bias)


def can_be_folded(layer: nn.Module) -> bool:
    """Nearest-neighbour upsampling by 2, then a plain 3x3 convolution that keeps the size, and nothing else."""
    if type(layer) is not Upsample2D or layer.norm is not None or not layer.interpolate or layer.use_conv_transpose:
        return False
    convolution = getattr(layer, "conv", None)
    if type(convolution) is not nn.Conv2d:
        return False
    shape = (convolution.kernel_size, convolution.padding, convolution.stride, convolution.dilation)
    plain = convolution.groups == 1 and convolution.padding_mode == "zeros"
    return plain and shape == ((3, 3), (1, 1), (1, 1), (1, 1))


def prepare_for_inference(autoencoder: Any) -> Any:
    """The same module: channels_last, upsampling folded into convolutions. It can still train."""
    for layer in autoencoder.modules():
        if can_be_folded(layer):
            layer.__class__ = FoldedUpsample2D
    return autoencoder.to(memory_format=torch.channels_last)
