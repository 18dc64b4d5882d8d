"""Load YAML and `key=value` overrides into one validated, frozen dataclass.

Every component defines the dataclass of its settings next to its code; defaults live only there. This file knows none
of them: it merges with OmegaConf's structured configs, so unknown keys, wrong types and duplicate keys are refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json
from ldm_vae.redaction import check_no_password, redacted, without_password
from ldm_vae.utils.numbers import plain_number, whole_number

Config = TypeVar("Config")

FORMAT_VERSION = 1
"""The `format_version` of files written by `to_yaml`; a file without one is read as this version."""
MAXIMUM_YAML_BYTES = 1 << 20
MAXIMUM_YAML_VALUES = 50_000
"""Values in a file, counting an alias each time it is used: a few lines of aliases can expand to a billion values."""
MAXIMUM_YAML_DEPTH = 50
MAXIMUM_YAML_LETTERS = 10_000
"""Length of one value: YAML has numbers in base 60 (1:30:00), and parsing one takes time quadratic in its length."""


def load(schema: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Merge the schema's defaults, a YAML file and `key=value` overrides, in this order.

    Raises:
        UserError: with the file or the override, the key and, if a similar key exists, a suggestion.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(schema)
    where = str(path)
    try:
        if path is not None:
            values = _of_known_format(read_yaml(Path(path), schema), where)
            merged = OmegaConf.merge(merged, _plain(_whole_form(values, schema), where))
        for override in overrides:
            where = f"override {without_password(override)!r}"
            values = _whole_form(_read_override(override, schema, where), schema)
            merged = OmegaConf.merge(merged, _plain(values, where))
        where = str(path) if path is not None else "settings"
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{where}: {missing[0]} is required; give it as {missing[0]}=VALUE")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {_without_classes(_one_line(error), schema)}") from error
    except UserError:
        raise
    except ValueError as error:  # a dataclass's own __post_init__
        raise UserError(f"{where}: {error}") from error


def read_yaml(path: Path, schema: type | None = None) -> dict[Any, Any]:
    """A mapping from a YAML file, as plain containers; `${...}` stays as it is.

    A field that `schema` declares as text stays text: a label `no` is not read as false, nor `1e3` as a number. Another
    YAML file that is named in it is looked for beside it first, wherever the program was started.

    Raises:
        UserError: the file is missing, is not a mapping, has tags or duplicate keys, or expands to more than
            `MAXIMUM_YAML_VALUES` values.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        others = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        import difflib

        near = difflib.get_close_matches(path.stem, others, n=1)
        hint = f"did you mean {path.parent / near[0]}.yaml?" if near else "give the path of a YAML file"
        raise UserError(f"{path}: no such configuration file; {hint}")
    if path.stat().st_size > MAXIMUM_YAML_BYTES:
        raise UserError(f"{path}: larger than {MAXIMUM_YAML_BYTES} bytes; give a configuration file")
    try:
        _check_extent(path.read_bytes(), str(path))
        text = _with_quoted_texts(path.read_text(encoding="utf-8"), schema)
        values = _beside(path, OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False))
    except UserError:
        raise
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not of `key: value` lines; give a configuration file")
    return values


def _beside(path: Path, value: Any) -> Any:
    """The same values, with the full path of every YAML file that lies in the folder of the one at `path`."""
    if isinstance(value, dict):
        return {key: _beside(path, item) for key, item in value.items()}
    if isinstance(value, str) and value.endswith((".yaml", ".yml")) and not value.startswith(("/", "~")):
        return str(path.parent / value) if (path.parent / value).is_file() else value
    return value


