"""The pages against reality: commands are understood, Python blocks run, links lead somewhere, the site builds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_vae import cli
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.config import load
from tests.diffusion.conftest import make_pipeline
from tools import record_cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*(ROOT / page for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "checkpoints/README.md")), *PAGES]

RUN_ELSEWHERE = {
    "how-to/generation.md": "diffusion/test_generation_docs.py",
    "how-to/interop.md": "autoencoder/interop/test_convert.py",
    "how-to/reading-latents.md": "latents/test_reading_docs.py",
    "how-to/standard-export.md": "diffusion/test_export_standard_export.py",
    "reference/latent-exchange.md": "latents/test_export.py",
}
"""Page -> the test file that runs its Python on what it needs. The other pages run here."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The `ldm-vae` lines of the shell blocks and of the indented ones."""
    lines = [line for block in blocks(page, "(?:bash|sh|)") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^    (ldm-vae .*)$", page.read_text(), re.MULTILINE)
    return [line for line in lines if line.startswith("ldm-vae ")]


def run_blocks(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    found = blocks(page, "python")
    assert found
    for number, code in enumerate(found):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)
    return names


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_every_command_is_understood_and_in_the_present_grammar(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        if words[0].startswith("-") or words[0].isupper() or "..." in words:
            continue
        command, rest, advice = cli.find_command(words)
        read = cli.ArgumentReader(command).read(rest)
        if cli.COMMANDS[command].output:  # the default is in the model's folder, which is not there
            read.settings.append("output=x")
        assert advice == read.advice == [], line
        recipe = ROOT / read.recipe if read.recipe else None
        if recipe is None or recipe.exists():  # a recipe of the reader's own is not there
            load(cli.resolve(cli.COMMANDS[command].config), recipe, read.settings)


def test_every_page_with_python_is_run() -> None:
    here = {"how-to/generation.md", *RUN_ELSEWHERE, "concepts/tokenizers.md", "start/tutorial.md"}
    assert {str(page.relative_to(DOCS)) for page in PAGES if blocks(page, "python")} == here
    for page, test in RUN_ELSEWHERE.items():
        assert Path(page).name in (ROOT / "tests" / test).read_text(), test


def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = run_blocks(ROOT / "README.md", {})
    assert names["latents"].shape == (1, 4, 64, 64)
    assert names["decoded"].shape == (1, 3, 512, 512)
    assert names["pictures"][0].size == (512, 512)


def test_the_python_of_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_pipeline(["cat", "dog"]).save_pretrained("runs/diffusion/pipeline")
    assert len(run_blocks(DOCS / "start" / "tutorial.md", {})["images"]) == 1


def test_the_python_about_tokenizers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = AutoencoderConfig(preset="pico", kind="fsq", fsq_levels=[5, 5, 5], latent_channels=3)
    build_autoencoder(config).save_pretrained("runs/vae-f8-fsq")
    names = run_blocks(DOCS / "concepts" / "tokenizers.md", {"images": torch.rand(2, 3, 32, 32) * 2 - 1})
    assert names["indices"].shape == (2, 4, 4)
    assert names["images"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_no_two_models_differ_by_a_hyphen_and_an_underscore_on_one_page() -> None:
    for page in [page for page in TEXTS if page.parent.name != "results"]:
        text = re.sub(r"configs/\w+\.yaml|`\w+\.yaml`", "", page.read_text())
        underscored = set(re.findall(r"\b(?:vae|ldm|ae)(?:_[a-z0-9]+)+\b", text))
        underscored -= {"ldm_vae"}  # the command is ldm-vae
        assert not {word for word in underscored if word.replace("_", "-") in text}, page.name


OWN_FLAGS = {"--dry-run", "--print-config", "--overwrite", "--strict", "--help"}
WRITTEN_BY_PROGRAMS = {"benchmarks.md", "cli.md"}
OF_TOOLS = {
    "gpu.md",
    "speed.md",
    "latents-or-pixels.md",
    "CONTRIBUTING.md",
}  # these pages name options of `tools` and `benchmarks`


@pytest.fixture(scope="module")
def settings() -> set[str]:
    """Every setting of every command, with dots."""
    return set(re.findall(r"^  ([a-z_0-9.]+)  \(", record_cli.page(), re.MULTILINE))


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_settings_in_the_text_exist_and_are_spelled_with_an_equals_sign(page: Path, settings: set[str]) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", text)
    for span in spans:
        for key in re.findall(r"(?:^|\s)'?([a-z_]+(?:\.[a-z_]+)+)=", span):
            assert key in settings, span
    if page.name not in OF_TOOLS | WRITTEN_BY_PROGRAMS:
        keys = {key.rsplit(".", 1)[-1].replace("_", "-") for key in settings}
        flags = {
            flag for span in spans if span.startswith(("--", "ldm-vae")) for flag in re.findall(r"--[a-z-]+", span)
        }
        assert not {flag for flag in flags - OWN_FLAGS if flag[2:] in keys - {"quick"}}


BRITISH = (
    r"\b\w*(?:colour|centre|neighbour|behaviour|favour|honour|normalis|standardis|recognis|optimis|quantis|minimis)\w*"
    r"|\b(?:licences?|learnt|grey|afterwards|towards|unlabelled|labelled|whilst)\b"
)
IDIOM = r"(?<!here )\bis no (?!longer)\w+|\b(?:whoever|nobody's|thereby|anew|by heart|which is said|what for)\b"


@pytest.mark.parametrize("page", [page for page in TEXTS if page.name not in WRITTEN_BY_PROGRAMS], ids=name)
def test_the_english_is_american_and_plain(page: Path) -> None:
    """Names in code are left alone: some are keys that saved files carry."""
    text = re.sub(r"^```.*?^```|<!-- figures.*?<!-- end[^>]*>", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]+`|\]\([^)]*\)", "", text)
    assert not re.findall(f"{BRITISH}|{IDIOM}", text, re.IGNORECASE | re.MULTILINE)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_the_reference_of_commands_is_the_present_one() -> None:
    assert (DOCS / "reference" / "cli.md").read_text() == record_cli.page(), "run `python -m tools.record_cli`"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "load_autoencoder" in (tmp_path / "site" / "reference" / "api" / "index.html").read_text()
