"""The files of weights in a model's folder: which there are, and saving over earlier ones.

diffusers writes one file or several with an index, as safetensors or `.bin`, each in named variants such as `fp16`. It
reads an index before a single file, and leaves files of earlier saves where they are.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ldm_vae import runtime

runtime.repair_torchvision()

from diffusers.models.modeling_utils import ModelMixin

from ldm_vae.errors import UserError
from ldm_vae.files import check_bin_file, fsync_path, update_checksums

logger = logging.getLogger(__name__)

STEM = "diffusion_pytorch_model"
WEIGHT_SUFFIXES = ("safetensors", "bin")
"""Suffixes of weight files, the preferred one first. `.bin` files are read as tensors only (`weights_only`)."""
PREFERRED = ("", "fp16", "bf16")
"""Variants in the order in which they are taken where none was asked for, others after them."""
SHARD = re.compile(r"-\d{5}-of-\d{5}")
BFLOAT16_STEP = 2.0**-7
SMALLEST_FLOAT16 = 2.0**-24


class WeightFormat(NamedTuple):
    """What one save has left: `variant`, empty for the plain names, and the format, `safetensors` or `bin`."""

    variant: str
    format: str

    def __str__(self) -> str:
        return f"{self.variant or 'plain'} ({self.format})"


def layout_of(name: str) -> WeightFormat | None:
    """The layout that a file of weights or an index belongs to; None for other files.

    >>> layout_of("diffusion_pytorch_model.fp16-00001-of-00002.safetensors")
    WeightFormat(variant='fp16', format='safetensors')
    """
    rest = SHARD.sub("", name.removeprefix(STEM))
    words = rest.split(".")[1:]
    formats = [word for word in words if word in WEIGHT_SUFFIXES]
    if not name.startswith(STEM) or not rest.startswith(".") or len(formats) != 1:
        return None
    variants = [word for word in words if word not in (*WEIGHT_SUFFIXES, "index", "json")]
    return WeightFormat(variants[0] if variants else "", formats[0]) if len(variants) < 2 else None


def layouts(folder: Path) -> dict[WeightFormat, list[Path]]:
    """The layouts in a folder and their files, the indices among them; the one that is taken by itself comes first."""
    complete = {layout: paths for layout, paths in _all_files(folder).items() if not all(map(_is_index, paths))}
    return dict(sorted(complete.items(), key=lambda item: _preference(item[0])))


def _preference(layout: WeightFormat) -> tuple[int, int, str]:
    known = PREFERRED.index(layout.variant) if layout.variant in PREFERRED else len(PREFERRED)
    return WEIGHT_SUFFIXES.index(layout.format), known, layout.variant


def _is_index(path: Path) -> bool:
    return path.suffix == ".json"


def choose_layout(folder: Path, variant: str | None = None) -> WeightFormat:
    """The layout to load from a folder: the plain one where there is one, else the variant that is there.

    Args:
        variant: the one to take, as in diffusers.

    Raises:
        UserError: no weights, or not of that variant; it names what is there.
    """
    found = layouts(folder)
    wanted = [layout for layout in found if variant is None or layout.variant == variant]
    if not found:
        raise UserError(folder, f"holds no weights ({STEM}.safetensors)", "restore it from a copy, or make it again")
    if not wanted:
        there = ", ".join(map(str, found))
        raise UserError(folder, f"has no weights of the variant {variant!r}, only {there}", "ask for one of these")
    if variant is None and wanted[0] != WeightFormat("", WEIGHT_SUFFIXES[0]):
        logger.warning("%s: has no plain safetensors; the weights %s are taken", folder, wanted[0])
    return wanted[0]


# Saving over what is there.


class SavedCompletely(ModelMixin):  # type: ignore[misc]
    """A diffusers model whose `save_pretrained` leaves nothing of an earlier save that would be loaded instead."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., object] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Like diffusers', see `save_over`. The main process writes everything.

        Raises:
            UserError: the folder is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise UserError(folder, "is a file", "give a folder")
        if not is_main_process:
            return
        if push_to_hub:
            kwargs.setdefault("repo_id", folder.name)  # not the name of the temporary folder
        save = super().save_pretrained
        settings: dict[str, Any] = {
            "safe_serialization": safe_serialization,
            "variant": variant,
            "max_shard_size": max_shard_size,
        }
        settings |= {"save_function": save_function, "push_to_hub": push_to_hub}
        save_over(folder, self, lambda temporary: save(temporary, **settings, **kwargs))