def _read_override(override: str, schema: type, where: str) -> Any:
    """Parse `key=value` into plain containers; a text setting takes the text after `=`. Raises: UserError."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{where}: not of the form key=value")
    kind, optional = _kind_at(schema, key.split("."))
    if optional and get_origin(kind) is Literal and text in ("null", "~", ""):
        return _nested(key, None)
    if kind is str or (_has_short_form(kind) and not text.startswith("{")):
        return _nested(key, None if optional and not text else text)
    texts = _json_texts(text) if get_origin(kind) is list and get_args(kind) == (str,) else None
    if texts is not None:
        return _nested(key, texts)
    try:
        _check_extent(text, where)
        dotted = f"{key}={_with_quoted_texts(text, kind)}"
        return OmegaConf.to_container(OmegaConf.from_dotlist([dotted]), resolve=False)
    except UserError:
        raise
    except (YAMLError, IndexError, ValueError) as error:  # IndexError: from keys such as `[`
        raise UserError(f"{where}: {_one_line(error)}") from error


def _nested(key: str, value: Any) -> Any:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _json_texts(text: str) -> list[str] | None:
    """A JSON list of strings, in which a file name that is not UTF-8 can be written; YAML has no way to."""
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else None


# Types of the values in a schema


def _kind_of(hint: Any) -> tuple[Any, bool]:
    """A type without `| None`, and whether it was optional; a `Literal` of strings counts as `str`."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    optional = type(None) in members
    if optional and len(members) == 2:
        hint = next(member for member in members if member is not type(None))
    if get_origin(hint) is Literal and all(isinstance(word, str) for word in get_args(hint)):
        # The choices are never file names, so that null can stay null on the command line as well.
        hint = hint if optional else str
    return hint, optional


def _kind_at(schema: Any, parts: Sequence[str]) -> tuple[Any, bool]:
    """The kind of the setting with this key; (None, False) where the schema has no such key."""
    kind, optional = schema, False
    for part in parts:
        if dataclasses.is_dataclass(kind):
            kind, optional = _kind_of(get_type_hints(kind).get(part))  # type: ignore[arg-type]
        elif get_origin(kind) is dict:
            kind, optional = _kind_of(get_args(kind)[1])
        else:
            return None, False
    return kind, optional


def _has_short_form(kind: Any) -> bool:
    """Whether a group of settings can be given as one text, which the `short_form` of its dataclass expands."""
    return dataclasses.is_dataclass(kind) and hasattr(kind, "short_form")


def _whole_form(values: Any, kind: Any) -> Any:
    """The same values, with every group that is given as one text expanded."""
    if _has_short_form(kind) and isinstance(values, str):
        return kind.short_form(values)
    if isinstance(values, dict) and dataclasses.is_dataclass(kind):
        return {key: _whole_form(value, _kind_at(kind, [str(key)])[0]) for key, value in values.items()}
    if isinstance(values, list) and get_origin(kind) is list:
        return [_whole_form(value, get_args(kind)[0]) for value in values]
    return values


def _with_quoted_texts(text: str, kind: Any) -> str:
    """The YAML `text` of a value of this type, with quotes around every string."""
    import yaml

    if kind is None:
        return text
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    for start, end, value in sorted(set(_bare_texts(document, kind)), reverse=True):
        text = f"{text[:start]}{json.dumps(value, ensure_ascii=False)}{text[end:]}"
    return text


def _bare_texts(node: Any, hint: Any) -> Iterator[tuple[int, int, str]]:
    """(start, end, value) of the unquoted scalars that are strings by their type hint."""
    import yaml

    kind, optional = _kind_of(hint)
    if isinstance(node, yaml.ScalarNode):
        null = optional and node.tag.endswith(":null")
        if (kind is str or get_origin(kind) is Literal or _has_short_form(kind)) and node.style is None and not null:
            marked = node.start_mark.buffer is not None and node.start_mark.buffer[node.start_mark.pointer] in "&!"
            if not marked:
                yield node.start_mark.index, node.end_mark.index, node.value
    elif isinstance(node, yaml.SequenceNode) and get_origin(kind) in (list, tuple):
        hints = get_args(kind)
        several = len(hints) == len(node.value) and Ellipsis not in hints
        for number, item in enumerate(node.value):
            yield from _bare_texts(item, hints[number] if several else hints[0])
    elif isinstance(node, yaml.MappingNode) and dataclasses.is_dataclass(kind):
        hints_of = get_type_hints(kind)
        for key, item in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in hints_of:
                yield from _bare_texts(item, hints_of[key.value])
    elif isinstance(node, yaml.MappingNode) and get_origin(kind) is dict:
        for key, item in node.value:
            yield from _bare_texts(key, get_args(kind)[0])
            yield from _bare_texts(item, get_args(kind)[1])


