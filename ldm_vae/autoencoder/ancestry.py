"""The runs that a run started from, one from another (`initial`): what it took to make an autoencoder, all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.autoencoder.recipe import TrainVaeConfig
from ldm_vae.autoencoder.record import read_record
from ldm_vae.errors import UserError
from ldm_vae.files import readable_json

FILE = "earlier_runs.json"
"""Beside a model that was given away, whose ancestors are not there to be read."""
OF_AUTOENCODER = "autoencoder_runs.json"
"""Beside a pipeline that was given away with another autoencoder than it was trained with: the runs that made that."""
FORMAT_VERSION = 1
"""Of both files."""
KEPT = ("command", "started", "seconds", "steps", "device", "versions")
NOT_TOLD = ("format_version", "output")


def earlier_runs(folder: Path) -> list[dict[str, Any]]:
    """`name`, record and `settings` of each run that the one in `folder` goes back to, the first of all first.

    As far as they can be read: a model without a run's record, or another one in its place, ends the list. `folder` is
    that of the run, or of a model given away. Settings are dotted keys and values, those that are not the defaults.

    Raises:
        UserError: a list that came along is damaged or of a newer format.
    """
    if (folder / FILE).is_file():
        return read_runs(folder / FILE)
    found: list[dict[str, Any]] = []
    seen = {folder.resolve()}
    while (place := _initial(folder)) is not None and place.resolve() not in seen:
        seen.add(place.resolve())
        found.insert(0, _told(place))
        if (place / FILE).is_file():
            return earlier_runs(place) + found
        folder = place
    return found


def runs_of(path: Path, identity: str) -> list[dict[str, Any]]:
    """The runs that made the autoencoder at `path`, its own the last; empty where nothing says which one it was.

    Args:
        path: a run, or the directory of a model.
        identity: the fingerprint of the autoencoder.
    """
    place = _place(path, identity)
    return [] if place is None else [*earlier_runs(place), _told(place)]


def read_runs(file: Path) -> list[dict[str, Any]]:
    """A list that came along; empty where there is none. Raises: UserError: damaged, or of a newer format."""
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text())
        version, runs = content["format_version"], [dict(run) for run in content["runs"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); restore it from a copy") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: has format version {version}, this program reads {FORMAT_VERSION}; update ldm_vae")
    return runs


def runs_text(runs: list[dict[str, Any]]) -> str:
    """What `read_runs` reads."""
    return readable_json({"format_version": FORMAT_VERSION, "runs": runs})


def _initial(folder: Path) -> Path | None:
    """Where the run's record of what the model in `folder` started from lies, if that is the very model it was."""
    initial = read_record(folder).get("initial")
    return _place(Path(initial["path"]), initial.get("fingerprint")) if initial else None


def _place(path: Path, identity: str | None) -> Path | None:
    """Where the record of the run that made the autoencoder at `path` lies; None if it made another one."""
    places = [path, *([path.parent] if path.name == "autoencoder" else [])]
    place = next((place for place in places if (place / provenance.RUN_RECORD).is_file()), None)
    same = place is not None and identity is not None and read_record(place).get("fingerprint") == identity
    return place if same else None


def _told(place: Path) -> dict[str, Any]:
    record = json.loads((place / provenance.RUN_RECORD).read_text())
    told = {"name": place.name} | {name: record[name] for name in KEPT if name in record}
    if (place / "config.yaml").is_file():
        settings = configuration.read_yaml(place / "config.yaml")
        told["settings"] = _changed(
            {name: value for name, value in settings.items() if name not in NOT_TOLD},
            configuration.to_dict(TrainVaeConfig()),
        )
    return told


def _changed(settings: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value where it is not the default. A list, or what users name the keys of, is one value."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            found |= _changed(value, default, f"{prefix}{name}.")
        elif value != default:
            found[prefix + name] = value
    return found
