"""`convert`: from any source to one of four targets, written completely or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ldm_vae import compat, provenance

compat.repair_torchvision()

import diffusers

from ldm_vae.autoencoder.fingerprint import encoder_fingerprint, fingerprint
from ldm_vae.autoencoder.interop.compvis import UNKNOWN_SAMPLE_SIZE, architecture_of, tensors_from_model
from ldm_vae.autoencoder.interop.folding import fold_normalizer
from ldm_vae.autoencoder.interop.runtime import export_runtime
from ldm_vae.autoencoder.interop.source import Opened, open_autoencoder
from ldm_vae.autoencoder.wavelet import narrow_channels
from ldm_vae.errors import UserError
from ldm_vae.files import publish_directory, temporary_directory, write_atomically, write_json, write_text

Target = Literal["diffusers", "compvis", "onnx", "torchscript"]
Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RECORD = "conversion.json"
TRAINING = "training.json"


@dataclass(frozen=True)
class Conversion:
    """What to convert, and how.

    Args:
        source: a diffusers directory, a run of `train-vae`, a hub id, a .ckpt or .safetensors file (CompVis layout).
        target: a new directory; for `compvis` a file that ends in .safetensors.
        to: diffusers, compvis, onnx or torchscript.
        precision: of the written weights.
        overwrite: replace what an earlier conversion wrote at `target`.
        size: example side in pixels, for onnx and torchscript.
        config: the LDM configuration of a checkpoint file (scale_factor, resolution).
        channels: keep only so many first latent channels, exactly; for autoencoders trained with nested ones.
        prefix: before every name of a compvis file; `first_stage_model.` is that of whole models.
    """

    source: str
    target: str
    to: Target
    precision: Precision = "fp32"
    overwrite: bool = False
    size: int = 256
    config: str | None = None
    channels: int | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.to not in get_args(Target) or self.precision not in get_args(Precision):
            raise UserError(f"convert: {self.to}, {self.precision} is no known target and precision")
        if self.prefix and self.to != "compvis":
            raise UserError("--prefix: has an effect with --to compvis only; leave it out")
        if self.prefix and not self.prefix.endswith("."):
            raise UserError(f"--prefix: {self.prefix!r} does not end with a dot; use {self.prefix + '.'!r}")
        if self.to == "compvis" and not self.target.endswith(".safetensors"):
            raise UserError(
                f"{self.target}: a compvis checkpoint is written as safetensors, never as a pickle; "
                "give a name that ends in .safetensors"
            )


def convert(
    conversion: Conversion, statistics_for: Callable[[str], dict[str, Any]] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Convert; return the record that is written beside the weights, and notes in words.

    Args:
        statistics_for: encoder fingerprint -> `mean` and `std` of its latents per channel. onnx and torchscript record
            them, diffusers folds them in (`fold_normalizer`).

    Raises:
        UserError: the source cannot be read, the target cannot hold it, or something else stands at the target.
    """
    target = Path(conversion.target)
    check_target(target, conversion.source, conversion.overwrite, is_file=conversion.to == "compvis")
    opened = open_autoencoder(conversion.source, conversion.config)
    if conversion.channels is not None:
        note = f"the first {conversion.channels} latent channels of the source, whose fingerprint is another one"
        opened = Opened(narrow_channels(opened.model, conversion.channels), [*opened.notes, note])
    identity = fingerprint(opened.model)
    statistics = statistics_for(encoder_fingerprint(opened.model)) if statistics_for else None
    if statistics is not None and conversion.to == "compvis":
        raise UserError("--latents: has no effect with --to compvis; use --to diffusers, onnx or torchscript")
    if statistics is not None and conversion.to == "diffusers":
        note = "the statistics of the latents are folded in: its latents have mean 0 and std 1, scaling_factor is 1"
        opened = Opened(fold_normalizer(opened.model, statistics["mean"], statistics["std"]), [*opened.notes, note])
    record: dict[str, Any] = {
        "format_version": 1,
        "source": {"name": conversion.source, "class": type(opened.model).__name__, "fingerprint": identity},
        "to": conversion.to,
        "precision": conversion.precision,
        "notes": [*opened.notes],
    }
    if conversion.to == "compvis":
        _write_compvis(opened.model, target, conversion, record)
    else:
        folder = temporary_directory(target)
        try:
            if conversion.to == "diffusers":
                _write_diffusers(opened, folder, conversion, record)
            else:
                export_runtime(
                    opened.model,
                    folder,
                    conversion.to,
                    precision=conversion.precision,
                    size=conversion.size,
                    statistics=statistics,
                )
            write_json(folder / RECORD, record | {"versions": provenance.versions()})
            publish_directory(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return record, record["notes"]


def check_target(target: Path, source: str, overwrite: bool, is_file: bool = False) -> None:
    """Raises: UserError where `target` may not be written: what stands there is no conversion, or not to be replaced.

    `is_file`: the target is a file with a YAML of the same name, not a directory.
    """
    settings = target.with_suffix(".yaml")
    if is_file and settings.exists() and not overwrite:
        raise UserError(f"{settings}: exists and would be replaced; give another target, or --overwrite")
    if not target.exists():
        return
    if target.resolve() == Path(source).resolve():
        raise UserError(f"{target}: is the source as well; give another target")
    if target.is_dir():
        if not any(target.iterdir()):
            return
        if is_file or not (target / RECORD).is_file():
            raise UserError(f"{target}: holds something that `ldm-vae convert` did not write; give another target")
    elif not is_file:
        raise UserError(f"{target}: is a file; give a new directory")
    if not overwrite:
        raise UserError(f"{target}: exists; give another target, or --overwrite")


def _write_diffusers(opened: Opened, folder: Path, conversion: Conversion, record: dict[str, Any]) -> None:
    model = torch.nn.Module.to(opened.model, DTYPES[conversion.precision])  # diffusers' own `to` warns of nothing
    model.save_pretrained(folder, safe_serialization=True)
    record["fingerprint"] = fingerprint(model)
    name = type(model).__name__
    if not hasattr(diffusers, name):
        record["notes"].append(
            f"{name} is a class of this package: load the directory with ldm_vae.autoencoder.models.load_autoencoder; "
            "stock diffusers cannot load it (use --to onnx or --to torchscript where ldm_vae is not installed)"
        )
    if record["fingerprint"] != record["source"]["fingerprint"]:
        cause = "folding" if conversion.precision == "fp32" else f"rounding to {conversion.precision}"
        record["notes"].append(
            f"{cause} changed the weights, so the fingerprint is another one; latents and "
            "diffusion models of the original will refuse this copy"
        )
    elif opened.directory is not None and (opened.directory / TRAINING).is_file():
        shutil.copyfile(opened.directory / TRAINING, folder / TRAINING)


def _write_compvis(model: Any, target: Path, conversion: Conversion, record: dict[str, Any]) -> None:
    """NAME.safetensors, and NAME.yaml with the settings in LDM's form."""
    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    tensors = tensors_from_model(model, conversion.prefix)
    tensors = {name: tensor.to(DTYPES[conversion.precision]) for name, tensor in tensors.items()}
    metadata = {"format": "pt", "fingerprint": record["source"]["fingerprint"], "precision": conversion.precision}
    write_atomically(target, lambda path: save_file(tensors, path, metadata=metadata))
    target.chmod(target.parent.stat().st_mode & 0o666)
    architecture = architecture_of(model)
    if not (architecture.quant_conv and architecture.post_quant_conv):
        record["notes"].append("no YAML was written: LDM's classes always have quant_conv, this model has none")
        return
    sample_size = model.config.sample_size
    size = sample_size if isinstance(sample_size, int) else UNKNOWN_SAMPLE_SIZE
    settings = architecture.compvis_config(size, float(model.config.scaling_factor))
    write_text(target.with_suffix(".yaml"), OmegaConf.to_yaml(OmegaConf.create(settings)))
