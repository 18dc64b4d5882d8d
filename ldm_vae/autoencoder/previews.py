"""The picture of how a training goes: held-out images, what became of them, where they differ, what the judge says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_vae.data import pixels

PREVIEW_IMAGES = 6
BOOST = 4.0


def preview_sheet(images: Tensor, reconstructions: Tensor, logits: Tensor | None = None) -> Image.Image:
    """Rows: inputs, reconstructions, their difference times 4 on grey, and the discriminator's logits as colours.

    Args:
        images, reconstructions: (n, 3, h, w) in [-1, 1].
        logits: (n, 1, h', w') of the reconstructions; None leaves the row out.
    """
    rows = [images, reconstructions, (BOOST * (reconstructions - images)).clamp(-1, 1)]
    if logits is not None:
        rows.append(heat_map(logits, images.shape[-1]))
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    return pixels.to_pil(sheet[None].cpu())[0]


def heat_map(logits: Tensor, side: int) -> Tensor:
    """(n, 1, h, w) -> (n, 3, side, side) in [-1, 1]: blue where a patch passes for real, orange where it does not."""
    strength = torch.tanh(F.interpolate(logits.float(), (side, side), mode="bilinear", align_corners=False))
    real, fake = strength.clamp(min=0), (-strength).clamp(min=0)
    grey = torch.full_like(strength, -0.6)
    return torch.cat([grey + 1.5 * fake, grey + 0.6 * fake + 0.5 * real, grey + 1.5 * real], dim=1).clamp(-1, 1)
