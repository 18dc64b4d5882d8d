from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

import ldm_vae
from ldm_vae import provenance


def test_the_record_says_what_was_run_when_and_with_which_versions(tmp_path: Path) -> None:
    provenance.write_run_record(tmp_path, ["ldm-vae", "encode", "a b"], 1_700_000_000.0, 12.3456, images=7)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["command"] == ["ldm-vae", "encode", "a b"]
    assert datetime.fromisoformat(record["started"]).timestamp() == 1_700_000_000
    assert record["seconds"] == 12.346
    assert record["finished"] is True
    assert record["images"] == 7
    assert record["versions"]["ldm_vae"] == ldm_vae.__version__
    assert {"python", "torch", "diffusers", "machine"} <= record["versions"].keys()
    assert "cores" in record["versions"]["machine"]


def test_the_record_holds_nothing_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-that-must-not-appear")
    provenance.write_run_record(tmp_path, None, 0.0, 1.0)
    text = (tmp_path / "run.json").read_text()
    assert "a-secret-that-must-not-appear" not in text
    assert str(Path.home()) not in json.dumps(json.loads(text)["versions"])


@pytest.mark.parametrize(
    ("argv", "recorded"),
    [
        (["/home/somebody/.venv/bin/ldm-vae", "encode", "x=1"], ["ldm-vae", "encode", "x=1"]),
        (["scripts/train_vae.py", "a.yaml"], ["scripts/train_vae.py", "a.yaml"]),
        ([str(Path(ldm_vae.__file__).parent / "cli.py"), "encode"], ["ldm-vae", "encode"]),
    ],
)
def test_the_command_is_recorded_as_typed(argv: list[str], recorded: list[str]) -> None:
    assert provenance.command_line(argv) == recorded


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_recorded_only_for_a_tracked_package(tmp_path: Path) -> None:
    package = tmp_path / "ldm_vae"
    package.mkdir()
    for name in ("__init__.py", "errors.py", "files.py", "provenance.py", "redaction.py", "version.py"):
        shutil.copy(Path(ldm_vae.__file__).parent / name, package / name)
    ask = [sys.executable, "-c", "from ldm_vae import provenance; print(provenance.versions().get('commit'))"]

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        return subprocess.check_output(["git", *identity, *arguments], cwd=tmp_path, text=True).strip()

    git("init", "-q")
    (tmp_path / "other").touch()
    git("add", "other")
    git("commit", "-qm", "somebody else's checkout")
    assert subprocess.check_output(ask, cwd=tmp_path, text=True).strip() == "None"
    git("add", "ldm_vae")
    git("commit", "-qm", "ours")
    commit = git("rev-parse", "HEAD")
    assert subprocess.check_output(ask, cwd=tmp_path, text=True).strip() == commit[:12]
    (package / "files.py").write_text((package / "files.py").read_text() + "\n")
    assert subprocess.check_output(ask, cwd=tmp_path, text=True).strip() == f"{commit[:12]}-dirty"
