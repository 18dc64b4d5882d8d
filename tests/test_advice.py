"""Every command line and every setting that a text of the package names is valid: in errors, advice and examples."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_vae import cli
from ldm_vae.config import load
from tools import record_cli

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "ldm_vae").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

VALUE = "1"
"""What stands for a value that is known when the sentence is made."""

NOT_SETTINGS = {
    "aria-label", "charset", "class", "content", "encoding", "height", "href", "rel", "role", "src", "style", "type",
    "version", "width",  # of HTML and SVG
    "autoguidance_unet", "coordinates", "image", "keep_background", "latent_rgb", "mixed_precision", "normalizer",
    "torch_dtype",  # of the Python API
    "flow_shift", "guidance_scale", "num_inference_steps", "prediction_type", "use_flow_sigmas",  # of diffusers
    "data_files", "split",  # of datasets
    "key", "perceptual",  # `key=value`; a phase's own setting
}  # fmt: skip


def texts(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether it is a docstring) of every string of a source; `VALUE` stands for what is filled in."""
    tree = ast.parse(path.read_text())
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            words = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
            yield node.lineno, "".join(map(str, words)), False
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value, id(node) in docstrings


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """(command line, whether it is a whole example) of a text: between backticks, or a line of its own."""
    joined = re.sub(r"\\\n[\s#]*", " ", text)
    for found in re.finditer(r"`(ldm-vae [a-z][^`]*)`|^(?: {4,}|# {2,})(ldm-vae [a-z].*)$", joined, re.MULTILINE):
        yield " ".join((found[1] or found[2]).split()), found[2] is not None


def understand(line: str, whole: bool) -> None:
    """Let the command line parse it; a whole one must give a configuration. Raises: UserError, AssertionError."""
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    if len(words) == 1 and words[0] in cli.GROUPS:
        return
    command, rest, advice = cli.find_command(words)
    read = cli.ArgumentReader(command).read(rest)
    assert advice == read.advice == [], line
    if whole:
        if cli.COMMANDS[command].output:  # the default is in the model's folder, which is not there
            read.settings.append("output=x")
        recipe = ROOT / read.recipe if read.recipe else None
        if recipe is None or recipe.exists():  # a recipe of the reader's own is not there
            load(cli.resolve(cli.COMMANDS[command].config), recipe, read.settings)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_line_in_the_source_is_understood(path: Path) -> None:
    for number, text, _ in texts(path):
        for line, whole in commands(text):
            if path.name == "cli.py" and "[" in line:  # a pattern
                continue
            try:
                understand(line, whole)
            except Exception as error:
                raise AssertionError(f"{path}:{number}: {line}") from error


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_command_line_in_the_recipes_is_understood(path: Path) -> None:
    found = list(commands(path.read_text()))
    for line, whole in found:
        understand(line, whole)
        for overrides in re.findall(r"overrides=\[?([^\]' ]+)", line):  # settings of another command
            understand(f"ldm-vae train-vae output=x {overrides}", True)


def test_a_wrong_line_is_seen() -> None:
    for line in ("ldm-vae ema RUN", "ldm-vae encode autoencoder=a outptu=b", "ldm-vae model ema RUN --out DIR"):
        ((text, whole),) = commands(f"run `{line}` again")
        with pytest.raises((ValueError, AssertionError)):
            understand(text, whole)


@pytest.fixture(scope="module")
def settings() -> set[str]:
    """Every setting of every command as it is typed."""
    return set(re.findall(r"^  ([a-z_0-9.]+)  \(", record_cli.page(), re.MULTILINE))


def unknown_settings(text: str, settings: set[str]) -> list[str]:
    """Words before `=` in a sentence that no command has; a word after a value that is filled in is left out."""
    words = re.findall(rf"(?<![{VALUE}\w.\-/<{{])([a-z_]{{3,}}(?:\.[a-z_]+)*)=(?!=)", text)
    return [word for word in words if word not in settings | NOT_SETTINGS]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_in_sentences_exist(path: Path, settings: set[str]) -> None:
    for number, text, docstring in texts(path):
        if " " in text and not docstring:
            assert unknown_settings(text, settings) == [], f"{path}:{number}: {text}"


def test_a_wrong_setting_is_seen(settings: set[str]) -> None:
    assert unknown_settings("use architecture=wavelet, or training.seed=1", settings) == ["architecture"]


def test_a_recipe_names_another_one_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("compare_kinds", "frontier_nano", "frontier_quickstart"):
        command = name.split("_")[0]
        assert cli.main([command, str(ROOT / "configs" / f"{name}.yaml"), "output=x", "--print-config"]) == 0
        (line,) = re.findall(r"^vae: (.*)$", capsys.readouterr().out, re.MULTILINE)
        assert Path(line).is_file()
    Path("mine").mkdir()
    Path("mine/sweep.yaml").write_text("vae: sub/one.yaml\n")
    Path("mine/sub").mkdir()
    Path("mine/sub/one.yaml").write_text("{}\n")
    assert cli.main(["compare", "mine/sweep.yaml", "output=x", "--print-config"]) == 0
    assert "vae: mine/sub/one.yaml" in capsys.readouterr().out
