"""A training step as diffusers' example for `AutoencoderKL` takes it (examples/research_projects/autoencoderkl).

A new implementation of that program's step: float32, planar memory, generator and discriminator in turn, each on a
forward pass of its own; LPIPS is computed without gradient there, so it costs less than ours and teaches nothing; the
weight of the GAN is the ratio of two gradients at the last layer. Where its discriminator turn would send gradients on
into the autoencoder the reconstructions are cut off here, which is to its advantage. Figures for its log are read every
step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CLIP = 1.0
KL_SCALE, PERCEPTUAL_SCALE, DISCRIMINATOR_SCALE = 1e-6, 0.5, 1.0


def patch_discriminator() -> Any:
    """Three strided layers of 64 to 256 channels with batch normalization, one of 512, one of logits."""
    from torch import nn

    layers: list[Any] = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for inputs, outputs, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
        layers += [nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1))


def peer_step(autoencoder: Any, perceptual: Any, images: Any, repaired: bool = False) -> Callable[[], None]:
    """A call is one update of the autoencoder and then one of the discriminator: two iterations of the example.

    Args:
        repaired: LPIPS has its gradient, as in ours.
        autoencoder: diffusers' `AutoencoderKL`, float32.
        perceptual: `lpips.LPIPS`, frozen.
        images: float32 (n, 3, h, w) in [-1, 1].
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    discriminator = patch_discriminator().to(images.device).train()
    optimizers = [torch.optim.AdamW(module.parameters(), lr=4.5e-6) for module in (autoencoder, discriminator)]

    def forward() -> tuple[Any, Any]:
        posterior = autoencoder.encode(images).latent_dist
        return posterior, autoencoder.decode(posterior.sample()).sample

    def update(loss: Any, module: Any, optimizer: Any) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        posterior, made = forward()
        reconstruction = F.l1_loss(made, images, reduction="none")
        with torch.set_grad_enabled(repaired):
            distance = perceptual(made, images)
        likelihood = (reconstruction + PERCEPTUAL_SCALE * distance).sum() / len(images)
        kl = posterior.kl().sum() / len(images)
        adversarial = -discriminator(made).mean()
        last = autoencoder.decoder.conv_out.weight
        norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (likelihood, adversarial)]
        weight = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach() * DISCRIMINATOR_SCALE
        loss = likelihood + KL_SCALE * kl + weight * adversarial
        for figure in (loss, likelihood, reconstruction, distance, kl, weight, adversarial):
            figure.detach().mean().item()
        update(loss, autoencoder, optimizers[0])
        discriminator.zero_grad(set_to_none=True)

        _, made = forward()
        real, fake = discriminator(images), discriminator(made.detach())
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        for figure in (loss, real, fake):
            figure.detach().mean().item()
        update(loss, discriminator, optimizers[1])

    return step
