"""Pictures to look at: an image, its latent, its reconstructions and what is lost; PNG files and one grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm_vae.data import pixels

DIFFERENCE_GAIN = 8
GRID_COLUMNS = ("original", "decoded", "difference")


@dataclass(frozen=True)
class Example:
    """One evaluated image; `pictures`: original, decoded, linear, difference and latent."""

    id: str
    label: str
    pictures: dict[str, Image.Image]


def make_example(id: str, label: str, original: Tensor, decoded: Tensor, linear: Tensor, mean: Tensor) -> Example:
    """Images (3, h, w) in [-1, 1] and the latent mean (c, h/f, w/f) -> an example."""
    difference = (DIFFERENCE_GAIN * (decoded - original)).clamp(-1, 1)
    images = {"original": original, "decoded": decoded, "linear": linear, "difference": difference}
    pictures = {name: pixels.to_pil(image[None].cpu())[0] for name, image in images.items()}
    pictures["latent"] = pixels.to_pil(latent_colours(mean)[None].cpu())[0]
    return Example(id, label, pictures)


def latent_colours(latent: Tensor) -> Tensor:
    """A latent (c, h, w) as a false-colour image (3, h, w) in [-1, 1].

    Red, green and blue are its three strongest directions over the channels, each stretched between its 2nd
    and 98th percentile. Fewer than three channels repeat the last one.
    """
    channels = latent.float().flatten(1)
    channels = channels - channels.mean(dim=1, keepdim=True)
    _, vectors = torch.linalg.eigh(channels @ channels.T)
    directions = vectors.flip(1).T[:3]
    directions = torch.where(directions.sum(dim=1, keepdim=True) < 0, -directions, directions)
    projected = directions @ channels
    projected = projected[[min(row, len(projected) - 1) for row in range(3)]]
    low, high = projected.quantile(torch.tensor([0.02, 0.98], device=latent.device), dim=1, keepdim=True)
    stretched = (projected - low) / (high - low).clamp_min(1e-6) * 2 - 1
    return stretched.clamp(-1, 1).view(3, *latent.shape[1:])


def save_examples(folder: Path, found: list[Example]) -> list[dict[str, object]]:
    """Write `NN_name.png` per picture; return JSON-able records with the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9]_*.png"):
        old.unlink()
    records: list[dict[str, object]] = []
    for number, example in enumerate(found):
        files = {name: f"{number:02d}_{name}.png" for name in example.pictures}
        for name, picture in example.pictures.items():
            picture.save(folder / files[name])
        records.append({"id": example.id, "label": example.label, "files": files})
    return records


def grid(found: list[Example], gap: int = 8) -> Image.Image:
    """One row per example: original, reconstruction, difference times 8 on grey; a white gap between."""
    rows = [[example.pictures[name] for name in GRID_COLUMNS] for example in found]
    width, height = rows[0][0].size
    size = (len(GRID_COLUMNS) * (width + gap) - gap, len(rows) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (width + gap), y * (height + gap)))
    return sheet
