"""`training.json` beside the weights: how an autoencoder was made, for everything that judges or describes it later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_vae.autoencoder.fingerprint import encoder_fingerprint, fingerprint
from ldm_vae.autoencoder.recipe import TrainVaeConfig
from ldm_vae.errors import UserError
from ldm_vae.files import write_json

RECORD = "training.json"
PATH_POINTS = 200


def write_record(
    folder: Path,
    autoencoder: Any,
    config: TrainVaeConfig,
    *,
    final_beta: float,
    pinned_share: float,
    metrics_file: Path,
    held_out: Mapping[str, float],
) -> None:
    """Write the record into `folder`.

    `rate.beta_path` is [step, beta, nats per latent dimension] at up to 200 log steps, read from the run's metrics;
    `rate.pinned_share` the share of steps that beta spent at a bound while the target was missed.
    """
    record: dict[str, Any] = {
        "fingerprint": fingerprint(autoencoder),
        "encoder_fingerprint": encoder_fingerprint(autoencoder),
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
    return thin([point for point in found if None not in point], PATH_POINTS)


def thin(points: Sequence[Any], most: int) -> list[Any]:
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
