"""What the folders and files that settings name must be. The command line checks it before a model library is imported.

`PLACES` says for each setting what it names. The loaders check the same `PathKind`, so that a mistake gets the same
sentence from Python and from the command line: where; what is there instead; what to give.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm_vae.errors import UserError
from ldm_vae.files import system_errors_explained
from ldm_vae.redaction import check_no_password
from ldm_vae.storage.base import is_url, local_path

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
LOOKED_AT = 1000
"""Entries of a folder that are looked at to say what it holds."""


LATENT_SET = "a set of latents"


@dataclass(frozen=True)
class PathKind:
    """What a setting names.

    Attributes:
        advice: what to give instead of something else.
        marker: the file that such a folder holds; empty: any folder.
        inside: the folder of a run that may hold it, as `autoencoder`.
        file: a file rather than a folder; `either`: one or the other.
        hub: a name of the Hugging Face hub (OWNER/NAME) is possible.
        url: a URL that fsspec knows is possible.
        refused: a folder that `what_is` knows as another kind is refused.
    """

    advice: str
    marker: str = ""
    inside: str = ""
    file: bool = False
    either: bool = False
    hub: bool = False
    url: bool = False
    refused: bool = False

    def find(self, path: str | Path, where: str = "") -> Path | None:
        """The folder or file, of a run the folder inside it; None for what is not on this machine.

        Args:
            where: what the sentence begins with before the path, as `detector`.

        Raises:
            UserError: it is not there, or is something else.
        """
        if (self.url and is_url(path)) or (self.hub and could_be_on_the_hub(path)):
            return None
        start = f"{where}: {path}" if where else path
        found = local_path(path)
        if not found.exists():
            kind = "file or folder" if self.either else "file" if self.file else "folder"
            raise UserError(start, f"no such {kind}", self.advice)
        if self.either:
            return found
        if self.file != found.is_file():
            what = "is a folder" if found.is_dir() else f"is a file{_kind_of_file(found)}"
            raise UserError(start, what, self.advice)
        if not self.marker:
            kind = what_is(found) if self.refused else ""
            if kind and kind != LATENT_SET:
                raise UserError(start, f"is {kind}", self.advice)
            return found
        for folder in (found, found / self.inside):
            if (folder / self.marker).is_file():
                return folder
        kind = what_is(found)
        raise UserError(start, f"is {kind}" if kind else f"holds no {self.marker}", self.advice)


AUTOENCODER = PathKind(
    "give a finished run of `ldm-vae train-vae`, the folder of an autoencoder, or a hub id",
    "config.json", "autoencoder", hub=True,
)  # fmt: skip
PIPELINE = PathKind(
    "give a finished run of `ldm-vae train-diffusion`, or the folder of a pipeline", "model_index.json", "pipeline"
)
MODEL = PathKind("give a finished run, the folder of a model, a checkpoint file, or a hub id", either=True, hub=True)
LATENTS = PathKind("give the folder that `ldm-vae encode` wrote", url=True, refused=True)
IMAGES = PathKind("give the folder that holds the images", url=True)
PICTURES_OR_FOLDERS = PathKind("give image files or folders", either=True)
PICTURE = PathKind("give the file of an image", file=True)
DETECTOR = PathKind("give the folder that `ldm-vae anomaly fit` wrote", "detector.json")
DIRECTIONS = PathKind("give the folder that `ldm-vae directions fit` wrote", "directions.json", "directions")
COMPRESSED = PathKind("give files that `ldm-vae compress` wrote, or their folder", either=True)
ENTROPY = PathKind("give a file that `ldm-vae codec fit` wrote", file=True)
RUN = PathKind("give the folder that holds vae, latents, diffusion ...")
FOLDER = PathKind("give an existing folder")
FILE = PathKind("give an existing file", file=True)

PLACES: dict[str, PathKind] = {
    "autoencoder": AUTOENCODER, "baseline": AUTOENCODER, "compare": AUTOENCODER, "initial": AUTOENCODER,
    "pipeline": PIPELINE, "model": MODEL, "generate model": PIPELINE, "model ema model": PIPELINE,
    "latents": LATENTS, "neighbours": LATENTS, "data.path": IMAGES, "kid.data.path": IMAGES,
    "images": PICTURES_OR_FOLDERS, "model ema images": IMAGES, "files": COMPRESSED, "init": PICTURE, "mask": PICTURE,
    "detector": DETECTOR, "directions": DIRECTIONS, "entropy": ENTROPY, "run": RUN, "source": FOLDER, "masks": FOLDER,
    "evaluation": FOLDER, "health": FOLDER, "pictures": FOLDER,
    "vae": FILE, "perceptual_weights": FILE, "inception_weights": FILE, "latents import labels": FILE,
    "config": FILE, "seen": FILE,
}  # fmt: skip
"""The config's own key, or command and key where a command means something else by it, -> what it names."""

