"""Heat maps as pictures: from dark to bright over a fixed range, so that pictures of different images compare."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ldm_vae.evaluation.html_pages import Picture, embed_image

COLOURS = "inferno"
OUTLINE = (0, 255, 255)
SHOWN_SIDE = 256
"""Pixels of a picture on a page."""


def heat_picture(heat: np.ndarray, threshold: float, side: int, mask: np.ndarray | None = None) -> Image.Image:
    """A heat map (h, w) as (side, side): black at its median, brightest from the threshold of its peak on.

    The outline of `mask`, bool (side, side), is drawn in cyan.
    """
    from matplotlib import colormaps

    low = float(np.median(heat))
    share = np.clip((heat - low) / max(threshold - low, 1e-12), 0.0, 1.0).astype(np.float32)
    large = np.array(Image.fromarray(share).resize((side, side), Image.Resampling.BILINEAR))
    pixels = (255 * colormaps[COLOURS](large)[..., :3]).round().astype(np.uint8)
    return Image.fromarray(outlined(pixels, mask))


def outlined(pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """uint8 (h, w, 3) with the border of a mask drawn two pixels wide around it."""
    if mask is None or not mask.any():
        return pixels
    from scipy.ndimage import binary_dilation

    drawn = pixels.copy()
    drawn[binary_dilation(mask, iterations=3) & ~binary_dilation(mask)] = OUTLINE
    return drawn


def embedded(image: Image.Image, text: str) -> Picture:
    return embed_image(image, text, SHOWN_SIDE)