def save_over(folder: Path, model: Any, save: Callable[[Path], object]) -> None:
    """Let `save(temporary_folder)` write a model, then move its files into `folder` and remove earlier ones.

    Earlier files are removed once the new ones are complete: those of the same variant, and those of other variants
    unless they hold the same weights in another precision. At every moment the folder holds the old model, the new one
    or, while shards are replaced by shards of the same names, none that loads. Checksums in it are brought up to date.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-{uuid.uuid4().hex[:8]}-weights"
    temporary.mkdir()
    try:
        save(temporary)
        new = sorted(temporary.iterdir())
        permissions = folder.stat().st_mode & 0o666  # safetensors makes files that only their owner can read
        for path in new:
            path.chmod(permissions)
            fsync_path(path)
        written = {layout for path in new if (layout := layout_of(path.name)) is not None}
        stale = _stale(folder, written, {path.name for path in new}, model.state_dict())
        if any(SHARD.search(path.name) and (folder / path.name).exists() for path in new):
            for path in _indices(folder, written):  # of a mixture of old and new shards
                path.unlink(missing_ok=True)
        for path in sorted(new, key=lambda path: (path.suffix == ".json", layout_of(path.name) is not None)):
            if path.name != "README.md" or not (folder / path.name).exists():
                os.replace(path, folder / path.name)
        fsync_path(folder)
        for path in sorted(stale, key=_is_index, reverse=True):
            path.unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for place in (folder, folder.absolute().parent):
        update_checksums(place, folder, {path.name for path in [*new, *stale]})


def _indices(folder: Path, written: set[WeightFormat]) -> list[Path]:
    files = [path for layout, paths in _all_files(folder).items() if layout in written for path in paths]
    return [path for path in files if _is_index(path)]


def _all_files(folder: Path) -> dict[WeightFormat, list[Path]]:
    """As `layouts`, an index without its shards included."""
    found: dict[WeightFormat, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (layout := layout_of(path.name)) is not None and path.is_file():
            found.setdefault(layout, []).append(path)
    return found


def _stale(folder: Path, written: set[WeightFormat], new: set[str], state: Mapping[str, Tensor]) -> list[Path]:
    """Files of earlier saves that would be loaded in place of the new ones, or beside them as another model."""
    variants, stale = {layout.variant for layout in written}, []
    for layout, paths in _all_files(folder).items():
        if layout.variant in variants:
            stale += [path for path in paths if path.name not in new]
        elif not _holds(paths, state):
            logger.warning("%s: the weights %s are of another model, and are removed", folder, layout)
            stale += paths
    return stale


def _holds(paths: list[Path], state: Mapping[str, Tensor]) -> bool:
    """Whether files hold these tensors, up to rounding to another precision."""
    names: set[str] = set()
    try:
        for name, tensor in _tensors(paths):
            if name not in state or not _same(tensor, state[name].detach().cpu()):
                return False
            names.add(name)
    except Exception:  # damaged, by whatever library reads it
        return False
    return names == set(state)


def _tensors(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is not a mapping
                    yield name, file.get_tensor(name)
        elif not _is_index(path):
            check_bin_file(path)
            yield from torch.load(path, map_location="cpu", weights_only=True).items()


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal once the finer one is rounded to the precision of the other."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return torch.equal(one, other)
    fine, coarse = sorted((one, other), key=lambda tensor: -tensor.element_size())
    if fine.element_size() == coarse.element_size():  # float16 and bfloat16
        return torch.allclose(fine.float(), coarse.float(), rtol=BFLOAT16_STEP, atol=SMALLEST_FLOAT16)
    return torch.equal(fine.to(coarse.dtype), coarse)
