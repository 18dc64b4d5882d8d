"""A tar file for `webdataset`: for each sample `KEY.moments.npy` (one for each tensor), `KEY.cls`, `KEY.json`.

KEY is the source index: ids may hold dots and slashes, which webdataset takes for something else; they are in the JSON.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_vae.files import canonical_json
from ldm_vae.latents.format import Layout

if TYPE_CHECKING:
    from ldm_vae.latents.export import Block


def file_names(count: int) -> list[str]:
    return [f"{number:06d}.tar" for number in range(count)]


def write(blocks: Iterable[Block], layout: Layout, label_names: Sequence[str]) -> bytes:
    """A tar file; equal samples give equal bytes: members carry no time and no owner."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for block in blocks:
            for row in range(len(block)):
                for name, data in members(block, row, label_names):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def members(block: Block, row: int, label_names: Sequence[str]) -> list[tuple[str, bytes]]:
    """(name, bytes) of the files of one sample, sorted by name."""
    index, label = int(block.indices[row]), int(block.labels[row])
    facts: dict[str, Any] = {"id": block.ids[row], "index": index, "label": label}
    if 0 <= label < len(label_names):
        facts["label_name"] = label_names[label]
    found = {"cls": str(label).encode(), "json": canonical_json(facts).encode()}
    for name, values in block.tensors.items():
        array = io.BytesIO()
        np.save(array, values[row], allow_pickle=False)
        found[f"{name}.npy"] = array.getvalue()
    return [(f"{index:012d}.{name}", found[name]) for name in sorted(found)]
