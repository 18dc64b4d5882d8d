"""What turns latents into those of a diffusion model survives every conversion: stock diffusers decodes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ldm_vae.autoencoder.interop.compvis import read_settings
from ldm_vae.autoencoder.interop.convert import Conversion, convert_autoencoder
from ldm_vae.errors import UserError

FACTORS: dict[str, dict[str, Any]] = {
    "Stable Diffusion": {"scaling_factor": 0.18215},
    "FLUX": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "per channel": {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 1.5]},
    "all": {"scaling_factor": 0.5, "shift_factor": -0.1, "latents_mean": [0.5] * 4, "latents_std": [2.0] * 4},
}
NAMES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def model(factors: dict[str, Any], **changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 4}
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(**sizes, **blocks, **factors, **changes).eval()


def drawn(vae: Any) -> Tensor:
    """As diffusers' pipelines decode: with the statistics of the channels, where there are any."""
    z = torch.linspace(-1, 1, 4 * 8 * 8).view(1, 4, 8, 8)
    config = vae.config
    if config.latents_mean is not None:
        mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        z = z * std / config.scaling_factor + mean
    else:
        z = z / config.scaling_factor
    with torch.no_grad():
        return vae.decode(z + (config.shift_factor or 0)).sample


def convert(source: Path, target: Path, to: str, config: Path | None = None) -> list[str]:
    return convert_autoencoder(Conversion(str(source), str(target), to, config=str(config) if config else None))[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("quant_conv", [True, False])
@pytest.mark.parametrize("name", FACTORS)
def test_there_and_back(tmp_path: Path, name: str, quant_conv: bool) -> None:
    """A directory, a file in the CompVis layout, and a directory again, with the written YAML and without it."""
    original = model(FACTORS[name], use_quant_conv=quant_conv, use_post_quant_conv=quant_conv)
    original.save_pretrained(tmp_path / "a")
    expected = drawn(original)
    convert(tmp_path / "a", tmp_path / "b", "diffusers")
    notes = convert(tmp_path / "b", tmp_path / "c.safetensors", "compvis")
    assert quant_conv == (tmp_path / "c.yaml").exists()
    assert quant_conv or f"scaling_factor {FACTORS[name]['scaling_factor']}" in notes[0]
    convert(tmp_path / "c.safetensors", tmp_path / "d", "diffusers")
    folders = ["b", "d"]
    if quant_conv:
        convert(tmp_path / "c.safetensors", tmp_path / "e", "diffusers", tmp_path / "c.yaml")
        folders.append("e")
    for folder in folders:
        found = AutoencoderKL.from_pretrained(tmp_path / folder)
        assert torch.equal(drawn(found), expected), folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {params: {scale_factor: 0.3611, shift_factor: 0.1159}}", (0.3611, 0.1159)),
        ("model: {params: {scale_factor: 0.3, first_stage_config: {params: {shift_factor: 0.2}}}}", (0.3, 0.2)),
        ("{model: {params: {ddconfig: {ch: 1}}}, scale_factor: 0.5, shift_factor: 0.1}", (0.5, 0.1)),
        ("model: {params: {first_stage_config: {params: {scale_factor: 1, ddconfig: {shift_factor: 2}}}}}", (1, 2)),
        ('{"_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159}', (0.3611, 0.1159)),
    ],
)
def test_where_configurations_state_it(tmp_path: Path, text: str, expected: tuple[float, float]) -> None:
    (tmp_path / "config.yaml").write_text(text)
    settings = read_settings(tmp_path / "config.yaml")
    assert (settings.scaling_factor, settings.shift_factor) == expected
    model({}).save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.safetensors", "compvis")
    convert(tmp_path / "b.safetensors", tmp_path / "c", "diffusers", tmp_path / "config.yaml")
    written = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (written["scaling_factor"], written["shift_factor"]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {params: {latents_mean: [1, 2]}}", "latents_mean has 2 numbers for 4 latent channels"),
        ("model: {params: {shift_factor: no}}", "shift_factor False is not a number"),
        ("model: {params: {latents_std: 3}}", "latents_std 3 is not a number"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    model({}).save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.safetensors", "compvis")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "b.safetensors", tmp_path / "c", "diffusers", tmp_path / "config.yaml")
