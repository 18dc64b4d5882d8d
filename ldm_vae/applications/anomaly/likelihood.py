"""The evidence lower bound of an image, and by how much a few steps on its own posterior improve it.

The decoder is a Gaussian around the decoded picture whose variance is the mean squared error on normal images: the
optimal one of a sigma-VAE (Rybkin et al., arXiv:2006.13202), so no weight between the two terms is left to choose.
All in nats per value of the image (pixel and channel).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ldm_vae.autoencoder.rate import kl_divergence

STEP = 0.3
"""Of Adam, in posterior standard deviations."""


def negative_elbo(images: Tensor, decoded: Tensor, kl: Tensor, variance: float) -> Tensor:
    """(n,): -ln N(images; decoded, variance) and the KL, over the number of values.

    Args:
        images, decoded: (n, 3, h, w) in [-1, 1]; decoded from one posterior sample.
        kl: element by element, (n, c, h/f, w/f).
        variance: of the decoder.
    """
    error = (images - decoded).square().flatten(1).mean(dim=1)
    rate = kl.flatten(1).sum(dim=1) / images[0].numel()
    return error / (2 * variance) + 0.5 * math.log(2 * math.pi * variance) + rate


def likelihood_regret(
    autoencoder: Any, images: Tensor, mean: Tensor, logvar: Tensor, noise: Tensor, variance: float, steps: int
) -> Tensor:
    """(n,) >= 0: the negative ELBO of the encoder's posterior less the lowest within `steps` steps on that posterior.

    High where the encoder serves an image badly (Xiao et al., arXiv:2003.02977; there it is the whole encoder that is
    trained further, here its outputs). Mean and log-variance move in units of the posterior, with the same `noise`
    (1 or n, c, h, w) in every step; images do not affect each other.
    """
    mean, logvar = mean.detach(), logvar.detach()
    shift, log_scale = (torch.zeros_like(mean).requires_grad_() for _ in range(2))
    optimizer = torch.optim.Adam([shift, log_scale], lr=STEP)
    best = first = torch.zeros(0)
    for step in range(steps + 1):
        with torch.enable_grad():
            moved, widened = mean + torch.exp(0.5 * logvar) * shift, logvar + log_scale
            latents = moved + torch.exp(0.5 * widened) * noise
            decoded = autoencoder.decode(latents.to(autoencoder.dtype)).sample.float()
            losses = negative_elbo(images, decoded, kl_divergence(moved, widened), variance)
            total = losses.sum()
        found = losses.detach()
        first = found if step == 0 else first
        best = found if step == 0 else torch.minimum(best, found)
        if step < steps:
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    return first - best
