"""`ldm-vae directions apply`: pictures moved along a direction by several strengths: files, strips, a sheet."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ldm_vae import provenance
from ldm_vae.applications.directions.fitting import check_continuous, load_directions, pool
from ldm_vae.autoencoder.base import decode, encode_moments
from ldm_vae.autoencoder.models import downsampling, load_autoencoder
from ldm_vae.autoencoder.weights import encoder_fingerprint
from ldm_vae.data import transforms
from ldm_vae.data.decoding import ImageRejected, decode_image, read_regular_file
from ldm_vae.data.transforms import pad_to_multiple, resize_center_crop
from ldm_vae.errors import UserError
from ldm_vae.evaluation.reconstruct_images import find_pictures
from ldm_vae.files import system_errors_explained, write_png
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.format import open_set_folder
from ldm_vae.latents.inspect import choose
from ldm_vae.storage import open_folder
from ldm_vae.training.distributed import compute_device
from ldm_vae.utils.image_grid import PAPER, labelled_sheet, side_by_side

SHEET_IMAGES = 24
CELL = 192
LARGEST_STRENGTH = 20.0


@dataclass(frozen=True)
class ApplySettings:
    """What is edited, and how.

    Attributes:
        direction: its name, or that of an attribute.
        strengths: in standard deviations of the pooled latents along the direction.
        mask: file of a picture, white where the image may change; None: everywhere.
        box: left, top, right, bottom in pixels instead.
        feather: how softly the mask ends, in latent positions (standard deviation of a Gaussian).
        size: first scale and crop the images to this side; None keeps each its own.
    """

    directions: str
    autoencoder: str
    direction: str
    strengths: tuple[float, ...]
    mask: str | None = None
    box: Box | None = None
    feather: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if not self.strengths or not all(math.isfinite(s) and abs(s) <= LARGEST_STRENGTH for s in self.strengths):
            raise UserError(
                f"strengths: {list(self.strengths)} is no list of numbers up to {LARGEST_STRENGTH:g}; try -2,-1,0,1,2"
            )
        if len({file_mark(strength) for strength in self.strengths}) < len(self.strengths):
            raise UserError(f"strengths: two of {list(self.strengths)} are the same in two digits; leave one out")
        if self.mask is not None and self.box is not None:
            raise UserError("mask: and box say both where; give one of them")
        if self.feather is not None and self.mask is None and self.box is None:
            raise UserError("feather: has no effect without a mask or a box; leave it out")
        if self.feather is not None and not 0 <= self.feather <= 64:
            raise UserError(f"feather: {self.feather} is not between 0 and 64 latent positions")
        if self.size is not None and self.size < 8:
            raise UserError(f"size: {self.size} is below 8 pixels")


def apply_direction(
    settings: ApplySettings,
    output: str | Path,
    *,
    inputs: Sequence[str] = (),
    latents: str | None = None,
    samples: Sequence[int] = (),
    device: str = "auto",
    overwrite: bool = False,
) -> tuple[int, list[tuple[str, str]]]:
    """Write NAME_+1.00.png for each strength, NAME_strip.png, and sheet.png of the first 24 pictures.

    Args:
        inputs: image files and folders.
        latents: a set that `ldm-vae encode` wrote, instead; `samples`: of these numbers, by default of 8.

    Returns:
        The number of pictures edited, and (name, reason) of those that could not be read.

    Raises:
        UserError: an unknown direction, another autoencoder, a mask that does not fit, or an output that is not empty.
    """
    started = time.time()
    found = load_directions(settings.directions)
    direction = found.find(settings.direction)
    autoencoder = load_autoencoder(settings.autoencoder).to(compute_device(device))
    check_continuous(autoencoder, f"autoencoder {settings.autoencoder}")
    found.check_autoencoder(autoencoder, f"autoencoder {settings.autoencoder}")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder for --out")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder}: is not empty; give another --out, or --overwrite")
    rejected: list[tuple[str, str]] = []
    if latents is None:
        pictures = _encoded(inputs, settings, autoencoder, rejected)
    else:
        pictures = _stored(latents, samples, autoencoder)
    factor, count = downsampling(autoencoder), 0
    cells: list[Image.Image] = []
    with (
        open_folder(folder).hold(provenance.RUN_LOCK),
        system_errors_explained(folder, "free some space and try again"),
    ):
        for name, latent, (height, width) in pictures:
            mask = read_mask(settings, height, width, factor)
            moved = edited(latent, direction.vector, settings.strengths, mask)
            decoded = torch.cat([decode(autoencoder, one[None]).cpu() for one in moved])[..., :height, :width]
            row = transforms.to_pil(decoded)
            for strength, picture in zip(settings.strengths, row):
                write_png(folder / f"{name}_{file_mark(strength)}.png", picture)
            write_png(folder / f"{name}_strip.png", side_by_side(row))
            count += 1
            if count <= SHEET_IMAGES:
                cells += row
        if not count:
            raise UserError(f"{inputs[0]}: no image could be decoded ({rejected[0][1]}); give other files")
        captions = [f"{strength:+g}" for strength in settings.strengths] * (len(cells) // len(settings.strengths))
        side = max(cells[0].size)
        sheet = labelled_sheet(
            [ImageOps.pad(cell, (side, side), color=PAPER) for cell in cells], captions, CELL, len(settings.strengths)
        )
        write_png(folder / "sheet.png", sheet)
        provenance.write_run_record(
            folder, None, started, time.time() - started,
            images=count, direction=direction.name, strengths=list(settings.strengths),
        )  # fmt: skip
    return count, rejected


def file_mark(strength: float) -> str:
    """`+1.00`."""
    return f"{strength + 0.0:+.2f}"


Encoded = tuple[str, Tensor, tuple[int, int]]
"""Name, latent (1, c, h, w), height and width of the image in pixels."""


def _encoded(
    inputs: Sequence[str], settings: ApplySettings, autoencoder: Any, rejected: list[tuple[str, str]]
) -> Iterator[Encoded]:
    for name, path in find_pictures(inputs):
        try:
            image = decode_image(read_regular_file(path))
        except ImageRejected as error:
            rejected.append((str(path), str(error)))
            continue
        if settings.size is not None:
            image = resize_center_crop(image, settings.size)
        tensor = transforms.from_uint8(torch.from_numpy(image.copy()).permute(2, 0, 1)[None]).to(autoencoder.device)
        latent, _ = encode_moments(autoencoder, tensor)
        pool(latent, name)  # refuses what is not finite
        yield name, latent, (image.shape[0], image.shape[1])


def _stored(location: str, samples: Sequence[int], autoencoder: Any) -> Iterator[Encoded]:
    open_set_folder(location)
    dataset = LatentDataset(location)
    manifest = dataset.manifest
    manifest.normalizer  # noqa: B018 - codes have none
    manifest.check_autoencoder(encoder_fingerprint(autoencoder), "autoencoder")
    dataset = LatentDataset(location, posterior="mean" if manifest.content == "moments" else None, flip=False)
    factor = downsampling(autoencoder)
    for number in choose(manifest, 8, samples):
        latent = dataset[number]["latent"][None].to(autoencoder.device)
        pool(latent, dataset.id(number))
        yield f"{number:06d}", latent, (latent.shape[-2] * factor, latent.shape[-1] * factor)


def read_mask(settings: ApplySettings, height: int, width: int, factor: int) -> Tensor | None:
    """(1, 1, h, w) at latent resolution for an image of height x width pixels. Raises: UserError for another size."""
    feather = 1.0 if settings.feather is None else settings.feather
    if settings.box is not None:
        return latent_mask(box_mask(settings.box, height, width), factor, feather)
    if settings.mask is None:
        return None
    try:
        image = decode_image(read_regular_file(settings.mask))
    except ImageRejected as error:
        raise UserError(f"mask: {settings.mask}: {error}; give a picture") from error
    if image.shape[:2] != (height, width):
        raise UserError(
            f"mask: {image.shape[0]} x {image.shape[1]} pixels (height x width) for an image of {height} x {width}; "
            "give one of the same size, or --size with a mask of it"
        )
    values = torch.from_numpy(image.copy()).float().mean(dim=2)[None, None] / 255
    return latent_mask(values, factor, feather)


# Moving latents along a direction, everywhere or where a mask says; pure functions of tensors.

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, right and bottom not included."""


