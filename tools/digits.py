"""Write hand-written digits as one parquet file of 32 x 32 PNG pictures: images for `train-vae` and `explore`.

    python -m tools.digits mnist digits.parquet
    python -m tools.digits mnist digits-test.parquet --part test
    python -m tools.digits sklearn digits.parquet
    python -m tools.digits mnist checkpoints/digits-vae-2d --part test --count 2000

SOURCE is a folder with MNIST's idx files, packed (.gz) or not, or the word `sklearn`: scikit-learn's bundled 1,797
digits of 8 x 8 pixels, enlarged. Pictures are gray, white on black, 28 x 28 with two black pixels around. They are read
with `data.source=datasets data.datasets.name=digits.parquet data.datasets.label_column=label`. Where OUTPUT is the
directory of an autoencoder, the digits go into it as explorer.safetensors, what `explore` shows.
"""

from __future__ import annotations

import argparse
import gzip
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_vae.errors import UserError
from ldm_vae.files import write_atomically

FILES = {"train": "train", "test": "t10k"}
SIDE, INNER_SIDE = 32, 28
LABELS = tuple("0123456789")
MOST_IMAGES = 1_000_000
IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801  # idx: unsigned bytes in three dimensions, in one


def read_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (n, h, w) and labels (n,) of a folder of idx files. Raises: UserError."""
    images = read_idx(folder, f"{FILES[part]}-images-idx3-ubyte", IMAGES_MAGIC)
    labels = read_idx(folder, f"{FILES[part]}-labels-idx1-ubyte", LABELS_MAGIC)
    if max(images.shape[1:]) > SIDE:
        raise UserError(f"{folder}: its images are of {images.shape[1:]} pixels, more than {SIDE} x {SIDE}")
    if len(images) != len(labels) or not len(images):
        raise UserError(f"{folder}: has {len(images)} images and {len(labels)} labels; fetch the files again")
    if labels.max() >= len(LABELS):
        raise UserError(f"{folder}: has a label {labels.max()}, which is not a digit; give the files of MNIST")
    return images, labels


def read_idx(folder: Path, name: str, magic: int) -> np.ndarray:
    """The array of an idx file of unsigned bytes, NAME or NAME.gz. Raises: UserError.

    No more is unpacked than its header announces, and the header is judged first.
    """
    path = folder / name
    packed = path.with_name(f"{name}.gz")
    if not path.is_file() and not packed.is_file():
        raise UserError(f"{path}: no such file, and no {packed.name}; give a folder with the idx files of MNIST")
    path = path if path.is_file() else packed
    dimensions = magic & 0xFF
    try:
        with gzip.open(path, "rb") if path == packed else path.open("rb") as file:
            start = file.read(4 + 4 * dimensions)
            header = np.frombuffer(start, ">u4", len(start) // 4)
            if len(header) != 1 + dimensions or header[0] != magic:
                raise UserError(f"{path}: is not an idx file of {dimensions} dimensions; fetch it again")
            shape = tuple(int(length) for length in header[1:])
            if shape[0] > MOST_IMAGES or any(length > SIDE for length in shape[1:]):
                raise UserError(f"{path}: announces {shape} bytes, more than {MOST_IMAGES} x {SIDE} x {SIDE}")
            size_bytes = int(np.prod(shape))
            content = file.read(size_bytes + 1)
    except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from error
    if len(content) != size_bytes:
        raise UserError(f"{path}: does not hold the {size_bytes} bytes that it announces; fetch it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_sklearn() -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (1797, 28, 28) and labels (1797,). Raises: UserError where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("sklearn: is not installed; pip install scikit-learn, or give a folder of MNIST") from error
    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    size = (INNER_SIDE, INNER_SIDE)
    images = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in small]
    return np.stack(images), digits.target.astype(np.uint8)


def padded(images: np.ndarray) -> np.ndarray:
    """(n, h, w) -> (n, 32, 32), black around."""
    rows, columns = (SIDE - images.shape[1], SIDE - images.shape[2])
    around = ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2))
    return np.pad(images, around)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Columns `image` (PNG) and `label` (a class, named by its digit)."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    columns: dict[str, Any] = {
        "image": [{"bytes": png(image), "path": None} for image in padded(images)],
        "label": labels.tolist(),
    }
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(LABELS))})
    dataset = Dataset.from_dict(columns, features=features)
    write_atomically(path, lambda temporary: dataset.to_parquet(str(temporary)))


def travel_with(folder: Path, images: np.ndarray, labels: np.ndarray, origin: str) -> None:
    """Put the digits into the directory of an autoencoder. Raises: UserError when it is none."""
    import torch

    from ldm_vae.applications.explorer.explored import Bundled, write_bundled

    pictures, numbers = torch.from_numpy(padded(images)), torch.from_numpy(labels.astype(np.int64))
    write_bundled(folder, Bundled(pictures, numbers, LABELS, origin))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a folder with the idx files of MNIST, or: sklearn")
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, help="a new .parquet file, or an autoencoder's directory"
    )
    parser.add_argument("--part", choices=tuple(FILES), default="train", help="of MNIST (default train)")
    parser.add_argument("--count", type=int, metavar="N", help="only the first N (default all)")
    given = parser.parse_args(arguments)
    try:
        if given.output.suffix != ".parquet" and not given.output.is_dir():
            raise UserError(f"{given.output}: neither ends in .parquet nor is a directory of an autoencoder; rename it")
        if given.output.is_file():
            raise UserError(f"{given.output}: exists; name a new file, or remove it")
        if given.count is not None and given.count < 1:
            raise UserError(f"--count: {given.count} is not above 0; leave it out for all digits")
        if given.source == "sklearn" and given.part != "train":
            raise UserError(
                "--part: scikit-learn's digits have one part only; leave it out, data.held_out divides them"
            )
        images, labels = read_sklearn() if given.source == "sklearn" else read_mnist(Path(given.source), given.part)
        images, labels = images[: given.count], labels[: given.count]
        if given.output.is_dir():
            name = "scikit-learn's digits" if given.source == "sklearn" else f"MNIST, {given.part} part"
            travel_with(given.output, images, labels, name)
        else:
            write_parquet(given.output, images, labels)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given.output}: {len(images)} digits of {SIDE} x {SIDE} pixels")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
