"""The settings of a config dataclass, read from its source: nothing is imported, so `--help` and typos are fast.

`read_schema("latents.encode:EncodeConfig")` follows names through imports, base classes and type aliases. Help texts
come from the `Args:` or `Attributes:` section of the docstring. `config.load` makes the final check of the values.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ldm_vae.errors import UserError

PACKAGE = Path(__file__).parent
REQUIRED = "???"
SCALARS = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}


@dataclass(frozen=True)
class Setting:
    """One setting of a command.

    Attributes:
        key: its full name, for example `training.seed`.
        kind: `text`, `whole number`, `number`, `true or false`, `choice`, `list`, `pair` (a tuple of fixed length),
            `mapping` or `group`.
        item: the kind of a list's items, or the words of a choice.
        optional: whether it can be null.
        default: as a user would write it; empty for groups.
        positive: whether a number must be above 0, as `config.check_positive` demands.
        short_form: whether a group can be given as one text, for example data=PATH.
        settings: the settings in a group.
    """

    key: str
    kind: str
    item: tuple[str, ...] = ()
    optional: bool = False
    default: str = ""
    meaning: str = ""
    positive: bool = False
    short_form: bool = False
    settings: tuple[Setting, ...] = ()

    @property
    def required(self) -> bool:
        return self.default == REQUIRED

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]


@cache
def read_schema(place: str, prefix: str = "") -> tuple[Setting, ...]:
    """The settings of the dataclass at `module:Class` in this package, those of its base classes first."""
    module, _, name = place.partition(":")
    found: dict[str, Setting] = {}
    for owner, node in reversed(list(_lineage(_Module.read(module), name))):
        meanings = _meanings(ast.get_docstring(node) or "")
        positive = _positive(node)
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and not ast.unparse(line.annotation).startswith("ClassVar"):
                key = ast.unparse(line.target)
                setting = _setting(owner, prefix + key, line, meanings.get(key, ""))
                found[key] = replace(setting, positive=key in positive)
    return tuple(found.values())


def docstring(place: str) -> str:
    """The docstring of the function or class at `module:name`."""
    module, _, name = place.partition(":")
    _, node = _Module.read(module).find(name)
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef)), place
    return ast.get_docstring(node) or ""


def parameters(place: str) -> tuple[str, ...]:
    """The parameters of the function at `module:name` after the first, which is the config."""
    module, _, name = place.partition(":")
    _, node = _Module.read(module).find(name)
    assert isinstance(node, ast.FunctionDef), place
    return tuple(argument.arg for argument in [*node.args.args[1:], *node.args.kwonlyargs])


def flat(settings: tuple[Setting, ...]) -> Iterator[Setting]:
    """Every setting, the members of groups instead of the groups."""
    for setting in settings:
        if setting.kind == "group":
            yield from flat(setting.settings)
        else:
            yield setting


def find_setting(settings: tuple[Setting, ...], key: str) -> Setting:
    """The setting with this full name. Raises: UserError, with a similar key as a suggestion."""
    inside, known = settings, settings
    for depth, part in enumerate(parts := key.split(".")):
        match = [setting for setting in inside if setting.name == part]
        if not match:
            place = ".".join(parts[:depth])
            raise UserError(f"{key}: no such setting; {_suggestion(key, place, inside, known)}")
        if match[0].kind == "mapping":
            return match[0]
        inside = match[0].settings
        if depth == len(parts) - 1:
            return match[0]
        if match[0].kind != "group":
            raise UserError(f"{key}: {match[0].key} is not a group of settings; give {match[0].key}=VALUE")
    raise AssertionError(key)


def _suggestion(key: str, place: str, inside: tuple[Setting, ...], known: tuple[Setting, ...]) -> str:
    part = key.removeprefix(f"{place}.") if place else key
    near = difflib.get_close_matches(part.split(".")[0], [setting.name for setting in inside], n=1)
    if near:
        return f"did you mean {f'{place}.{near[0]}' if place else near[0]!s}?"
    elsewhere = [setting.key for setting in flat(known) if setting.name == key.rpartition(".")[2]]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"choose one of {', '.join(setting.key for setting in inside)}"


def check_value(setting: Setting, text: str) -> None:
    """Raises: UserError if `text` is not valid for a plain setting; `config.load` checks all others."""
    if setting.optional and text in ("null", "", "~"):
        return
    if setting.kind == "choice" and text not in setting.item:
        raise UserError(f"{setting.key}: {text!r} is not one of {', '.join(setting.item)}")
    if setting.kind == "true or false" and text.lower() not in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        raise UserError(f"{setting.key}: {text!r} is not true or false")
    if setting.kind in ("whole number", "number"):
        _check_number(setting, setting.kind, text)
    if setting.kind in ("list", "pair") and setting.item[0] in ("whole number", "number"):
        parts = text.removeprefix("[").removesuffix("]").split(",")
        for part in parts if parts != [""] else ():
            _check_number(setting, setting.item[0], part.strip())


def _check_number(setting: Setting, kind: str, text: str) -> None:
    try:
        number = int(text, 0) if kind == "whole number" else float(text)
    except ValueError:
        raise UserError(f"{setting.key}: {text!r} is not a {kind}") from None
    if setting.positive and number <= 0:
        raise UserError(setting.key, f"{text} is not positive")


# Reading source


@dataclass(frozen=True)
class _Module:
    """The definitions and imports at the top level of a file."""

    name: str
    defined: dict[str, ast.stmt]
    imported: dict[str, tuple[str, str]]

    @staticmethod
    @cache
    def read(name: str) -> _Module:
        path = PACKAGE.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        defined: dict[str, ast.stmt] = {}
        imported: dict[str, tuple[str, str]] = {}
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                defined[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                defined[node.targets[0].id] = node
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldm_vae"):
                for alias in node.names:
                    home = (node.module or "").removeprefix("ldm_vae").removeprefix(".")
                    imported[alias.asname or alias.name] = (home, alias.name)
        return _Module(name, defined, imported)

    def find(self, name: str) -> tuple[_Module, ast.stmt | None]:
        """The definition of a name, and the module that it is in; None for names from outside this package."""
        if name in self.defined:
            return self, self.defined[name]
        if name in self.imported:
            home, original = self.imported[name]
            return _Module.read(home).find(original)
        return self, None


def _lineage(module: _Module, name: str) -> Iterator[tuple[_Module, ast.ClassDef]]:
    """The class and its base classes in this package, nearest first."""
    owner, node = module.find(name)
    if isinstance(node, ast.ClassDef):
        yield owner, node
        for base in node.bases:
            if isinstance(base, ast.Name):
                yield from _lineage(owner, base.id)


def _setting(module: _Module, key: str, line: ast.AnnAssign, meaning: str) -> Setting:
    kind, item, optional, place = _kind(module, line.annotation)
    if kind == "group":
        owner, name = place
        node = owner.defined[name]
        assert isinstance(node, ast.ClassDef)
        short_form = any(isinstance(one, ast.FunctionDef) and one.name == "short_form" for one in node.body)
        inside = read_schema(f"{owner.name}:{name}", f"{key}.")
        return Setting(key, kind, (), optional, "", meaning, short_form=short_form, settings=inside)
    return Setting(key, kind, item, optional, _default(module, line.value), meaning)


def _positive(node: ast.ClassDef) -> set[str]:
    """The fields that a class checks with `config.check_positive(self, "name", ...)`."""
    calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
    return {
        argument.value
        for call in calls
        if ast.unparse(call.func).endswith("check_positive")
        for argument in call.args[1:]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }


def _kind(module: _Module, node: ast.expr) -> tuple[str, tuple[str, ...], bool, tuple[_Module, str]]:
    """(kind, item, optional, the class of a group) of an annotation."""
    nowhere = (module, "")
    if isinstance(node, ast.BinOp):  # X | None
        kind, item, _, place = _kind(module, node.left)
        return kind, item, True, place
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Literal":
            return "choice", tuple(str(ast.literal_eval(part)) for part in parts), False, nowhere
        if name == "tuple" and ast.unparse(parts[-1]) != "...":
            return "pair", tuple(_kind(module, part)[0] for part in parts), False, nowhere
        if name in ("list", "tuple", "Sequence"):
            return "list", (_kind(module, parts[0])[0],), False, nowhere
        return "mapping", (), False, nowhere
    name = ast.unparse(node)
    if name in SCALARS:
        return SCALARS[name], (), False, nowhere
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in module.imported:
        home, original = module.imported[node.value.id]
        module, name = _Module.read(f"{home}.{original}".lstrip(".")), node.attr
    owner, found = module.find(name)
    if isinstance(found, ast.ClassDef):
        return "group", (), False, (owner, found.name)
    assert isinstance(found, ast.Assign), f"{module.name}: {name}"
    return _kind(owner, found.value)


def _default(module: _Module, node: ast.expr | None) -> str:
    """The default as a user would write it, if it is a literal in the source."""
    if node is None:
        return REQUIRED
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "field":
        (factory,) = (word.value for word in node.keywords if word.arg == "default_factory")
        if isinstance(factory, ast.Lambda):
            return _default(module, factory.body)
        return {"list": "[]", "dict": "{}"}.get(ast.unparse(factory), f"see {ast.unparse(factory)}")
    if isinstance(node, ast.Constant):
        return {"None": "null", "True": "true", "False": "false"}.get(str(node.value), str(node.value))
    if isinstance(node, (ast.List, ast.Tuple)):
        return "[" + ", ".join(_default(module, part) for part in node.elts) + "]"
    if isinstance(node, ast.Name):
        owner, found = module.find(node.id)
        if isinstance(found, ast.Assign):
            return _default(owner, found.value)
    return ast.unparse(node)


def _meanings(text: str) -> dict[str, str]:
    """Name -> help text in the `Args:` or `Attributes:` section of a docstring; `a, b: ...` describes both."""
    match = re.search(r"^(?:Args|Attributes):\n((?:[ ]{4,}.*\n?|\n)+)", text, re.MULTILINE)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in match[1].splitlines() if match else []:
        entry = re.match(r" {4}(\w+(?:, \w+)*): *(.*)", line)
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