def edited(latent: Tensor, vector: np.ndarray, strengths: Sequence[float], mask: Tensor | None = None) -> Tensor:
    """A latent (1, c, h, w) moved by each of s strengths along `vector` (c,), (s, c, h, w).

    `mask`: (1, 1, h, w), 0 to 1, how far each position moves; None: all of them. A strength of 0 changes nothing.
    """
    move = torch.from_numpy(vector).to(latent).view(1, -1, 1, 1)
    amounts = torch.tensor(strengths, dtype=torch.float64).to(latent).view(-1, 1, 1, 1)
    return latent + amounts * move * (1.0 if mask is None else mask.to(latent))


def latent_mask(mask: Tensor, factor: int, feather: float) -> Tensor:
    """A mask of pixels (1, 1, H, W), 0 to 1, at latent resolution (1, 1, h, w): the covered share of each position,
    softened by a Gaussian with a standard deviation of `feather` positions.

    Raises:
        UserError: the mask is empty.
    """
    small = F.avg_pool2d(pad_to_multiple(mask.float(), factor), factor)
    if not bool((small > 0).any()):
        raise UserError("mask: is empty, so that nothing would change; paint white what may change")
    if feather <= 0:
        return small
    radius = max(1, round(3 * feather))
    weights = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * feather**2)).to(small)
    weights = weights / weights.sum()
    padded = F.pad(small, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))


def box_mask(box: Box, height: int, width: int) -> Tensor:
    """(1, 1, height, width), 1 inside. Raises: UserError for a box that is empty or not inside."""
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise UserError(
            f"box: {left},{top},{right},{bottom} is no box inside an image of {width} x {height} pixels; give "
            "left,top,right,bottom"
        )
    mask = torch.zeros(1, 1, height, width)
    mask[..., top:bottom, left:right] = 1
    return mask
