"""A directions file: `directions.safetensors` and `directions.json` in a sealed folder, bound to its encoder.

Directions hold for every autoencoder with the same encoder, as latents do. Owns the format and what it refuses.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ldm_vae.applications.directions.fitting import Direction
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.errors import UserError
from ldm_vae.files import checksum_bytes, publish_directory, temporary_directory, write_json
from ldm_vae.latents.manifest import short
from ldm_vae.seal import check_seal, seal
from ldm_vae.tensor_files import MAXIMUM_JSON_BYTES, check_tensor_file

FORMAT_VERSION = 1
FOLDER = "directions"
"""Inside the result folder of `directions fit`, whose `run.json` is nobody's to seal."""
TENSORS, DESCRIPTION = "directions.safetensors", "directions.json"


@dataclass(frozen=True)
class Directions:
    """What `directions fit` found.

    Attributes:
        images: what it was fitted on, see `samples.Samples`.
        left_out: attribute -> why no direction was fitted to it.
        digest: of their files, where they were read from some.
    """

    directions: list[Direction]
    encoder_fingerprint: str
    images: dict[str, Any]
    left_out: dict[str, str]
    digest: str | None = None

    def find(self, name: str) -> Direction:
        """By its whole name, or by its attribute (then the difference of the means). Raises: UserError."""
        for wanted in (name, f"{name}/difference", f"{name}/1"):
            for direction in self.directions:
                if direction.name == wanted:
                    return direction
        known = [direction.name for direction in self.directions]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known[:12])}"
        raise UserError(f"direction: {name!r} is unknown; {hint}")

    def check_autoencoder(self, autoencoder: Any, where: str) -> None:
        """Raises: UserError for an autoencoder with another encoder."""
        found = encoder_fingerprint(autoencoder)
        if found != self.encoder_fingerprint:
            raise UserError(
                f"{where}: its encoder_fingerprint is {short(found)}, but the directions were fitted to "
                f"{short(self.encoder_fingerprint)}; give that autoencoder, or fit again with this one"
            )


def save_directions(found: Directions, output: Path) -> None:
    """Publish `output/directions`, complete or not at all."""
    temporary = temporary_directory(output / FOLDER)
    vectors = torch.from_numpy(np.stack([direction.vector for direction in found.directions])).float()
    save_file({"vectors": vectors.contiguous()}, temporary / TENSORS)
    description = {
        "format_version": FORMAT_VERSION,
        "encoder_fingerprint": found.encoder_fingerprint,
        "images": found.images,
        "directions": [{"name": d.name, "attribute": d.attribute, "told": d.told} for d in found.directions],
        "left_out": found.left_out,
    }
    write_json(temporary / DESCRIPTION, description)
    seal(temporary)
    publish_directory(temporary, output / FOLDER)


def load_directions(path: str | Path) -> Directions:
    """From the result folder of `directions fit`, or the `directions/` in it.

    Raises:
        UserError: nothing there, damaged, of a newer format, or files that do not fit each other.
    """
    folder = next((f for f in (Path(path), Path(path) / FOLDER) if (f / DESCRIPTION).is_file()), None)
    if folder is None:
        raise UserError(f"{path}: holds no {DESCRIPTION}; give the folder that `ldm-vae directions fit` wrote")
    check_seal(folder)
    try:
        if (folder / DESCRIPTION).stat().st_size > MAXIMUM_JSON_BYTES:
            raise UserError(
                f"{folder}/{DESCRIPTION}: is larger than {MAXIMUM_JSON_BYTES} bytes; this is no description"
            )
        description = json.loads((folder / DESCRIPTION).read_text())
        version = description["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{folder}: has format version {version}, this program reads {FORMAT_VERSION}; update ldm_vae"
            )
        check_tensor_file(folder / TENSORS)
        vectors = load_file(folder / TENSORS)["vectors"].double().numpy()
        found = _described(vectors, description["directions"])
        return Directions(
            found, str(description["encoder_fingerprint"]), dict(description["images"]), dict(description["left_out"]),
            checksum_bytes((folder / DESCRIPTION).read_bytes() + (folder / TENSORS).read_bytes()),
        )  # fmt: skip
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{folder}: is no directions file ({type(error).__name__}: {error}); restore it, or fit again"
        ) from error


def _described(vectors: np.ndarray, rows: Sequence[dict[str, Any]]) -> list[Direction]:
    if vectors.ndim != 2 or len(vectors) != len(rows) or not len(rows) or not np.isfinite(vectors).all():
        raise ValueError(f"vectors of shape {vectors.shape} for {len(rows)} directions")
    return [
        Direction(str(row["name"]), vector, None if row["attribute"] is None else str(row["attribute"]), row["told"])
        for vector, row in zip(vectors, rows)
    ]
