"""The synthetic set as files: a folder of images that any tool can read, and its known truth beside it.

Owns the layout: `OUT/LABEL/ID.png` and `OUT/attributes.jsonl`; defect masks (white: defect) go to a folder of
their own, `OUT-masks/LABEL/ID.png`, so that OUT holds nothing but images to train on.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ldm_vae.data.synthetic.source import SyntheticConfig, SyntheticSource
from ldm_vae.errors import UserError
from ldm_vae.files import publish_directory, temporary_directory, write_text


def masks_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}-masks")


def write_images(config: SyntheticConfig, out: Path, workers: int = 1, progress: bool = True) -> None:
    """Render every image into a new folder; both folders appear when they are complete, or not at all.

    Raises:
        UserError: A folder to be written exists and is not empty.
    """
    from tqdm import tqdm

    out = Path(out).absolute()
    finals = [out, masks_folder(out)] if config.defects > 0 else [out]
    for folder in finals:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder}: exists and is not empty; give a new folder or remove it first")
    with contextlib.ExitStack() as stack:
        temporaries = [temporary_directory(folder) for folder in finals]
        for folder in temporaries:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            for name in SyntheticSource.label_names:
                (folder / name).mkdir()
        write = partial(_write_one, config, temporaries[0], temporaries[1] if len(finals) > 1 else None)
        rows = tqdm(
            _mapped(write, range(config.count), workers),
            total=config.count, unit="image", desc="rendering", disable=not progress,
        )  # fmt: skip
        lines = [json.dumps(row) for row in rows]
        write_text(temporaries[0] / "attributes.jsonl", "\n".join(lines) + "\n")
        for temporary, final in reversed(list(zip(temporaries, finals))):
            publish_directory(temporary, final)


def _mapped(write: Any, indices: Iterable[int], workers: int) -> Iterator[dict[str, Any]]:
    """The rows in order, from this process or from `workers` others."""
    if workers <= 1:
        yield from map(write, indices)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(write, indices, chunksize=4)


def _write_one(config: SyntheticConfig, images: Path, masks: Path | None, index: int) -> dict[str, Any]:
    from PIL import Image

    source = SyntheticSource(config)
    pixels, mask = source.render(index)
    identity, label = source.id(index), source.label_names[source.label(index)]
    Image.fromarray(pixels).save(images / label / f"{identity}.png", compress_level=4)
    attributes = source.attributes(index)
    if masks is not None and attributes["defect"]:
        Image.fromarray(mask).save(masks / label / f"{identity}.png")
    return {"file": f"{label}/{identity}.png", "id": identity, "label": label, **attributes}
