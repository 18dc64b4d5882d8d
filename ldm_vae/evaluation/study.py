"""A folder with a finished measurement of an autoencoder: read it, refuse it, and say what was measured.

Shared by the commands that measure one autoencoder on images; what they measure and write is theirs.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.autoencoder.base import is_deterministic
from ldm_vae.autoencoder.models import check_side, downsampling, latent_channels
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.errors import UserError
from ldm_vae.files import system_errors_explained, vanished
from ldm_vae.storage import open_folder

MAY_CHANGE = ("output", "batch", "device", "processes")
"""Settings that do not change a result."""


def finished_result(file: Path, config: Any, identity: str, overwrite: bool) -> dict[str, Any] | None:
    """The content of `file` if it is the finished result of these settings; None where there is none.

    Args:
        file: the JSON that the command writes, with `config` and `autoencoder.fingerprint`.
        identity: the fingerprint of the autoencoder at hand.

    Raises:
        UserError: the folder holds something else, or a result of other settings or weights and not `overwrite`; or
            there is work to do and no file can be written there.
    """
    output = file.parent
    if not (output / provenance.RUN_RECORD).is_file():
        check_writable(output)
        return None
    if not file.is_file():
        raise UserError(f"{output}: holds another run; give another output")
    if overwrite:
        check_writable(output)
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    changes = configuration.changed_keys(result["config"], configuration.to_dict(config))
    changes = {key: values for key, values in changes.items() if key not in MAY_CHANGE}
    if result["autoencoder"]["fingerprint"] != identity:
        changes["autoencoder fingerprint"] = (result["autoencoder"]["fingerprint"][:15], identity[:15])
    if changes:
        listed = ", ".join(f"{key} ({before} -> {after})" for key, (before, after) in changes.items())
        raise UserError(f"{output}: holds the result of {listed}; give another output, or --overwrite")
    return result


def check_writable(folder: Path) -> None:
    """That files can be made in a folder, or in what it would be made in; nothing is left there.

    Raises:
        UserError: naming what the system objects to.
    """
    with system_errors_explained(folder, "give another output folder"):
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        tempfile.TemporaryFile(dir=existing).close()


def check_made_of(output: str | Path, parts: Mapping[str, tuple[Any, Any]], place: str = "output") -> None:
    """That a finished result was made of what is at hand now, where settings name it by a path that may hold another.

    Args:
        parts: what it would otherwise be the result of ("other images") -> what was recorded, what is at hand.
        place: the setting of the output, for the advice.

    Raises:
        UserError: naming the first that differs.
    """
    for other, (recorded, present) in parts.items():
        if recorded != present:
            raise UserError(f"{output}: holds the result of {other}; give another {place}, or --overwrite")


@contextmanager
def alone_in(output: str | Path) -> Iterator[None]:
    """Nobody else measures into this folder or trains in it. Raises: UserError that names who does."""
    with open_folder(Path(output)).hold(provenance.RUN_LOCK):
        yield


@contextmanager
def publishing(output: str | Path) -> Iterator[None]:
    """Inside, a result is written by who is `alone_in` the folder. `run.json` goes first and comes last: a folder that
    has one is complete, also after a result was to be replaced.

    Raises:
        UserError: the system refuses to write, in one sentence; or the folder has vanished.
    """
    folder = Path(output)
    with system_errors_explained(output, "free some space or make it writable, and run the same command again"):
        if not (folder / provenance.RUN_LOCK).exists():
            raise vanished()
        (folder / provenance.RUN_RECORD).unlink(missing_ok=True)
        yield


def check_resolution(resolution: int, autoencoder: Any, stride: int = 1) -> None:
    """Raises: UserError naming the nearest resolution that the downsampling and `stride` divide, or the only one."""
    check_side("resolution:", resolution, autoencoder)
    factor = math.lcm(downsampling(autoencoder), stride)
    if resolution % factor:
        nearest = max(1, round(resolution / factor)) * factor
        raise UserError(f"resolution: {resolution} is no multiple of {factor}; use {nearest}")


def describe_autoencoder(autoencoder: Any) -> dict[str, Any]:
    """What was measured: identity, class, parameters, channels, downsampling, whether its latents are points."""
    return {
        "fingerprint": fingerprint(autoencoder),
        "class": type(autoencoder).__name__,
        "parameters": sum(parameter.numel() for parameter in autoencoder.parameters()),
        "latent_channels": latent_channels(autoencoder),
        "downsampling": downsampling(autoencoder),
        "deterministic": is_deterministic(autoencoder),
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file. Raises: UserError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is no valid JSON ({error}); restore it, or run its stage again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, no record; restore it, or run its stage again")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A run's config.yaml; empty where there is none. Raises: UserError when it is damaged."""
    return configuration.read_yaml(path) if path.is_file() else {}
