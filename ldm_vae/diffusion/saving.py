"""Saved pipelines: strict reading of networks, the check of the encoder, and the hub.

Independent of the pipeline class, which imports this module.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import nn

from ldm_vae import runtime

runtime.repair_torchvision()

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.weights import load_weights
from ldm_vae.errors import UserError
from ldm_vae.files import MANIFEST

INDEX = "model_index.json"
CARD = "README.md"
DOWNLOAD_SETTINGS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
OWN_MODULES = (
    "ldm_vae.autoencoder.deterministic", "ldm_vae.autoencoder.frozen", "ldm_vae.autoencoder.quantized",
    "ldm_vae.autoencoder.vector", "ldm_vae.autoencoder.wavelet", "ldm_vae.diffusion.unet",
)  # fmt: skip
"""Modules of this package that a pipeline may name for its networks."""
LISTS = ("label_names", "latent_size")
"""Settings of a pipeline that are lists, as its components are."""
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def load_components(directory: Path, skip: Container[str] = (), variant: str | None = None) -> dict[str, Any]:
    """Name -> network for each entry of `model_index.json`, float32, in eval mode.

    Args:
        directory: directory of the pipeline.
        skip: names of components that the caller has already.
        variant: of the files of weights, as in diffusers.

    Raises:
        UserError: an unreadable file, a component that is neither of this package nor of diffusers, or weights that are
            not exactly those of their class.
    """
    where = directory / INDEX
    try:
        index = dict(json.loads(where.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({type(error).__name__}: {error}); give a pipeline") from error
    found = {}
    for name, entry in index.items():
        if name in skip or not name.isidentifier():  # the name of a folder inside the directory only
            continue
        if not isinstance(entry, list) or name in LISTS or name.startswith("_") or entry == [None, None]:
            continue
        component = component_class(entry, f"{where}: {name}")
        if issubclass(component, nn.Module) and (directory / name).is_dir():
            found[name] = load_weights(component, directory / name, variant=variant)
    return found


def component_class(entry: list[Any], where: str) -> type:
    """The class that an entry of `model_index.json` names. diffusers before 0.42 imports any module that one names.

    Args:
        entry: [library, class name].
        where: for messages.

    Raises:
        UserError: it is neither a network of this package nor a network or scheduler of diffusers.
    """
    library, name = entry if len(entry) == 2 and all(isinstance(word, str) for word in entry) else ("", "")
    found = None
    if library == "diffusers":
        found = getattr(diffusers, name, None)
    elif library in OWN_MODULES:
        found = vars(sys.modules.get(library, diffusers)).get(name)
    if not isinstance(found, type) or not issubclass(found, ModelMixin | SchedulerMixin):
        what = f"names {entry}, which is not a network of this package, and no network or scheduler of diffusers"
        raise UserError(where, what, "give a pipeline that `ldm-vae train-diffusion` wrote")
    return found


def check_encoder(
    autoencoder: Autoencoder, expected: str | None, rounded: Mapping[str, str] | None
) -> tuple[str, dict[str, str]]:
    """The fingerprint of the encoder of the latents, and those of its copies in half precision, by precision.

    Args:
        autoencoder: The loaded autoencoder. In half precision it is not checked here, since the loader of a directory
            checks it before casting.
        expected: Fingerprint of the latents' encoder; None: that of the loaded autoencoder.
        rounded: Fingerprints of the copies, if known.

    Raises:
        UserError: another encoder.
    """
    if expected is not None and autoencoder.dtype != torch.float32:
        return expected, dict(rounded or {})
    found = autoencoder.encoder_fingerprint()
    if expected is not None and expected != found and found not in (rounded or {}).values():
        raise UserError(
            f"autoencoder: its encoder has the fingerprint {found[:19]}..., the latents came from {expected[:19]}...; "
            "load it with the autoencoder that encoded the latents, or encode and train again"
        )
    if rounded is None and autoencoder.dtype == torch.float32:
        copies = {name: copy.deepcopy(autoencoder).to(dtype) for name, dtype in HALF.items()}
        rounded = {name: one.encoder_fingerprint() for name, one in copies.items()}
    return expected or found, dict(rounded or {})


def listed_on_hub(repository: str, token: Any, subfolder: str | None = None) -> dict[str, str]:
    """The files in the manifest of a hub repository, which an upload of another variant keeps."""
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
        **{name: settings[name] for name in DOWNLOAD_SETTINGS if settings.get(name) is not None},
    )


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Silence the bar of diffusers for loading components, which takes about a second."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
