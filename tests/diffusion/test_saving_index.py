"""What `model_index.json` names is judged before diffusers sees the folder: no file decides what is imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm_vae.diffusion.pipeline import DiffusionPipeline, LatentDiffusionPipeline
from ldm_vae.diffusion.saving import component_class
from ldm_vae.errors import UserError
from ldm_vae.files import write_checksums
from tests.diffusion.conftest import NAMES, make_pipeline

PLANTED = """
raise SystemExit("the planted module was imported")
"""


@pytest.mark.parametrize("name", ["scheduler", "unet", "autoencoder", "autoguidance_unet", "another"])
@pytest.mark.parametrize(
    "entry",
    [
        ["planted", "Scheduler"], ["os", "system"], ["builtins", "eval"], ["torch.nn", "Linear"],
        ["ldm_vae.cli", "main"],
        ["diffusers.utils", "load_image"], ["diffusers", "FluxPipeline"], ["diffusers", "utils"], ["diffusers"],
        ["ldm_vae.diffusion.unet", "sys"], ["ldm_vae.diffusion.unet", "math"], [None, "Scheduler"], [1, 2],
        [["os"], "x"],
        ["ldm_vae.autoencoder.wavelet.", "AutoencoderWavelet"], [],
    ],
    ids=str,
)  # fmt: skip
def test_other_classes_are_refused_whatever_the_version_of_diffusers(
    name: str, entry: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("diffusers saw it"))
    folder = tmp_path / "pipeline"
    folder.mkdir()
    for path in saved.iterdir():
        if path.name not in ("model_index.json", "MANIFEST.json"):
            (folder / path.name).symlink_to(path)
    index = json.loads((saved / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {name: entry}))
    write_checksums(folder)
    with pytest.raises(UserError, match=f"model_index.json: {name}: names .* not a network of this package"):
        LatentDiffusionPipeline.from_pretrained(folder)
    assert "planted" not in sys.modules


def test_what_this_package_saves_is_taken(tmp_path: Path) -> None:
    for architecture in ("wavelet", "sd"):
        make_pipeline(NAMES, architecture).save_pretrained(tmp_path / architecture)
        index = json.loads((tmp_path / architecture / "model_index.json").read_text())
        entries = [entry for entry in index.values() if isinstance(entry, list) and len(entry) == 2]
        classes = [component_class(entry, "x") for entry in entries if all(isinstance(word, str) for word in entry)]
        assert {"scheduler", "unet", "autoencoder"} <= index.keys()
        assert len([one for one in classes if one.__name__ in ("LatentUNet", "FlowMatchEulerDiscreteScheduler")]) == 2
        LatentDiffusionPipeline.from_pretrained(tmp_path / architecture)
