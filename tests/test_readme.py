"""The README against reality: its commands parse, its files exist, its tree is the tree, CI runs its test command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ldm_vae import cli
from ldm_vae.config import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("#")
]


def test_the_two_commands_come_first_and_are_executable():
    assert COMMANDS[:2] == ["./scripts/quickstart.sh", "./scripts/test.sh"]
    for command in COMMANDS[:2]:
        assert (ROOT / command).stat().st_mode & 0o111
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1].endswith("./scripts/test.sh")


def check_command(line: str) -> None:
    """The words are settings; a configuration with its settings loads. No old spelling."""
    program, *words = shlex.split(line, comments=True)
    assert program == "ldm-vae"
    name, rest, advice = cli.find_command(words)
    read = cli.ArgumentReader(name).read(rest)
    assert advice == read.advice == []
    load(cli.resolve(cli.COMMANDS[name].config), read.recipe and ROOT / read.recipe, read.settings)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("ldm-vae ")])
def test_every_command_of_the_readme_parses(line):
    check_command(line)


def test_the_quickstart_runs_commands_that_parse():
    script = (ROOT / "scripts" / "quickstart.sh").read_text().replace("\\\n", " ").replace("$run", "runs/quickstart")
    lines = [line for line in script.splitlines() if line.startswith("step ")]
    assert len(lines) == 7
    for line in lines:
        check_command("ldm-vae " + line.split('"', 2)[2])


def test_the_tree_of_the_readme_is_the_tree():
    tree = re.search(r"```\nldm_vae/\n(.*?)```", README, re.DOTALL)
    assert tree
    named = set()
    for line in tree[1].splitlines():
        path = line.split()[0]
        full = ROOT / "ldm_vae" / path if line.startswith("  ") else ROOT / path
        assert full.exists(), f"the README names {path}"
        named.add(path.rstrip("/"))
    folders = {p.name for p in (ROOT / "ldm_vae").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders <= named


def test_the_constraints_pin_what_the_package_needs():
    pinned = {
        re.split(r"[=<> ]", line)[0].lower()
        for line in (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    dependencies = re.search(
        r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    assert dependencies
    needed = {re.split(r"[=<>]", name)[0].lower() for name in re.findall(r'"([^"]+)"', dependencies[1])}
    assert needed <= pinned
    assert "torch==2.13.0" in (ROOT / "scripts" / "constraints.txt").read_text()
