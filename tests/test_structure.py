"""The shape of the house: imports point one way, nothing unsafe is used, files and functions stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ldm_vae"
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = ["data", "training", "autoencoder", "latents", "diffusion", "evaluation", "commands"]


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    folder = path.relative_to(PACKAGE).parts[0]
    if folder not in ORDER:
        return
    allowed = ORDER[: ORDER.index(folder) + 1]
    if folder == "training":  # the engine knows neither data nor models
        allowed = ["training"]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "ldm_vae" and len(parts) > 1 and parts[1] in ORDER:
            assert parts[1] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unsafe_and_every_file_says_what_it_owns(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} opens without a docstring"
    for word in ("import pickle", "trust_remote_code=True", "shell=True", "allow_pickle=True"):
        assert word not in text, f"{path} uses {word}"
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    for node in calls:
        if isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), path
    assert text.count("torch.load") == sum(map(is_safe_load, calls)), f"{path} loads without weights_only=True"


def is_safe_load(call: ast.Call) -> bool:
    """Whether a call is `torch.load(..., weights_only=True)`, with the literal True: it runs no code of the file."""
    given = {word.arg: word.value for word in call.keywords}
    value = given.get("weights_only")
    return ast.unparse(call.func) == "torch.load" and isinstance(value, ast.Constant) and value.value is True


@pytest.mark.parametrize(
    ("code", "safe"),
    [
        ("torch.load(path, map_location='cpu', weights_only=True)", True),
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("torch.load(path, weights_only=flag)", False),
        ("torch.load(path, **settings)", False),
    ],
)
def test_the_check_of_torch_load_sees_unsafe_calls(code, safe):
    (call,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert is_safe_load(call) is safe


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= 420, f"{path} is long: split it by noun"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 75, f"{path}: {node.name} is long"
