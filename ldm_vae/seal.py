"""`MANIFEST.json` of a folder of weights: its format version and a checksum of every file, so that damage is found.

    {"format_version": 1, "files": {"config.json": "xxh3_128:...", "unet/config.json": "xxh3_128:..."}}

Checkpoints, autoencoders and pipelines that this package writes have one. Owns this file; what the others mean is
nobody's business here. Against somebody who means to deceive it is no protection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ldm_vae.errors import UserError
from ldm_vae.files import checksum, readable_json, write_text

MANIFEST = "MANIFEST.json"
FORMAT_VERSION = 1
SEALED = (".json", ".safetensors")
"""Suffixes of the files that are listed; a README may be edited."""
FOREIGN = "does not belong to it"


def seal(folder: Path, others: Mapping[str, str] | None = None) -> None:
    """Write the manifest of a folder, of everything in it at any depth. `others`: files that it will be put among."""
    files = dict(others or {}) | {name: checksum(folder / name) for name in _sealed(folder)}
    manifest = {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))}
    write_text(folder / MANIFEST, readable_json(manifest))


def damage(folder: Path) -> str | None:
    """None when the folder is as it was sealed, else what is wrong.

    Raises:
        UserError: its format is newer than this program, or a file may not be read.
    """
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        version, files = manifest["format_version"], manifest["files"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{folder}: has format version {version}, this program reads {FORMAT_VERSION}; update ldm_vae"
            )
        if version != FORMAT_VERSION or readable_json(manifest) != text:
            return f"{MANIFEST} is damaged"
        there = _sealed(folder)
        folders = {PurePosixPath(), *(PurePosixPath(name).parent for name in files)}
        for name in sorted({*files, *there}):
            if name not in files and PurePosixPath(name).parent not in folders:
                continue  # a folder of somebody else, as of generated images, is read by nobody who reads this one
            if name not in files:
                return f"{name} {FOREIGN}"
            if name not in there:  # nor is a file elsewhere touched
                return f"{name} is missing"
            if checksum(folder / name) != files[name]:
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except UserError:
        raise
    except PermissionError as error:  # it may be whole
        raise UserError(f"{folder}: cannot be read ({error.strerror}); give yourself the right to read it") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None


def check_seal(folder: Path) -> None:
    """For a model, which others write without a seal.

    Raises:
        UserError: a file of a sealed folder is damaged, missing or foreign, or its format is newer than this program.
    """
    if (folder / MANIFEST).exists() and (problem := damage(folder)) is not None:
        advice = "remove that file" if problem.endswith(FOREIGN) else "restore it from a copy or make it again"
        raise UserError(f"{folder}: {problem}; {advice}, or remove {MANIFEST} if it was changed on purpose")


def _sealed(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.suffix in SEALED and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths if path != folder / MANIFEST)
