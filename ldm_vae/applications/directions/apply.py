"""Pictures moved along a direction by several strengths: a file for each, strips, and a contact sheet."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ldm_vae import provenance
from ldm_vae.applications.directions.fitting import Direction, check_continuous, load_directions, pool, posterior_means
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.config import plain_settings
from ldm_vae.data import transforms
from ldm_vae.data.decoding import ImageRejected, read_image
from ldm_vae.data.folder import find_pictures
from ldm_vae.data.image_input import mask_batch, report_mask
from ldm_vae.data.samples import Enlarged, Rejected, crop_image, enlarged_record, enlarged_sentences
from ldm_vae.data.transforms import pad_to_multiple
from ldm_vae.errors import UserError
from ldm_vae.files import system_errors_explained, write_png
from ldm_vae.latents.inspect import choose
from ldm_vae.runtime import compute_device
from ldm_vae.storage import open_folder
from ldm_vae.utils.image_grid import PAPER, labeled_sheet, side_by_side
from ldm_vae.utils.progress import begin, beside, end, end_dry_run, say, track
from ldm_vae.utils.text import duration_text, pluralize

SHEET_IMAGES = 24
CELL = 192
LARGEST_STRENGTH = 20.0
STORED_SAMPLES = 8


@dataclass(frozen=True)
class ApplyDirectionConfig:
    """`ldm-vae directions apply`.

    Writes every strength as a picture, a strip for each image and one contact sheet. Images keep their size. A mask or
    a box limits the edit, softly at its edge.

      ldm-vae directions apply runs/directions brightness holiday.jpg autoencoder=runs/mine output=brighter
      ldm-vae directions apply runs/directions cat/probe portraits/ autoencoder=runs/mine strengths=-3,0,3 output=cats
      ldm-vae directions apply runs/directions red_green room.jpg autoencoder=runs/mine mask=sofa.png output=red
      ldm-vae directions apply runs/directions pca/1 latents=runs/latents samples=3,17 autoencoder=runs/vae output=pca

    Args:
        directions: the folder that `directions fit` wrote.
        direction: the name of a direction, or of an attribute, which stands for its difference of means.
        images: image files and folders.
        autoencoder: an autoencoder with the encoder of the fit.
        output: the folder for the pictures.
        strengths: strengths of the edits, in standard deviations of the pooled latents along the direction; 0 is the
            reconstruction.
        mask: file of a picture, white where the image may change; null: everywhere.
        box: left, top, right, bottom in pixels instead; null: everywhere.
        feather: softness of the mask's edge, as the standard deviation of a Gaussian in latent positions; null: 1.
        size: side in pixels to which images are scaled and cropped; null: their own size.
        latents: the folder of a finished set, or its URL, instead of images.
        samples: numbers of samples of the set; `[]`: 8 of them.
        device: auto, cpu, cuda, cuda:1 ...
    """

    directions: str = "???"
    direction: str = "???"
    images: list[str] = field(default_factory=list)
    autoencoder: str = "???"
    output: str = "???"
    strengths: list[float] = field(default_factory=lambda: [-2.0, -1.0, 0.0, 1.0, 2.0])
    mask: str | None = None
    box: list[int] | None = None
    feather: float | None = None
    size: int | None = None
    latents: str | None = None
    samples: list[int] = field(default_factory=list)
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.images and self.latents is not None:
            raise UserError("latents: and images say both what is moved; give one of them")
        if self.latents is not None and (self.mask is not None or self.size is not None):
            raise UserError("latents: there are no pictures to mask by a file or to crop; give box, or images")
        if self.samples and self.latents is None:
            raise UserError("samples: has no effect without latents; leave it out")
        if self.box is not None and len(self.box) != 4:
            raise UserError(f"box: {self.box} are not four numbers; give left,top,right,bottom in pixels, as 8,8,64,64")
        if not self.strengths or not all(math.isfinite(s) and abs(s) <= LARGEST_STRENGTH for s in self.strengths):
            raise UserError(
                f"strengths: {list(self.strengths)} are not numbers up to {LARGEST_STRENGTH:g}; try -2,-1,0,1,2"
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


def apply_direction(config: ApplyDirectionConfig, *, overwrite: bool = False, dry_run: bool = False) -> list[Path]:
    """Write NAME_+1.00.png for each strength, NAME_strip.png, and sheet.png of the first 24 pictures.

    Args:
        overwrite: write into a folder that holds something.
        dry_run: open everything and look at the output only.

    Returns:
        The strips. A picture that cannot be read is named and left out.

    Raises:
        UserError: an unknown direction, another autoencoder, a mask that does not fit, or an output that is not empty.
    """
    config = plain_settings(config)
    started = time.time()
    if not config.images and config.latents is None:
        raise UserError("images: missing; give image files or folders, or latents")
    found = load_directions(config.directions)
    direction = found.find(config.direction)
    autoencoder = load_autoencoder(config.autoencoder).to(compute_device(config.device))
    check_continuous(autoencoder, f"autoencoder {config.autoencoder}")
    found.check_autoencoder(autoencoder, f"autoencoder {config.autoencoder}")
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file; give a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder}: is not empty; give another output, or --overwrite")
    painted = None if config.mask is None else mask_batch(config.mask, "mask")
    if painted is not None:
        report_mask(painted > 0)
    rejected, enlarged = Rejected(), Enlarged()
    pictures = _stored(config, autoencoder) if config.latents else _encoded(config, autoencoder, rejected, enlarged)
    what = (
        f"{pluralize(len(find_pictures(config.images)), 'picture')}"
        if config.images
        else f"samples of {config.latents}"
    )
    count, edit = len(config.strengths), Edit(config, direction, autoencoder, painted)
    steps = f"{pluralize(count, 'strength')} of {direction.name}"
    begin("directions apply", what, steps, config.autoencoder, str(autoencoder.device), f"to {folder}")
    if dry_run:
        end_dry_run(folder, edit.expected(pictures))
        return []
    with (
        open_folder(folder).lock(provenance.RUN_LOCK),
        system_errors_explained(folder, "free some space and try again"),
    ):
        strips, cells = edit.write(pictures, folder)
        if not strips:
            raise UserError(f"{config.images[0]}: no image could be decoded ({rejected[0][1]}); give other files")
        side = max(cells[0].size)
        captions = [f"{strength:+g}" for strength in config.strengths] * (len(cells) // count)
        squares = [ImageOps.pad(cell, (side, side), color=PAPER) for cell in cells]
        write_png(folder / "sheet.png", labeled_sheet(squares, captions, CELL, count))
        provenance.write_run_record(
            folder, None, started, time.time() - started,
            images=len(strips), direction=direction.name, strengths=list(config.strengths), **enlarged_record(enlarged),
        )  # fmt: skip
    for name, reason in rejected:
        say(f"{name}: left out ({reason})")
    for line in enlarged_sentences([side for _, side in enlarged], len(strips)):
        say(line)
    made = f"{pluralize(len(strips), 'picture')} at {pluralize(count, 'strength')}, their strips, and sheet.png"
    end(folder, made, _next_words(config))
    return strips


def _next_words(config: ApplyDirectionConfig) -> list[str]:
    """The words that move the same pictures twice as far."""
    words = ["ldm-vae", "directions", "apply", config.directions, config.direction, *config.images]
    words.append(f"autoencoder={config.autoencoder}")
    for key, value in (("latents", config.latents), ("mask", config.mask), ("resolution", config.size)):
        words += [f"{key}={value}"] if value is not None else []
    words += [f"feather={config.feather}"] if config.feather is not None else []
    for key, numbers in (("samples", config.samples), ("box", config.box)):
        words += [f"{key}={','.join(map(str, numbers))}"] if numbers else []
    farther = [max(-LARGEST_STRENGTH, min(LARGEST_STRENGTH, 2 * one)) for one in config.strengths]
    return [
        *words,
        f"strengths={','.join(f'{one:g}' for one in farther)}",
        f"output={beside(config.output, 'farther')}",
    ]


@dataclass(frozen=True)
class Edit:
    """What is done to every picture. `painted`: the mask (1, 1, h, w), where there is one."""

    config: ApplyDirectionConfig
    direction: Direction
    autoencoder: Autoencoder
    painted: Tensor | None

    def pictures(self, latent: Tensor, size: tuple[int, int]) -> list[Image.Image]:
        """The picture (height, width) of a latent (1, c, h, w), moved by each strength."""
        height, width = size
        mask = place_mask(self.config, self.painted, height, width, self.autoencoder.downsampling)
        moved = edited(latent, self.direction.vector, self.config.strengths, mask)
        decoded = [self.autoencoder.decode_images(one[None]).cpu() for one in moved]
        return transforms.to_pil(torch.cat(decoded)[..., :height, :width])

    def write(self, pictures: Iterable[Encoded], folder: Path) -> tuple[list[Path], list[Image.Image]]:
        """A picture for each strength and a strip of them. Returns: the strips, and the first cells of the sheet."""
        strips, cells = list[Path](), list[Image.Image]()
        for name, latent, size in track(pictures, "directions apply", "picture"):
            row = self.pictures(latent, size)
            for strength, picture in zip(self.config.strengths, row):
                write_png(folder / f"{name}_{file_mark(strength)}.png", picture)
            strips.append(folder / f"{name}_strip.png")
            write_png(strips[-1], side_by_side(row))
            if len(strips) <= SHEET_IMAGES:
                cells += row
        return strips, cells

    def expected(self, pictures: Iterable[Encoded]) -> str:
        """How long all pictures take, in words, from the first. Raises: UserError where there is none."""
        config, started = self.config, time.monotonic()
        for _, latent, size in pictures:
            self.pictures(latent, size)
            count = len(find_pictures(config.images)) if config.images else len(config.samples) or STORED_SAMPLES
            return f"about {duration_text(count * (time.monotonic() - started))}"
        raise UserError(f"{config.images[0]}: no image could be decoded; give other files")


def file_mark(strength: float) -> str:
    """`+1.00`."""
    return f"{strength + 0.0:+.2f}"


Encoded = tuple[str, Tensor, tuple[int, int]]
"""Name, latent (1, c, h, w), height and width of the image in pixels."""


def _encoded(
    config: ApplyDirectionConfig, autoencoder: Autoencoder, rejected: Rejected, enlarged: Enlarged
) -> Iterator[Encoded]:
    for name, path in find_pictures(config.images):
        try:
            image = read_image(path)
        except ImageRejected as error:
            rejected.append((str(path), str(error)))
            continue
        if config.size is not None:
            image = crop_image(image, config.size, name, enlarged).pixels
        latent, _ = autoencoder.encode_moments(transforms.to_batch(image).to(autoencoder.device))
        pool(latent, name)  # refuses what is not finite
        yield name, latent, (image.shape[0], image.shape[1])


def _stored(config: ApplyDirectionConfig, autoencoder: Autoencoder) -> Iterator[Encoded]:
    dataset = posterior_means(str(config.latents), autoencoder)
    factor = autoencoder.downsampling
    for number in choose(dataset.manifest, STORED_SAMPLES, config.samples):
        latent = dataset[number]["latent"][None].to(autoencoder.device)
        pool(latent, dataset.id(number))
        yield f"{number:06d}", latent, (latent.shape[-2] * factor, latent.shape[-1] * factor)


def place_mask(
    config: ApplyDirectionConfig, painted: Tensor | None, height: int, width: int, factor: int
) -> Tensor | None:
    """`painted`, a mask (1, 1, height, width), or the box of the settings, at latent resolution (1, 1, h, w).

    None without either. Raises: UserError for a mask of another size than the image.
    """
    feather = 1.0 if config.feather is None else config.feather
    if config.box is not None:
        return latent_mask(box_mask(config.box, height, width), factor, feather)
    if painted is None:
        return None
    if painted.shape[-2:] != (height, width):
        raise UserError(
            f"mask: {painted.shape[-2]} x {painted.shape[-1]} pixels (height x width) for an image of {height} x "
            f"{width}; give one of the same size, or size with a mask of it"
        )
    return latent_mask(painted, factor, feather)


# Moving latents along a direction, everywhere or where a mask says; pure functions of tensors.


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


def box_mask(box: Sequence[int], height: int, width: int) -> Tensor:
    """(1, 1, height, width), 1 inside left, top, right, bottom (the last two not included).

    Raises:
        UserError: the box is empty or not inside the image.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise UserError(
            f"box: {left},{top},{right},{bottom} is not a box inside an image of {width} x {height} pixels; give "
            "left,top,right,bottom"
        )
    mask = torch.zeros(1, 1, height, width)
    mask[..., top:bottom, left:right] = 1
    return mask
