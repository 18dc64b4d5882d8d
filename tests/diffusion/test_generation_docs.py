"""`docs/how-to/generation.md`: its Python runs as it stands, and its commands are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_vae import cli
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.unet import UNetConfig, build_unet
from tests.diffusion.conftest import make_pipeline

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "generation.md").read_text()


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_pipeline(["cat", "dog"])
    unet = build_unet(UNetConfig(preset="tiny", widths=(32,), layers=1), 4, 2).eval()
    latent_rgb = {"weights": [[0.1, 0, 0, 0]] * 3, "bias": [0.0, 0.0, 0.0]}
    model = LatentDiffusionPipeline(**model.components | model.parameters | {"latent_rgb": latent_rgb, "unet": unet})
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "mine_early"):
        model.save_pretrained(f"runs/{name}/pipeline")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 6
    for number, code in enumerate(blocks):
        exec(compile(code, f"block {number}", "exec"), names)
    assert "29 (8, 8)" in capsys.readouterr().out
    assert len(names["variations"]) == 4
    assert isinstance(names["repainted"][0], Image.Image)
    assert names["middle"].shape == (1, 3, 64, 64)
    assert LatentDiffusionPipeline.from_pretrained("runs/mine_guided").autoguidance_unet is not None


def test_the_commands_are_understood() -> None:
    (commands,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in commands.strip().splitlines():
        words = shlex.split(line, comments=True)
        assert words[:2] == ["ldm-vae", "generate"]
        assert cli.ArgumentReader("generate").read(words[2:]).value("output")
