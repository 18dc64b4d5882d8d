"""The normalisation of latents, folded into the 1x1 convolutions of an `AutoencoderKL`: same images, unit latents.

With mean m and std s per channel, x = (z - m) / s is affine, and so are `quant_conv` and `post_quant_conv` around the
latent. The folded model's latents are x, its `scaling_factor` is 1 and it has no `shift_factor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae import compat
from ldm_vae.errors import UserError

compat.repair_torchvision()

from diffusers import AutoencoderKL


@torch.no_grad()
def fold_normalizer(model: Any, mean: Sequence[float], std: Sequence[float]) -> AutoencoderKL:
    """A new `AutoencoderKL` (float32, eval, frozen) that encodes to, and decodes from, normalised latents.

    decode(folded, (z - m) / s) = decode(model, z); the posterior of the folded model has mean (mu - m) / s and
    log-variance logvar - 2 ln s. Equal up to rounding of float32; computed in float64. diffusers clamps log-variances
    to [-30, 20], which now happens in the new units. A model without the 1x1 convolutions gets them.

    Args:
        model: diffusers' `AutoencoderKL`; stays as it is.
        mean, std: of its latents (c,), as `LatentNormalizer` has them.

    Raises:
        UserError: another class, which has no such convolutions, or another number of channels.
    """
    if type(model) is not AutoencoderKL:
        raise UserError(
            f"{type(model).__name__}: statistics fold into the 1x1 convolutions of diffusers' AutoencoderKL only; "
            "train with autoencoder.architecture=sd, or use --to onnx, which records them beside the model"
        )
    channels = int(model.config["latent_channels"])
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"latent statistics: {len(mean)} channels for an autoencoder of {channels}; use those of one")
    centre, width = (torch.tensor(list(values), dtype=torch.float64) for values in (mean, std))
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    config |= {"use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 1.0}
    folded = AutoencoderKL(**config | {"shift_factor": None, "latents_mean": None, "latents_std": None})
    state = {name: value.float().cpu() for name, value in model.state_dict().items()}
    weight, bias = _layer(model.quant_conv, 2 * channels)
    scale = torch.cat([1 / width, torch.ones(channels, dtype=torch.float64)])
    shift = torch.cat([-centre / width, -2 * width.log()])
    state |= _named("quant_conv", weight * scale[:, None], bias * scale + shift)
    weight, bias = _layer(model.post_quant_conv, channels)
    state |= _named("post_quant_conv", weight * width, bias + weight @ centre)
    folded.load_state_dict(state, strict=True)
    return folded.eval().requires_grad_(False)


def _layer(layer: nn.Conv2d | None, channels: int) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a 1x1 convolution in float64; of the identity where there is none."""
    if layer is None:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    assert layer.bias is not None
    return layer.weight.double().cpu().flatten(1), layer.bias.double().cpu()


def _named(name: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {f"{name}.weight": weight.float()[:, :, None, None], f"{name}.bias": bias.float()}
