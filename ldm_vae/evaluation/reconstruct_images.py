"""Reconstruct pictures of any size from files and folders; keeps names and sizes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm_vae import provenance
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.data import transforms
from ldm_vae.data.decoding import ImageRejected, decode_image
from ldm_vae.data.folder import FolderSource, printable
from ldm_vae.data.transforms import resize_center_crop
from ldm_vae.errors import UserError
from ldm_vae.evaluation.metrics import psnr
from ldm_vae.random import generator
from ldm_vae.runtime import compute_device
from ldm_vae.utils.image_grid import side_by_side


def reconstruct_pictures(
    autoencoder: str,
    inputs: Sequence[str],
    output: str,
    *,
    size: int | None = None,
    sample: bool = False,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> tuple[list[Path], list[tuple[str, str]]]:
    """Write NAME.png and NAME_beside.png for every picture, and `run.json`.

    Args:
        inputs: image files and folders; a folder is searched recursively and its structure is kept.
        size: center crop to size x size; None keeps the original size, whatever it is.
        sample: decode a posterior sample, drawn by (seed, name), instead of the mean.

    Returns:
        The reconstructions written, and (name, reason) of the images that could not be decoded.

    Raises:
        UserError: a missing file or folder, an `output` that is not empty and not `overwrite`, no image.
    """
    from tqdm import tqdm

    started = time.time()
    files = find_pictures(inputs)
    target = compute_device(device)
    model = load_autoencoder(autoencoder).to(target)
    folder = Path(output)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder}: is not empty; give another --out, or --overwrite")
    written: list[Path] = []
    rejected: list[tuple[str, str]] = []
    quality: list[float] = []
    for name, path in tqdm(files, desc="reconstructing", unit="image", dynamic_ncols=True):
        try:
            image = decode_image(path.read_bytes())
        except ImageRejected as error:
            rejected.append((str(path), str(error)))
            continue
        if size is not None:
            image = resize_center_crop(image, size)
        original = transforms.from_uint8(torch.from_numpy(image.copy()).permute(2, 0, 1)[None]).to(target)
        noise = generator(seed, "reconstruct", name, device=target) if sample else None
        decoded = transforms.from_uint8(transforms.to_uint8(model.reconstruct(original, noise)))
        quality.append(float(psnr(decoded, original)))
        written.append(folder / f"{name}.png")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        picture = transforms.to_pil(decoded.cpu())[0]
        picture.save(written[-1])
        side_by_side([Image.fromarray(image), picture]).save(folder / f"{name}_beside.png")
    if not written:
        raise UserError(f"{inputs[0]}: no image could be decoded ({rejected[0][1]}); give other files")
    figures: dict[str, Any] = {"images": len(written), "mean_psnr_db": round(float(np.mean(quality)), 3)}
    provenance.write_run_record(folder, None, started, time.time() - started, **figures)
    return written, rejected


def find_pictures(inputs: Sequence[str]) -> list[tuple[str, Path]]:
    """(output name without suffix, file) for files and folders. Equal names get the suffix, then a number."""
    found: list[tuple[str, Path]] = []
    taken: set[str] = set()
    for path, relative in _files(inputs):
        name = relative.with_suffix("").as_posix()
        candidates = [name, f"{name}-{relative.suffix.removeprefix('.')}"]
        candidates += [f"{name}-{number}" for number in range(2, len(taken) + 3)]
        name = next(word for word in candidates if not taken & {word, f"{word}_beside"})
        taken |= {name, f"{name}_beside"}
        found.append((name, path))
    return found


def _files(inputs: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            source = FolderSource(path)
            for index, name in enumerate(source.names):
                yield path / name, Path(source.id(index))
        elif path.is_file():
            yield path, Path(printable(path.name))
        else:
            raise UserError(f"{text}: no such file or folder; give image files or folders")
