"""Faster inference of an autoencoder: the same weights, and the same results up to rounding.

Nothing here changes a weight, a name, a setting or the saved class. The fast version replaces the plain forward pass
only if the values of the result are all that is needed (`only_values`). Training, exporting and compiling use the plain
network. `wavelet` shows how the package's own networks use this.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae import runtime

runtime.repair_torchvision()

from diffusers.models.upsampling import Upsample2D

Model = TypeVar("Model", bound=nn.Module)


def only_values() -> bool:
    """Whether neither a gradient nor a record of the operations (for export or compiling) is needed."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, c, h, w) -> (n, o, 2h, 2w): `conv2d(nearest-neighbor upsampling of x, weight, bias, padding=1)` with 4/9 of
    the multiplications. `weight` is (o, c, 3, 3).

    Each of the four output phases depends on 2x2 inputs. The rows and columns of the kernel that are applied to the
    same input are summed first, in float32.
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
    before, center, after = kernel.unbind(dim)
    even = torch.stack([before, center + after], dim)
    odd = torch.stack([before + center, after], dim)
    return torch.stack([even, odd])


class FoldedUpsample2D(Upsample2D):
    """diffusers' `Upsample2D` with the upsampling folded into its convolution, on the CPU and without gradients."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """(n, c, h, w) -> (n, o, 2h, 2w), or to `output_size` without folding."""
        if output_size is not None or hidden_states.device.type != "cpu" or not only_values():
            return super().forward(hidden_states, output_size, *args, **kwargs)
        layer: Any = self.conv
        return layer(hidden_states, doubled=True)


class FoldedConvolution(nn.Conv2d):
    """The convolution of a `FoldedUpsample2D`. It reads its own weight, so that offloading brings the weight first."""

    def forward(self, input: Tensor, doubled: bool = False) -> Tensor:
        """(n, c, h, w) -> (n, o, h, w); `doubled`: -> (n, o, 2h, 2w), with the upsampling before it."""
        return upsampled_convolution(input, self.weight, self.bias) if doubled else super().forward(input)


def can_be_folded(layer: nn.Module) -> bool:
    """Nearest-neighbor upsampling by 2, then a plain 3x3 convolution that keeps the size, and nothing else."""
    if type(layer) is not Upsample2D or layer.norm is not None or not layer.interpolate or layer.use_conv_transpose:
        return False
    convolution = getattr(layer, "conv", None)
    if type(convolution) is not nn.Conv2d:
        return False
    shape = (convolution.kernel_size, convolution.padding, convolution.stride, convolution.dilation)
    plain = convolution.groups == 1 and convolution.padding_mode == "zeros"
    return plain and shape == ((3, 3), (1, 1), (1, 1), (1, 1))


def prepare_for_inference(model: Model) -> Model:
    """The same module: channels_last, upsampling folded into convolutions. It can still train."""
    for layer in model.modules():
        if can_be_folded(layer):
            layer.__class__, layer.conv.__class__ = FoldedUpsample2D, FoldedConvolution
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# Group normalization whose gradient is cheap on a CPU: the layers of an `AutoencoderKL` in training.

BLOCK_ELEMENTS = 1 << 17
"""Elements of a block of rows in float32, half a megabyte, which fits into a core's cache."""

MOST_CHANNELS = {torch.bfloat16: 16, torch.float32: 4}
"""Elements of a group up to which torch's own backward pass is slower."""


class BlockedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with the gradient of this file where that is faster; made by `use_blocked_group_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        few = self.num_channels // self.num_groups <= MOST_CHANNELS.get(input.dtype, 0)
        blocked = few and input.device.type == "cpu" and input.ndim == 4 and self.affine and torch.is_grad_enabled()
        if blocked and input.is_contiguous(memory_format=torch.channels_last):
            return _Blocked.apply(input, self.weight, self.bias, self.num_groups, self.eps)  # type: ignore[no-untyped-call]
        return super().forward(input)


def use_blocked_group_norm(model: nn.Module) -> None:
    """Replace every `nn.GroupNorm` in `model` by a `BlockedGroupNorm`. Weights and their names do not change."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = BlockedGroupNorm


class _Blocked(torch.autograd.Function):
    """x (n, c, h, w), channels_last -> the same shape. See `torch.nn.functional.group_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        count, channels, height, width = x.shape
        y, mean, scale = torch.native_group_norm(x, weight, bias, count, channels, height * width, groups, epsilon)
        ctx.save_for_backward(x, weight, mean, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """With s = 1 / deviation and N numbers a group: dx = s w dy + k (x - mean) - s sum(w dy) / N, where
        k = -s^3 sum(w dy (x - mean)) / N."""
        x, weight, mean, scale = ctx.saved_tensors
        rows, gradient_rows = _rows(x), _rows(gradient)
        count, positions, channels = rows.shape
        groups, width = mean.shape[1], channels // mean.shape[1]
        mean, scale, weights = mean.float(), scale.float(), weight.float()
        step = max(1, BLOCK_ELEMENTS // channels)
        blocks = [(i, slice(first, first + step)) for i in range(count) for first in range(0, positions, step)]
        sums, products = torch.zeros(2, count, channels)
        for i, block in blocks:
            part = gradient_rows[i, block].float()
            sums[i] += part.sum(0)
            products[i] += (part * rows[i, block]).sum(0)

        def spread(of_groups: Tensor) -> Tensor:
            return of_groups.repeat_interleave(width, 1)

        numbers = positions * width
        weighted, weighted_products = ((one * weights).view(count, groups, width).sum(2) for one in (sums, products))
        slope = -(weighted_products - mean * weighted) * scale**3 / numbers
        of_gradient, of_input = spread(scale) * weights, spread(slope)
        constant = spread(-slope * mean - scale * weighted / numbers)
        result = torch.empty_like(rows)
        for i, block in blocks:
            part = gradient_rows[i, block] * of_gradient[i]
            result[i, block] = part.addcmul_(rows[i, block].float(), of_input[i]).add_(constant[i])
        weight_gradient = ((products - spread(mean) * sums) * spread(scale)).sum(0)
        shaped = result.view(x.shape[0], *x.shape[2:], channels).permute(0, 3, 1, 2)
        return shaped, weight_gradient.to(weight.dtype), sums.sum(0).to(weight.dtype), None, None


def _rows(images: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, h w, c), a view where the memory is channels_last."""
    channels = images.shape[1]
    return images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(len(images), -1, channels)