# Safety


def _of_known_format(values: dict[Any, Any], where: str) -> dict[Any, Any]:
    """The settings without `format_version`. Raises: UserError for another version."""
    version = values.pop("format_version", FORMAT_VERSION)
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{where}: has format version {version}, this program reads {FORMAT_VERSION}; update ldm_vae, or remove "
            "format_version and every setting that it does not know"
        )
    return values


def _check_extent(text: str | bytes, where: str) -> None:
    """Raises: UserError, before anything is built, for a file that would take all memory or hours to read."""
    import yaml

    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = longest = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.NodeEvent):
            total += sizes.get(event.anchor, 1) if isinstance(event, yaml.AliasEvent) else 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            sizes[event.anchor] = MAXIMUM_YAML_VALUES  # a node must not contain itself
        elif isinstance(event, yaml.ScalarEvent):
            longest = max(longest, len(event.value))
            sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = total - before + 1
        if total > MAXIMUM_YAML_VALUES or len(open_nodes) > MAXIMUM_YAML_DEPTH or longest > MAXIMUM_YAML_LETTERS:
            raise UserError(
                f"{where}: more than {MAXIMUM_YAML_VALUES} values, {MAXIMUM_YAML_DEPTH} levels, or "
                f"{MAXIMUM_YAML_LETTERS} characters in a value; give a configuration file"
            )


def _plain(value: Any, where: str) -> Any:
    """The same containers, with `~` expanded to the home folder.

    Raises:
        UserError: a reference `${...}`, which could copy a secret from the environment into the saved settings, or a
            URL with a password.
    """
    if isinstance(value, dict):
        return {key: _plain(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    if not isinstance(value, str):
        return value
    if "${" in value:
        raise UserError(f"{where}: {value!r} is a reference, and references are not resolved; write the value itself")
    check_no_password(value, where)
    return os.path.expanduser(value) if value.startswith("~/") else value


def _one_line(error: Exception) -> str:
    """OmegaConf's message, with the full key named once and the bookkeeping lines dropped."""
    lines = [line.strip() for line in str(error).splitlines()]
    full_key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "reference_type=", "object_type=")))
    text = _UNCONVERTED.sub(lambda found: f"{found[1]} is not {_MEANT[found[2]]}", text)
    return f"{full_key}: {text}" if full_key and full_key not in text else text


_NO_KEY = re.compile(r"(?:([\w.\[\]]+): )?Key '(\w+)' not in '(\w+)'\W*(.*)")
_NO_GROUP = re.compile(r"(?:([\w.\[\]]+): |Merge error: ).*is not a subclass of (\w+)\. value: (.*)")
_NO_CONTAINER = (
    (re.compile(r"Invalid value assigned: \w+ is not a ListConfig.*"), "is not a list; give it as [A, B]"),
    (re.compile(r"Cannot assign \w+ to Dict\[.*"), "is not a mapping; give it as {KEY: VALUE}"),
    (re.compile(r"TupleConfig length (\d+) does not match type hint length (\d+)"), r"has \1 values; give \2"),
)
"""OmegaConf's messages that name its classes, and those of a configuration."""


def _without_classes(text: str, schema: type) -> str:
    """OmegaConf's message in the words of settings, without names of classes."""
    if found := _NO_KEY.fullmatch(text) or _NO_GROUP.fullmatch(text):
        group, kind = next((one for one in _groups(schema) if one[1].__name__ in found.groups()), ("", schema))
        keys = ", ".join(field.name for field in dataclasses.fields(kind))
        if found.re is _NO_GROUP:
            return f"{found[1] or group}: {found[3]} is not a group of settings; give it as {{KEY: VALUE}}, of {keys}"
        meant = found[4].replace("Did you mean one of:", "did you mean one of").replace("Did you mean:", "did you mean")
        return f"{f'{group}.' if group else ''}{found[2]}: no such setting; {meant or f'choose one of {keys}'}"
    for pattern, words in _NO_CONTAINER:
        text = pattern.sub(words, text)
    return text


