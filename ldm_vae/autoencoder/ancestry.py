"""The runs that a run started from, one from another (`initial`): what it took to make an autoencoder, all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm_vae import provenance
from ldm_vae.autoencoder.record import read_record

FILE = "earlier_runs.json"
"""Beside a model that was given away, whose ancestors are not there to be read."""
KEPT = ("command", "started", "seconds", "steps", "device", "versions")


def earlier_runs(folder: Path) -> list[dict[str, Any]]:
    """`name` and record of each run that the one in `folder` goes back to, the first of all first.

    As far as they can be read: a model without a run's record, or another one in its place, ends the list. `folder` is
    that of the run, or of a model given away.
    """
    if (folder / FILE).is_file():
        return list(json.loads((folder / FILE).read_text())["runs"])
    found: list[dict[str, Any]] = []
    seen = {folder.resolve()}
    while (place := _initial(folder)) is not None and place.resolve() not in seen:
        seen.add(place.resolve())
        record = json.loads((place / provenance.RUN_RECORD).read_text())
        found.insert(0, {"name": place.name} | {name: record[name] for name in KEPT if name in record})
        if (place / FILE).is_file():
            return earlier_runs(place) + found
        folder = place
    return found


def _initial(folder: Path) -> Path | None:
    """Where the run's record of what the model in `folder` started from lies, if that is the very model it was."""
    initial = read_record(folder).get("initial")
    if not initial:
        return None
    path, identity = Path(initial["path"]), initial.get("fingerprint")
    places = [path, *([path.parent] if path.name == "autoencoder" else [])]
    place = next((place for place in places if (place / provenance.RUN_RECORD).is_file()), None)
    same = place is not None and identity is not None and read_record(place).get("fingerprint") == identity
    return place if same else None
