"""The public API: the list of names, that importing it is free, and that a type checker outside sees its types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ldm_vae

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "Autoencoder", "AutoencoderWavelet", "compress", "CompressConfig", "decompress", "DecompressConfig", "diagnose",
    "encode_dataset", "EncodeConfig", "evaluate", "EvaluateConfig", "flow", "generate", "GenerateConfig",
    "GlobalOrder", "LatentDataset", "LatentDiffusionPipeline", "LatentUNet", "load_autoencoder", "metrics",
    "OrderedSampler", "ShardBlockOrder", "train_diffusion", "train_vae", "TrainDiffusionConfig", "TrainVaeConfig",
    "UserError",
}  # fmt: skip


def test_the_list_of_public_names_is_this_one():
    assert set(ldm_vae.__all__) == PUBLIC
    assert set(dir(ldm_vae)) == PUBLIC | {"__version__"}
    for name in PUBLIC:
        value = getattr(ldm_vae, name)
        assert value.__name__.removeprefix("ldm_vae.") == name
        assert value.__doc__


def test_importing_the_package_is_free():
    code = "import sys; before = set(sys.modules); import ldm_vae; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not [name for name in found.stdout.split() if name.partition(".")[0] in ("torch", "numpy", "PIL", "yaml")]
    assert [name for name in found.stdout.split() if name.startswith("ldm_vae")] == ["ldm_vae", "ldm_vae.version"]


def test_the_public_modules_are_modules():
    import ldm_vae.flow
    import ldm_vae.metrics
    from ldm_vae.metrics import psnr

    assert ldm_vae.flow.velocity_target.__module__ == "ldm_vae.diffusion.flow"
    assert psnr is ldm_vae.metrics.psnr


SNIPPET = """
import ldm_vae
from ldm_vae import Autoencoder, EvaluateConfig, LatentDataset, TrainVaeConfig, UserError, flow, load_autoencoder
from ldm_vae import train_vae

config = TrainVaeConfig(output="runs/vae")
status: int = train_vae(config)
dataset = LatentDataset("runs/latents", seed=0)
dataset.set_epoch(1)
length: int = len(dataset)
autoencoder: Autoencoder = load_autoencoder("runs/vae")
channels: int = autoencoder.latent_channels
shift: float = flow.resolution_shift(4, 32, 32)
quality = ldm_vae.metrics.psnr
wrong: str = config.held_out_images
EvaluateConfig(nonsense=1)
ldm_vae.train_vea
"""
SETTINGS = """
[mypy]
implicit_reexport = False
ignore_missing_imports = True
follow_imports = silent
[mypy-accelerate.*,datasets.*,diffusers.*,fsspec.*,huggingface_hub.*,matplotlib.*,numpy.*,PIL.*,plotly.*,scipy.*,torch.*]
follow_imports = skip
"""


def test_a_type_checker_outside_sees_the_types(tmp_path):
    """The errors of the last three lines, and no others."""
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "snippet.py"]
    found_here = {"MYPYPATH": str(ROOT)}  # an editable install is behind an import hook, which mypy does not follow
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | found_here)
    errors = [line for line in found.stdout.splitlines() if ": error:" in line]
    lines = SNIPPET.splitlines()
    assert [int(line.split(":")[1]) for line in errors] == [len(lines) - 2, len(lines) - 1, len(lines)], found.stdout


def test_the_stubs_name_the_same_modules():
    stubs = (ROOT / "ldm_vae" / "__init__.pyi").read_text()
    for name, module in ldm_vae._HOMES.items():
        assert f"from ldm_vae.{module} import {name} as {name}\n" in stubs
