"""The networks of a saved pipeline, read more strictly than diffusers reads them. Owns nothing of what they do."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from torch import nn

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.weights import load_weights
from ldm_vae.errors import UserError
from ldm_vae.files import MANIFEST, write_text

if TYPE_CHECKING:
    from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline

INDEX = "model_index.json"


def load_components(directory: Path, except_parts: Container[str] = (), variant: str | None = None) -> dict[str, Any]:
    """Name -> network of each that `model_index.json` names, float32, in eval mode.

    Args:
        directory: of the pipeline.
        except_parts: names that the caller has in another way.
        variant: of the files of weights, as in diffusers.

    Raises:
        UserError: an unreadable file, or weights that are not exactly those of their class.
    """
    where = directory / INDEX
    try:
        index = dict(json.loads(where.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({type(error).__name__}: {error}); give a pipeline") from error
    found = {}
    for name, entry in index.items():
        if name in except_parts or not name.isidentifier():  # the name of a folder in it, and of nothing outside
            continue
        if not (isinstance(entry, list) and len(entry) == 2 and (directory / name).is_dir()):
            continue
        # what diffusers looks among, too: no module is imported because a file says so
        part = getattr(sys.modules.get(str(entry[0])), str(entry[1]), None)
        if isinstance(part, type) and issubclass(part, nn.Module):
            found[name] = load_weights(part, directory / name, variant=variant)
    return found


# What a saved pipeline says about itself: which encoder its latents came from, also of a half-precision copy, and

CARD = "README.md"
OF_DOWNLOADS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}

TEXT = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- ldm_vae
- latent-diffusion
---

# Latent diffusion, {height}x{width}

A `LatentDiffusionPipeline` of the package `ldm_vae`: no text, {kind}.

```python
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline

pipeline = LatentDiffusionPipeline.from_pretrained("{where}")
image = pipeline({label}, seed=0).images[0]
```

| | |
|---|---|
{rows}

This card says what the directory records. On what images it was trained, their licence and what it must not be used for
stand here only if somebody adds it.
"""


def check_encoder(
    autoencoder: Autoencoder, expected: str | None, rounded: Mapping[str, str] | None
) -> tuple[str, dict[str, str]]:
    """The fingerprint of the encoder that made the latents, and those of its copies in half precision, by precision.

    Args:
        autoencoder: The one at hand. In half precision it is taken for what it is said to be: who loads a directory
            checks before casting.
        expected: Of the latents' encoder; None trusts the one at hand.
        rounded: Of the copies, where they are known.

    Raises:
        UserError: another encoder.
    """
    if expected is not None and autoencoder.dtype != torch.float32:
        return expected, dict(rounded or {})
    found = autoencoder.encoder_fingerprint()
    if expected is not None and expected != found and found not in (rounded or {}).values():
        raise UserError(
            f"pipeline: encoder fingerprint is {found[:19]}..., the latents came from {expected[:19]}...; "
            "load it with the autoencoder that encoded the latents, or encode and train again"
        )
    if rounded is None and autoencoder.dtype == torch.float32:
        copies = {name: copy.deepcopy(autoencoder).to(dtype) for name, dtype in HALF.items()}
        rounded = {name: one.encoder_fingerprint() for name, one in copies.items()}
    return expected or found, dict(rounded or {})


def card(pipeline: LatentDiffusionPipeline, where: str) -> str:
    """README.md of a pipeline that is loaded from `where`."""
    height, width = pipeline.image_size()
    names, unet, settings = pipeline.labels, pipeline.unet, pipeline.config
    facts = {
        "Classes": ", ".join(names[:20]) + (f", ... ({len(names)})" if len(names) > 20 else "") if names else "none",
        "U-Net": f"{sum(parameter.numel() for parameter in unet.parameters()) / 1e6:.1f} M parameters",
        "Autoencoder": f"{type(pipeline.autoencoder).__name__}, {pipeline.autoencoder.downsampling}x, "
        f"{len(pipeline.normalizer.mean)} channels",
        "Encoder of the latents": f"`{settings['encoder_fingerprint'][:19]}...`",
        "Scheduler": type(pipeline.scheduler).__name__,
        "Preprocessing": format_values(settings["preprocessing"] or {}) or "not recorded",
        "Training": format_values(settings["training"] or {}) or "not recorded",
    }
    return TEXT.format(
        height=height,
        width=width,
        kind=f"{len(names)} classes" if names else "no classes",
        where=where,
        label=repr(names[0]) if names else "num_images=1",
        rows="\n".join(f"| {name} | {words.replace('|', '/')} |" for name, words in facts.items()),
    )


def format_values(values: Mapping[str, Any]) -> str:
    """`steps 800, held_out/flow 0.748`."""
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in sorted(values.items()))  # fmt: skip


def write_card(pipeline: LatentDiffusionPipeline, directory: Path, where: str | None = None) -> None:
    """Write README.md into a saved pipeline's directory. `where`: what to load it from; None: "DIRECTORY"."""
    write_text(directory / CARD, card(pipeline, where or "DIRECTORY"))


def listed_on_hub(repository: str, token: Any, subfolder: str | None = None) -> dict[str, str]:
    """What the manifest of a hub repository lists already, which an upload of another variant leaves there."""
    path = f"{subfolder}/{MANIFEST}" if subfolder else MANIFEST
    if not huggingface_hub.file_exists(repository, path, token=token):
        return {}
    try:
        text = Path(huggingface_hub.hf_hub_download(repository, path, token=token)).read_text()
        return dict(json.loads(text)["files"])
    except (ValueError, KeyError, TypeError):  # it is replaced
        return {}


def download(repository: str, variant: str | None = None, **settings: Any) -> str:
    """The local snapshot of a hub repository, with the weights of one variant; other settings have no effect."""
    variants = ["*_model.*.safetensors", "*_model.*-*-of-*.safetensors"]  # the plain names have no second dot
    weights = [name.replace("_model.*", f"_model.{variant}") for name in variants] if variant else ["*.safetensors"]
    return huggingface_hub.snapshot_download(
        repository,
        allow_patterns=["*.json", CARD, *weights],
        ignore_patterns=None if variant else variants,
        **{name: settings[name] for name in OF_DOWNLOADS if settings.get(name) is not None},
    )
