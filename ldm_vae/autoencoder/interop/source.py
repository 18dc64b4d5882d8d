"""Open whatever a user calls an autoencoder: a directory, a run, a hub id, or a checkpoint file of another project."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_vae.autoencoder.interop.checkpoint_file import SUFFIXES
from ldm_vae.autoencoder.interop.compvis import load_compvis
from ldm_vae.autoencoder.models import load_autoencoder, model_directory
from ldm_vae.errors import UserError


@dataclass(frozen=True)
class Opened:
    """A model (float32, eval, frozen), notes about its opening, and its local directory where it has one."""

    model: Any
    notes: list[str] = field(default_factory=list)
    directory: Path | None = None


def open_autoencoder(source: str | Path, config: str | Path | None = None) -> Opened:
    """Load from a diffusers directory, a run of `train-vae`, a hub id, a .ckpt or a .safetensors file.

    Args:
        source: what to load; .ckpt and .safetensors are read as CompVis checkpoints.
        config: the LDM configuration of a checkpoint file; refused for anything else, which states its own.

    Raises:
        UserError: nothing there, or nothing that is an autoencoder.
    """
    path = Path(source)
    if path.suffix in SUFFIXES and not path.is_dir():
        model, notes = load_compvis(path, config)
        return Opened(model, notes)
    if config is not None:
        raise UserError(f"--config: {source} states its own settings; give it for .ckpt and .safetensors files only")
    return Opened(load_autoencoder(source), [], model_directory(path))