def _groups(kind: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, dataclass) of a configuration and of all groups of settings in it, also in lists."""
    yield key, kind
    for name, hint in get_type_hints(kind).items():
        inner, _ = _kind_of(hint)
        inner = get_args(inner)[0] if get_origin(inner) in (list, tuple) and get_args(inner) else inner
        if dataclasses.is_dataclass(inner):
            yield from _groups(inner, f"{key}.{name}" if key else name)


_MEANT = {"Integer": "a whole number", "Float": "a number", "Bool": "true or false"}
_UNCONVERTED = re.compile(rf"Value ('.*?') of type 'str' could not be converted to ({'|'.join(_MEANT)})")


def check_positive(config: Any, *names: str, group: str = "") -> None:
    """For a configuration's `__post_init__`; None passes. `schema` reads the names, so that a wrong number is refused
    before anything heavy is imported. Raises: UserError for a field that is not above 0; `group` comes before its
    name, for example `training.`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"{group}{name}", f"{value} is not positive")


def plain_settings(config: Config, prefix: str = "") -> Config:
    """The same settings with Python's own numbers and texts in place of those of numpy and torch, and of paths.

    Raises:
        UserError: naming the field, for a bool or a float that stands for a whole number.
    """
    if not dataclasses.is_dataclass(config):
        return config
    hints = get_type_hints(type(config))
    names = [field.name for field in dataclasses.fields(config) if field.init]  # type: ignore[arg-type]
    values = {name: _plain_value(getattr(config, name), hints[name], prefix + name) for name in names}
    changed = {name: value for name, value in values.items() if value is not getattr(config, name)}
    return dataclasses.replace(config, **changed) if changed else config  # type: ignore[type-var]


def _plain_value(value: Any, hint: Any, where: str) -> Any:
    """`value` itself where it is plain already."""
    kind, _ = _kind_of(hint)
    if value is None or value == "???":
        return value
    if dataclasses.is_dataclass(value):
        return plain_settings(value, f"{where}.")
    if kind is int:
        return value if type(value) is int else whole_number(value, where)
    if kind is float:
        return value if type(value) in (int, float) else plain_number(value, where)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple) and get_origin(kind) in (list, tuple):
        items = [_plain_value(item, get_args(kind)[0], where) for item in value]
        return value if all(a is b for a, b in zip(items, value)) else type(value)(items)
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON-able containers, tuples as lists, without secrets (see `redaction`)."""
    return redacted(json.loads(json.dumps(dataclasses.asdict(config))))


def to_yaml(config: Any) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create({"format_version": FORMAT_VERSION} | to_dict(config)))


def settings_words(config: Any, key: str = "", default: Any = None) -> list[str]:
    """The words `key=value` that make `config` from the defaults of its class, for a command line.

    Args:
        key: before the names of the fields, as `data`; empty: none.
        default: another config of the class to start from.
    """
    words = []
    default = type(config)() if default is None else default
    for field in dataclasses.fields(config):
        name = f"{key}.{field.name}" if key else field.name
        value, before = getattr(config, field.name), getattr(default, field.name)
        if value == before:
            continue
        if dataclasses.is_dataclass(value):
            words += settings_words(value, name, before)
        else:
            words.append(f"{name}={_word(value)}")
    return words


def _word(value: Any) -> str:
    """A value as it is written after `key=`."""
    return value if isinstance(value, str) else "null" if value is None else json.dumps(value, ensure_ascii=False)


def digest(value: Any) -> str:
    """sha256 hex of a config dataclass or of plain containers, over canonical JSON."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest()


def changed_keys(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for every leaf that differs. List items count as keys if the lengths are equal."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = ({str(index): item for index, item in enumerate(items)} for items in (old, new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    changes: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        changes |= changed_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    return changes


def describe_changes(changes: dict[str, tuple[Any, Any]]) -> str:
    """The result of `changed_keys` as it is typed: `seed (0 -> 1), count (null -> 18)`."""
    return ", ".join(f"{key} ({_word(before)} -> {_word(after)})" for key, (before, after) in changes.items())
