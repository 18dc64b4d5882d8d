"""Whether generated latents are copies of training latents: nearest neighbours, the copy rate, a panel of pairs.

A sample counts as a copy when its nearest training latent is less than a third as far away as the second nearest one
(Yoon et al. 2023; Bonnaire et al. 2025, arXiv:2505.17638). Compared with a part of the training set the rate is a lower
bound, and a picture that is in the set twice hides its copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.autoencoder import interface
from ldm_vae.data import pixels
from ldm_vae.data.sheets import GAP, PAPER, labelled_sheet
from ldm_vae.latents.dataset import LatentDataset

COPY_RATIO = 1 / 3
CHUNK = 256


@dataclass(frozen=True)
class Neighbours:
    """For each of n samples: the number of the nearest training latent, and |x - x1| / |x - x2|, both (n,)."""

    nearest: Tensor
    ratios: Tensor

    @property
    def copies(self) -> int:
        return int((self.ratios < COPY_RATIO).sum())


@dataclass(frozen=True)
class Copies:
    """The alarm: samples of a preview that are copies."""

    copies: int
    samples: int
    compared: int
    name: str = "copies"

    def sentence(self) -> str:
        return (
            f"copies: {self.copies} of {self.samples} preview samples lie less than a third as far from one of "
            f"{self.compared} training latents as from any other: the network repeats its images; see the preview, "
            "stop earlier, use more images, or raise unet.dropout"
        )


def find_neighbours(samples: Tensor, training: Tensor) -> Neighbours:
    """Euclidean neighbours of normalised latents (n, c, h, w) among (m, c, h, w) of any precision, m at least 2."""
    assert len(training) >= 2, "find_neighbours: fewer than two training latents"
    flat = samples.float().flatten(1).cpu()
    distances = [
        torch.cdist(flat, chunk.float().flatten(1), compute_mode="donot_use_mm_for_euclid_dist")  # exact near 0
        for chunk in training.cpu().split(CHUNK)
    ]
    (first, second), (nearest, _) = (found.unbind(1) for found in torch.cat(distances, 1).topk(2, largest=False))
    return Neighbours(nearest, first / second.clamp(min=torch.finfo(torch.float32).tiny))


@torch.no_grad()
def compare_with_training(
    pipeline: Any, images: Sequence[Image.Image], captions: Sequence[str], training: LatentDataset, compared: int
) -> tuple[Image.Image, Copies]:
    """The panel of finished pictures, encoded again, and how many of them are copies.

    Args:
        pipeline: Made them.
        images: Of the size of the training images.
        captions: One per image, or none.
        training: What the pipeline was trained on.
        compared: At most so many of its latents, evenly spread.
    """
    count = min(compared, len(training))
    known = torch.stack([training.sample(number * len(training) // count, 0)["latent"] for number in range(count)])
    found = torch.cat([_encoded(pipeline, image) for image in images])
    neighbours = find_neighbours(found, pipeline.normalizer.normalize(known))
    below = [pixels.to_pil(pipeline.decode(known[number : number + 1].to(pipeline.device)))[0]
             for number in neighbours.nearest.tolist()]  # fmt: skip
    return panel(images, below, neighbours.ratios, captions), Copies(neighbours.copies, len(images), count)


def _encoded(pipeline: Any, image: Image.Image) -> Tensor:
    """Normalised posterior mean (1, c, h, w), on the CPU."""
    tensor = pixels.from_uint8(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None])
    return pipeline.normalizer.normalize(
        interface.encode_moments(pipeline.autoencoder, tensor.to(pipeline.device))[0]
    ).cpu()


def panel(
    samples: Sequence[Image.Image], nearest: Sequence[Image.Image], ratios: Tensor, labels: Sequence[str] = ()
) -> Image.Image:
    """A sheet of pairs: the generated picture above, its nearest training latent decoded below, the ratio in words."""
    pairs, captions = [], []
    names = labels or [f"sample {number}" for number in range(1, len(samples) + 1)]
    for above, below, name, ratio in zip(samples, nearest, names, ratios.tolist(), strict=True):
        pair = Image.new("RGB", (above.width, 2 * above.height + GAP), PAPER)
        pair.paste(above, (0, 0))
        pair.paste(below.resize(above.size), (0, above.height + GAP))
        pairs.append(pair)
        captions.append(f"{name}\n" + ("copy " if ratio < COPY_RATIO else "nearest ") + f"{ratio:.2f}")
    return labelled_sheet(pairs, captions, side=2 * 192 + GAP)
