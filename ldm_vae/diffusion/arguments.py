"""What the arguments of a pipeline's call mean together: how many images, whose noise, and what makes no sense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm_vae import random
from ldm_vae.diffusion import editing
from ldm_vae.diffusion.guidance import Guidance
from ldm_vae.diffusion.labels import Wanted
from ldm_vae.errors import UserError
from ldm_vae.latents.words import counted

DEFAULT_GUIDANCE = 3.0
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_call(
    output_type: str, steps: int, image: Any, strength: Any, mask: Any, latents: Any, generator: Any, seed: Any
) -> None:
    """Raises: UserError for values that no call can have, and for settings without effect."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type: {output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}")
    if steps < 1:
        raise UserError(f"num_inference_steps: {steps} is below 1")
    for name, value in (("strength", strength), ("mask", mask)):
        if value is not None and image is None:
            raise UserError(f"{name}: has no effect without an image; give image=..., or leave it out")
    if seed is not None and generator is not None:
        raise UserError("seed: given together with a generator; give one of them")
    if latents is not None and (seed is not None or generator is not None):
        raise UserError("latents: are the noise already; leave out seed and generator")


def read_guidance(
    scale: float | None,
    autoguidance: float,
    interval: tuple[float, float],
    rescale: float,
    *,
    labelled: bool,
    weak: bool,
) -> Guidance:
    """The guidance of a call with or without labels, of a pipeline with or without a second U-Net.

    Raises:
        UserError: one without effect, or impossible.
    """
    if not labelled and scale not in (None, 1):
        raise UserError(f"guidance_scale: {scale} has no effect without a label; leave it out or give a label")
    if autoguidance != 1 and not weak:
        raise UserError(
            f"autoguidance_scale: {autoguidance} needs a second U-Net; load the pipeline with autoguidance_unet=..."
        )
    by_label = 1.0 if not labelled else DEFAULT_GUIDANCE if scale is None else scale
    if rescale and by_label == autoguidance == 1:
        raise UserError(f"guidance_rescale: {rescale} has no effect without guidance; leave it out")
    return Guidance(by_label, autoguidance, (interval[0], interval[1]), rescale)


def count_images(labels: Wanted, num_images: int | None, image: Any, latents: Tensor | None) -> int:
    """Images to make: what is asked for, or as many as there are of anything."""
    if num_images is not None and num_images < 1:
        raise UserError(f"num_images: {num_images} is below 1")
    if latents is not None and num_images not in (None, len(latents)):
        raise UserError(f"latents: {len(latents)} of them for {counted(num_images, 'image')}; give one per image")
    if num_images is not None or latents is not None:
        return num_images or len(latents)  # type: ignore[arg-type]
    many = len(editing.to_tensor(image, 3, "image")) if image is not None else 1
    return max(many, len(labels)) if isinstance(labels, list | tuple) else many


def generators_of(
    generator: torch.Generator | Sequence[torch.Generator] | None, seed: int | None, count: int
) -> list[torch.Generator | None]:
    """One generator per image (the same object for all when one was given)."""
    if seed is not None:
        return [image_generator(seed, index) for index in range(count)]
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise UserError(
            f"generator: {len(generator)} of them for {counted(count, 'image')}; give one per image, or one for all"
        )
    return list(generator)


def image_generator(seed: int, index: int) -> torch.Generator:
    """The generator behind image `index` of `seed`: a CPU generator, so that every device starts from equal noise."""
    return random.generator(seed, "image", index)


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator | None], device: torch.device) -> Tensor:
    """Standard normal (n, c, h, w), float32, drawn image by image on each generator's own device."""
    noise = [torch.randn(*shape, generator=g, device=g.device if g else device).to(device) for g in generators]
    return torch.stack(noise)