OUTPUTS = ("output", "report", "export")
"""Settings that name what is written. `report` and `export` are files."""


def check_places(command: str, values: Mapping[str, Iterable[str]], shown: Mapping[str, str]) -> None:
    """Raises: UserError for a setting that names something that is not there, or a place that cannot be written.

    Args:
        values: the texts of each text setting that was given, by the config's own key.
        shown: the config's own key -> its name on the command line, where that is another one.
    """
    for key, texts in values.items():
        for text in texts:
            check_no_password(text, shown.get(key, key))
    for key, texts in values.items():
        place = PLACES.get(f"{command} {key}", PLACES.get(key))
        name = shown.get(key, key)
        for text in texts:
            if place is not None:
                place.find(text, name)
            elif key in OUTPUTS and not is_url(text):
                path = Path(text).expanduser()
                if path.is_file() and not path.suffix:
                    raise UserError(f"{name}: {path}", "is a file", "give a folder")
                check_writable(path.parent if path.suffix and not path.is_dir() else path)


def check_writable(folder: Path) -> None:
    """Check that files can be made in a folder, or in the existing folder above it; nothing is left there.

    A folder with something in it is not tried: a finished result is read from a read-only disk too.

    Raises:
        UserError: naming what the system objects to.
    """
    with system_errors_explained(folder, "give another output folder"):
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if existing == folder and any(os.scandir(folder)):
            return
        tempfile.TemporaryFile(dir=existing).close()


def could_be_on_the_hub(path: str | Path) -> bool:
    """OWNER/NAME, where no folder OWNER is here."""
    text = str(path)
    owner, slash, name = text.partition("/")
    there = Path(path).exists() or Path(owner).is_dir()
    return bool(owner and slash and name) and "/" not in name and not text.startswith((".", "~")) and not there


KINDS = {
    "plan.json": LATENT_SET,
    "manifest.json": LATENT_SET,
    "model_index.json": "a diffusion pipeline",
    "pipeline/model_index.json": "a run of `train-diffusion`",
    "autoencoder/config.json": "a run of `train-vae`",
    "detector.json": "a detector of `anomaly fit`",
    "directions.json": "a folder of `directions fit`",
    "health.json": "a report of `diagnose`",
    "results.json": "a folder of measurements",
    "config.yaml": "a run that is not finished",
    "config.json": "the folder of one network",
}
"""A file in a folder -> what the folder is."""


def what_is(folder: Path) -> str:
    """What a folder is, in words; empty where it is nothing that this program knows."""
    for marker, kind in KINDS.items():
        if (folder / marker).is_file():
            return kind
    with os.scandir(folder) as entries:
        names = [entry.name for _, entry in zip(range(LOOKED_AT), entries)]
    if any(Path(name).suffix.lower() in PICTURES for name in names):
        return "a folder of images"
    return "empty" if not names else ""


def _kind_of_file(path: Path) -> str:
    suffix = path.suffix.lower()
    return " (an image)" if suffix in PICTURES else " (settings)" if suffix in (".yaml", ".yml") else ""
