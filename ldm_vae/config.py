"""From YAML and `key=value` overrides to one validated, frozen dataclass.

Every component owns the dataclass of its settings next to its code; defaults live only there. This file knows none of
them: it merges with OmegaConf's structured configs, so unknown keys, wrong types and duplicate keys are refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json

Config = TypeVar("Config")

MAXIMUM_YAML_BYTES = 1 << 20


def load(schema: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Merge the schema's defaults, a YAML file and `key=value` overrides, in this order.

    Raises:
        UserError: naming the file or the override, the key and, where there is one, the key that was probably meant.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(schema)
    where = str(path)
    try:
        if path is not None:
            merged = OmegaConf.merge(merged, _read_yaml(Path(path)))
        for override in overrides:
            where = f"override {override!r}"
            if "=" not in override:
                raise UserError(f"{where}: not of the form key=value")
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        where = str(path) if path is not None else "settings"
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{where}: {missing[0]} is required; give it as {missing[0]}=VALUE")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {_one_line(error)}") from error
    except UserError:
        raise
    except ValueError as error:  # a dataclass's own __post_init__
        raise UserError(f"{where}: {error}") from error


def _read_yaml(path: Path) -> Any:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    if not path.is_file():
        others = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        import difflib

        near = difflib.get_close_matches(path.stem, others, n=1)
        hint = f"did you mean {path.parent / near[0]}.yaml?" if near else "give the path of a YAML file"
        raise UserError(f"{path}: no such configuration file; {hint}")
    if path.stat().st_size > MAXIMUM_YAML_BYTES:
        raise UserError(f"{path}: larger than {MAXIMUM_YAML_BYTES} bytes; this is no configuration file")
    try:
        return OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """OmegaConf's message, with the full key named once and the bookkeeping lines dropped."""
    lines = [line.strip() for line in str(error).splitlines()]
    full_key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "reference_type=", "object_type=")))
    return f"{full_key}: {text}" if full_key and full_key not in text else text


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-able containers of a config dataclass, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def digest(value: Any) -> str:
    """sha256 hex of a config dataclass or of plain containers, over canonical JSON."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest()


def changed_keys(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for every leaf that differs. List items count as keys when the lengths agree."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = ({str(index): item for index, item in enumerate(items)} for items in (old, new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    changes: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        changes |= changed_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    return changes
