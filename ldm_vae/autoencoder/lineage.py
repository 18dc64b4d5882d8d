"""`training.json` beside the weights: how an autoencoder was made, and the runs that it goes back to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.errors import UserError
from ldm_vae.files import readable_json, write_json

RECORD = "training.json"
PATH_POINTS = 200


def write_record(
    folder: Path,
    autoencoder: Autoencoder,
    config: TrainVaeConfig,
    *,
    final_beta: float,
    pinned_share: float,
    metrics_file: Path,
    held_out: Mapping[str, float],
    enlarged: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Write the record into `folder`.

    `enlarged`: how many held-out images were smaller than their center crop (`held_out_enlarged`) and than a training
    crop (`training_crops_enlarged`); recorded where it is not 0.

    `rate.beta_path` is [step, beta, nats per latent dimension] at up to 200 log steps, read from the run's metrics;
    `rate.pinned_share` the share of steps that beta spent at a bound while the target was missed.
    """
    record: dict[str, Any] = {
        "fingerprint": autoencoder.fingerprint(),
        "encoder_fingerprint": autoencoder.encoder_fingerprint(),
        "kind": config.autoencoder.kind,
        "rate": {
            "mode": config.rate.mode,
            "target_nats": config.rate.target_nats if config.rate.mode == "target" else None,
            "final_beta": final_beta,
            "pinned_share": pinned_share,
            "beta_path": beta_path(metrics_file),
        },
        "initial": None,
        "held_out": dict(held_out),
    }
    record |= {name: count for name, count in enlarged.items() if count}
    if config.initial is not None:
        before = read_record(config.initial)
        record["kind"] = before.get("kind")  # None: not known
        record["initial"] = {"path": config.initial, "fingerprint": before.get("fingerprint"), "train": config.train}
        if before.get("encoder_fingerprint") == record["encoder_fingerprint"]:  # the rate is that of the encoder
            record["rate"] = before["rate"]
    write_json(folder / RECORD, record)


def beta_path(metrics_file: Path) -> list[list[float]]:
    """[step, beta, nats per latent dimension] at the log steps of a run, at most `PATH_POINTS`; empty without a log."""
    found = []
    if metrics_file.is_file():
        for line in metrics_file.read_text().splitlines():
            try:
                values = json.loads(line)
                found.append([values["step"], values["rate/beta"], values["rate/nats_per_dim"]])
            except (ValueError, KeyError, TypeError):  # other lines: validation, alarms, a torn last one
                continue
    return subsample([point for point in found if None not in point], PATH_POINTS)


def subsample(points: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the points, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def read_record(path: str | Path) -> dict[str, Any]:
    """The record of an autoencoder directory or a run; empty for an autoencoder that this package did not train.

    Raises:
        UserError: it is damaged.
    """
    for folder in (Path(path), Path(path) / "autoencoder"):
        if (folder / RECORD).is_file():
            try:
                return dict(json.loads((folder / RECORD).read_text()))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{folder / RECORD}: cannot be read ({error}); restore it from a copy") from error
    return {}


# The runs that a run started from, one from another (`initial`): what it took to make an autoencoder, all of it.

FILE = "earlier_runs.json"
"""File beside a shared model, whose earlier runs cannot be read."""
OF_AUTOENCODER = "autoencoder_runs.json"
"""File beside a shared pipeline with another autoencoder than in its training: the runs of that autoencoder."""
FORMAT_VERSION = 1
"""Version of both files."""
KEPT = ("command", "started", "seconds", "steps", "device", "versions")
LEFT_OUT = ("format_version", "output")


def earlier_runs(folder: Path) -> list[dict[str, Any]]:
    """`name`, record and `settings` of each run that the one in `folder` goes back to, the first of all first.

    As far as they can be read: a model without a run's record, or another one in its place, ends the list. `folder` is
    that of the run, or of a shared model. Settings are dotted keys and values, those that are not the defaults.

    Raises:
        UserError: the list beside a shared model is damaged or has a newer format.
    """
    if (folder / FILE).is_file():
        return read_runs(folder / FILE)
    found: list[dict[str, Any]] = []
    visited = {folder.resolve()}
    while (place := _initial(folder)) is not None and place.resolve() not in visited:
        visited.add(place.resolve())
        found.insert(0, _record_of(place))
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
    return [] if place is None else [*earlier_runs(place), _record_of(place)]


def read_runs(file: Path) -> list[dict[str, Any]]:
    """The list beside a shared model; empty if there is none. Raises: UserError: damaged, or of a newer format."""
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


def _record_of(place: Path) -> dict[str, Any]:
    record = json.loads((place / provenance.RUN_RECORD).read_text())
    found_here = {"name": place.name} | {name: record[name] for name in KEPT if name in record}
    if (place / "config.yaml").is_file():
        settings = configuration.read_yaml(place / "config.yaml")
        found_here["settings"] = _changed(
            {name: value for name, value in settings.items() if name not in LEFT_OUT},
            configuration.to_dict(TrainVaeConfig()),
        )
    return found_here


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
