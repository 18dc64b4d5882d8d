"""Settings that need not be given twice: what a run, a latent set, a detector or directions already say.

The command line fills them in before anything heavy is imported. A setting that is given, or that a recipe has, stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_vae.errors import UserError
from ldm_vae.schema import Setting
from ldm_vae.storage.base import is_url

RECORDED = {
    "latents": ("autoencoder",),
    "detector": ("autoencoder", "pipeline", "perceptual_weights"),
    "directions": ("autoencoder", "resolution"),
}
"""A setting that names a folder whose `run.json` has the command that made it -> the settings to take from there."""


@dataclass(frozen=True)
class Default:
    """A value taken from a file. `text` is what would be written after `key=`."""

    key: str
    text: str
    source: Path


def find_defaults(
    settings: tuple[Setting, ...], given: dict[str, str], read_command: Callable[[list[str]], dict[str, str]]
) -> list[Default]:
    """The settings that the folders named by other settings already answer.

    Args:
        given: key -> text of every setting that was given, on the command line or in a recipe.
        read_command: words of a recorded command, the program first -> key and text of each of its settings.
    """
    known = {setting.key: setting for setting in settings}
    found: list[Default] = []
    if "autoencoder" in known and known["autoencoder"].kind == "text":
        found += _recorded(known, given, read_command)
    given = {default.key: default.text for default in found} | given
    autoencoder = given.get("autoencoder", "")
    if autoencoder and not is_url(autoencoder):
        found += _of_run(known, given, Path(autoencoder).expanduser())
    return found


def _recorded(
    known: dict[str, Setting], given: dict[str, str], read_command: Callable[[list[str]], dict[str, str]]
) -> list[Default]:
    """The settings of the command that made a latent set, a detector or directions, as far as they are asked for."""
    for key, names in RECORDED.items():
        if key not in known or key not in given or is_url(given[key]):
            continue
        record = Path(given[key]).expanduser() / "run.json"
        try:
            words = json.loads(record.read_text())["command"]
            settings = read_command([str(word) for word in words])
        except (OSError, ValueError, KeyError, TypeError, IndexError, UserError):
            continue  # no record, or not of a command; the setting is asked for
        wanted = [name for name in names if name in known and name not in given and name in settings]
        texts = {name: settings[name] for name in wanted if settings[name] not in ("", "null")}
        here = {name: text for name, text in texts.items() if name == "resolution" or Path(text).expanduser().exists()}
        if here:
            return [Default(name, text, record) for name, text in here.items()]
    return []


def _of_run(known: dict[str, Setting], given: dict[str, str], autoencoder: Path) -> list[Default]:
    """The images of a training run, and the size at which it measures held-out images."""
    folder = autoencoder.parent if autoencoder.name == "autoencoder" else autoencoder
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    from ldm_vae.config import read_yaml

    try:
        run: dict[str, Any] = read_yaml(path)
    except UserError:  # the command itself says what is wrong with the run
        return []
    found = []
    data = run.get("data")
    takes_data = "data" in known and known["data"].kind == "group"  # a text in `explore`, which knows the run itself
    if takes_data and isinstance(data, dict) and not any(key.split(".")[0] == "data" for key in given):
        names = {setting.key.removeprefix("data.") for setting in known["data"].settings}
        kept = {key: value for key, value in data.items() if key in names and key != "cache_megabytes"}
        found.append(Default("data", json.dumps(kept), path))
    size = run.get("held_out_resolution")
    if "resolution" in known and not known["resolution"].optional and "resolution" not in given and size:
        found.append(Default("resolution", str(size), path))
    return found


def describe_defaults(defaults: list[Default], shown: dict[str, str]) -> list[str]:
    """One line for each file: the settings from it. `shown`: own key -> key as it is typed, if it is another one."""
    lines: dict[Path, list[str]] = {}
    for default in defaults:
        text = "" if default.text.startswith("{") else f"={default.text}"
        lines.setdefault(default.source, []).append(f"{shown.get(default.key, default.key)}{text}")
    return [f"{' and '.join(words)} from {source}" for source, words in lines.items()]
