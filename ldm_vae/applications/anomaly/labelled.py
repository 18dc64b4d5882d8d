"""Images of which it is known what is wrong with them: normal or not, which kind of anomaly, and where.

Of the synthetic set the renderer knows. Of a folder the labels say it (`data.md`), and `masks` holds pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ldm_vae.applications.anomaly.maps import STRIDE
from ldm_vae.data.decoding import ImageRejected, decode_image
from ldm_vae.data.local_file import read_regular_file
from ldm_vae.data.sources import DataConfig, ImageSource, open_source
from ldm_vae.data.synthetic import SyntheticSource
from ldm_vae.data.synthetic.scene import DEFECTS
from ldm_vae.data.transforms import cover_crop
from ldm_vae.errors import UserError

NORMAL = "normal"


@dataclass(frozen=True)
class Truth:
    """What is known of the images of a source.

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
        grey = np.repeat(found[..., None].astype(np.uint8) * 255, 3, axis=2)
        return cover_crop(grey, resolution)[..., 0] > 127


def known_truth(data: DataConfig, normal: list[str], masks: str | None) -> Truth:
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
    return Truth(source, kinds, folder)


def cells(mask: np.ndarray) -> np.ndarray:
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
        pixels = decode_image(read_regular_file(path))
    except ImageRejected as error:
        raise UserError(f"masks: {path}: {error}; give a PNG, white where the anomaly is") from error
    if pixels.shape[:2] != tuple(size):
        found, wanted = ("x".join(map(str, shape)) for shape in (pixels.shape[1::-1], size[::-1]))
        raise UserError(f"masks: {path} is {found}, its image {wanted} pixels; give masks of the images' sizes")
    return pixels[..., 0] > 127
