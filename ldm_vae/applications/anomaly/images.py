"""Images on their way to the scores: batches of crops, what is known of labeled images, and heat maps as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.applications.anomaly.scores import STRIDE
from ldm_vae.data import open_source, transforms
from ldm_vae.data.decoding import ImageRejected, read_mask
from ldm_vae.data.image_input import mask_values, report_mask
from ldm_vae.data.samples import Crop, crop_image
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.synthetic.render import DEFECTS
from ldm_vae.data.synthetic.source import SyntheticSource
from ldm_vae.errors import UserError
from ldm_vae.evaluation.pages import Picture, embed_image
from ldm_vae.files import checksum_bytes
from ldm_vae.utils.progress import track


def crop_batches(crops: Iterator[Crop], size: int, total: int, task: str) -> Iterator[list[Crop]]:
    """Lists of up to `size` crops, with a progress bar of `total` images."""
    waiting: list[Crop] = []
    for crop in track(crops, task, total=total):
        waiting.append(crop)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def stack(crops: Sequence[Crop]) -> Tensor:
    """(n, 3, h, w) in [-1, 1]."""
    return transforms.from_uint8(torch.from_numpy(np.stack([crop.pixels for crop in crops])).permute(0, 3, 1, 2))


def mark(crop: Crop) -> int:
    """A number that is the same for equal pixels, int64."""
    return int(checksum_bytes(crop.pixels.tobytes()).split(":")[1][:16], 16) - 2**63


def refuse_enlarged(crops: Sequence[Crop], resolution: int) -> None:
    """Raises: UserError for pictures of mixed size, some of which would be recognized by their blur."""
    small = next((crop for crop in crops if crop.enlarged), None)
    if small is not None:
        raise UserError(
            f"resolution: {small.id} has a short side of {small.short_side} pixels, fewer than {resolution}, and "
            f"enlarging blurs it, which every score shows; set resolution to {small.short_side} or less, or leave such "
            "images out"
        )


# Labeled images: normal or not, which kind of anomaly, and where.

NORMAL = "normal"


@dataclass(frozen=True)
class LabeledImages:
    """Images of which it is known whether and where they are anomalous.

    Args:
        kinds: of each image: "normal", or the name of its anomaly.
        masks: a folder of masks, or None.
    """

    source: ImageSource
    kinds: tuple[str, ...]
    masks: Path | None = None

    @property
    def has_masks(self) -> bool:
        return self.masks is not None or isinstance(self.source, SyntheticSource)

    def mask(self, index: int, resolution: int) -> np.ndarray | None:
        """bool (resolution, resolution), cropped as its image is; None where it is not known.

        Raises:
            UserError: naming the mask, when it cannot be read or has not the size of its image.
        """
        if self.kinds[index] == NORMAL:
            return np.zeros((resolution, resolution), bool) if self.has_masks else None
        if isinstance(self.source, SyntheticSource):
            found = self.source.defect_mask(index)
        elif self.masks is not None:
            found = _read_mask(self.masks, self.source.id(index), self.source.read(index).shape[:2])
        else:
            return None
        gray = np.repeat(found[..., None].astype(np.uint8) * 255, 3, axis=2)
        return crop_image(gray, resolution, self.source.id(index), []).pixels[..., 0] > 127


def open_labeled(data: DataConfig, normal: list[str], masks: str | None) -> LabeledImages:
    """Open the images and find out which are normal.

    Args:
        normal: labels of the normal images; none for the synthetic set, where those without a defect are.

    Raises:
        UserError: nothing says which images are normal, or all are of one class.
    """
    if data.source == "synthetic":
        if normal or masks is not None:
            raise UserError("normal: the synthetic set knows its defects; leave normal and masks out")
        source: ImageSource = SyntheticSource(data.synthetic)
        kinds = tuple(DEFECTS[source.scene(i).defect] for i in range(len(source)))  # type: ignore[attr-defined]
        kinds = tuple(NORMAL if kind == DEFECTS[0] else kind for kind in kinds)
        advice = "set data.synthetic.defects=0.5"
    else:
        source = open_source(data)
        if not normal:
            raise UserError(
                f"normal: missing; give the labels of the normal images, of {', '.join(source.label_names) or 'none'}"
            )
        if unknown := sorted(set(normal) - set(source.label_names)):
            raise UserError(
                f"normal: no image has the label {unknown[0]!r}; there are: {', '.join(source.label_names) or 'none'}"
            )
        names = [
            source.label_names[source.label(i)] if source.label(i) >= 0 else "unlabelled" for i in range(len(source))
        ]
        kinds = tuple(NORMAL if name in normal else name for name in names)
        advice = "add the others"
    counts = [kinds.count(NORMAL), len(kinds) - kinds.count(NORMAL)]
    if min(counts) == 0:
        raise UserError(
            f"data: all {len(kinds)} images are {'normal' if counts[0] else 'anomalous'}, and an evaluation compares "
            f"both; {advice}"
        )
    folder = None if masks is None else Path(masks)
    if folder is not None and not folder.is_dir():
        raise UserError(f"masks: {folder}: no such folder; give the folder with a mask for each anomalous image")
    return LabeledImages(source, kinds, folder)


def mask_cells(mask: np.ndarray) -> np.ndarray:
    """A mask on the grid of the heat maps: a cell counts when any of its pixels does."""
    side = len(mask) // STRIDE
    blocks = mask[: side * STRIDE, : side * STRIDE].reshape(side, STRIDE, side, STRIDE)
    return np.asarray(blocks.any(axis=(1, 3)))


def _read_mask(folder: Path, id: str, size: tuple[int, ...]) -> np.ndarray:
    """bool (h, w) of `FOLDER/ID.png` or, as in MVTec AD, `FOLDER/ID_mask.png`; the suffix of the image left out."""
    stem = PurePosixPath(id).with_suffix("")
    path = next((p for end in ("", "_mask") if (p := folder / f"{stem}{end}.png").is_file()), folder / f"{stem}.png")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"masks: {path} lies outside of {folder}; give images whose names stay in their folder")
    try:
        mask = mask_values(read_mask(path), f"masks: {path}")
    except ImageRejected as error:
        raise UserError(f"masks: {path}: {error}; give a PNG, white where the anomaly is") from error
    if mask.shape != tuple(size):
        found, expected = ("x".join(map(str, shape)) for shape in (mask.shape[::-1], size[::-1]))
        raise UserError(f"masks: {path} is {found}, its image {expected} pixels; give masks of the images' sizes")
    marked = mask > 0.5
    report_mask(torch.from_numpy(marked)[None, None], f"masks: {path}")
    return marked


# Heat maps as pictures: from dark to bright over a fixed range, so that pictures of different images compare.

COLOR_MAP = "inferno"
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
    pixels = (255 * colormaps[COLOR_MAP](large)[..., :3]).round().astype(np.uint8)
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
