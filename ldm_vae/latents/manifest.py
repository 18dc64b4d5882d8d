"""The manifest: what a folder of latent shards is, where it came from, and what is in it.

A set grows in segments: the first encoding, and one for each time that images were appended. `plan.json` (an `Origin`;
`plan-000001.json` for the next segment) is written before the first shard of its segment, `manifest.json` after the
last one: a folder without a manifest is unfinished. Owns these files, not the shards, and not their index.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm_vae import config as configuration
from ldm_vae.errors import UserError
from ldm_vae.files import readable_json
from ldm_vae.latents.contents import CONTENTS, INDEX_DTYPES, LATENT_DTYPES, Layout
from ldm_vae.latents.index import IndexPart, ShardIndex, read_index
from ldm_vae.latents.normalizer import LatentNormalizer
from ldm_vae.latents.statistics import combine
from ldm_vae.storage import Folder, open_folder

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
RESTORE = "`ldm-vae latents repair` rebuilds it from the shards"


def plan_name(segment: int) -> str:
    return f"plan-{segment:06d}.json" if segment else "plan.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the latents of a set are made: the same for all of its shards.

    Attributes:
        autoencoder: `fingerprint` and `encoder_fingerprint` ("sha256:..."), `class` and `config`; for codes also
            `token_fingerprint`, which covers the quantizer.
        preprocessing: what was done to a picture, see `data.transforms.preprocessing_record`.
        content, dtype, latent_shape (c, h, w), flipped: see `contents.Layout`.
        encoding: `batch`, `shard_size` and `precision` of the computation, on which the last bits depend; `seed` of
            the noise where samples are stored.
    """

    autoencoder: dict[str, Any]
    preprocessing: dict[str, Any]
    content: str
    dtype: str
    latent_shape: tuple[int, int, int]
    flipped: bool
    encoding: dict[str, Any]
    format_version: int = FORMAT_VERSION

    @property
    def layout(self) -> Layout:
        return Layout(self.content, self.dtype, self.latent_shape, self.flipped)


@dataclass(frozen=True, kw_only=True)
class Origin(Recipe):
    """The plan of a segment: everything that decides the bytes of its shards.

    Attributes:
        dataset: `source`, `part`, `held_out` (None for part "all"), `fingerprint`, `label_names` and `count` (images;
            None in the plan of a stream).
        first_shard, first_index: where its shards and source indices begin; those of earlier segments come before.
    """

    dataset: dict[str, Any]
    first_shard: int = 0
    first_index: int = 0

    @property
    def digest(self) -> str:
        """sha256 hex; each shard carries it."""
        return configuration.digest(self)


@dataclass(frozen=True, kw_only=True)
class Manifest(Recipe):
    """A finished set.

    Attributes:
        datasets: for each segment its `Origin.dataset`, with `first_shard`, `first_index` and `plan`, the digest.
        label_names: of the classes, all segments together.
        count, rejected, shards: samples; images left out, which quarantine.jsonl names; shards.
        index: the files that list the shards.
        statistics: `mean` [c] and `std` [c] of the latents as a trainer sees them, `count` of latents measured. Of
            codes: `codebook_size`.
        where: the folder it was read from; not part of the file.
    """

    datasets: tuple[dict[str, Any], ...]
    label_names: tuple[str, ...]
    count: int
    rejected: int
    shards: int
    index: tuple[IndexPart, ...]
    statistics: dict[str, Any]
    where: Folder = field(compare=False, repr=False)

    @cached_property
    def normalizer(self) -> LatentNormalizer:
        """Raises: UserError for a set of codes, and for constants that cannot be."""
        if self.content == "indices":
            raise UserError(
                f"{self.where.location}: holds codes (content is indices), a diffusion model needs latents; "
                "encode with store=moments or store=mean"
            )
        return LatentNormalizer.from_dict(self.statistics)

    @cached_property
    def shard_index(self) -> ShardIndex:
        """Of all shards. Raises: UserError when it is damaged or says something else than the manifest."""
        index = read_index(self.where, self.index, self.layout.summed_channels, RESTORE)
        found = {"shards": len(index), "count": index.count, "rejected": index.rejected}
        for name, value in found.items():
            if value != getattr(self, name):
                raise UserError(
                    f"{self.where.location}: {name} is {getattr(self, name)} in {MANIFEST} and {value} in the index; "
                    f"{RESTORE}"
                )
        return index

    def check_autoencoder(self, encoder_fingerprint: str, where: str) -> None:
        """Raises: UserError unless these latents were made by the encoder with this fingerprint.

        The decoder may be another one: training it further with the encoder frozen leaves latents valid.
        """
        made_by = self.autoencoder["encoder_fingerprint"]
        if encoder_fingerprint != made_by:
            raise UserError(
                f"{where}: its encoder_fingerprint is {short(encoder_fingerprint)}, but the latents were made by "
                f"{short(made_by)}; give the autoencoder that made them, or encode again with this one"
            )

    def to_dict(self) -> dict[str, Any]:
        """What manifest.json holds, without its digest."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "where"}
        values["index"] = [dataclasses.asdict(part) for part in self.index]
        return json.loads(json.dumps(values))


def measure(index: ShardIndex, layout: Layout, codebook_size: int | None) -> dict[str, Any]:
    """The statistics of a manifest, which follow from the sums in its index."""
    if codebook_size is not None:
        return {"codebook_size": codebook_size}
    latents = index.count * len(layout.names)
    return combine(index.sums, latents, latents * layout.latent_shape[1] * layout.latent_shape[2])


def write_plan(folder: Folder, origin: Origin, segment: int = 0) -> None:
    folder.write(plan_name(segment), readable_json(configuration.to_dict(origin)).encode())


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Publish `manifest.json`, with the digest of its own content, so that accidents to it are found."""
    values = manifest.to_dict()
    folder.write(MANIFEST, readable_json({**values, "digest": configuration.digest(values)}).encode())


def read_plan(folder: Folder, segment: int = 0) -> dict[str, Any]:
    """The fields of a plan as they stand. Raises: UserError when it is damaged or of another format version."""
    return _read(folder, plan_name(segment), "restore it from a copy, or encode the images to another output")


def read_origin(folder: Folder, segment: int = 0) -> Origin:
    """A plan as an `Origin`. Raises: UserError as `read_plan`, or when fields are missing or unknown."""
    values = read_plan(folder, segment)
    where = f"{folder.location}/{plan_name(segment)}"
    try:
        origin = Origin(**{**values, "latent_shape": tuple(values["latent_shape"])})
        _check_values(origin, where)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: damaged ({error}); restore it from a copy") from error
    return origin


def planned_shards(origin: Origin) -> int | None:
    """How many shards a segment gets; None for a stream whose length its plan does not know."""
    count = origin.dataset["count"]
    return None if count is None else -(-count // origin.encoding["shard_size"])


def read_manifest(location: str | Path | Folder) -> Manifest:
    """The manifest of a finished set.

    Raises:
        UserError: no such folder, not finished, damaged, or of another format version.
    """
    folder = open_folder(location) if isinstance(location, (str, Path)) else location
    if not folder.exists(MANIFEST):
        if folder.sizes("index-"):  # it is published just before
            raise UserError(f"{folder.location}: {MANIFEST} is missing; {RESTORE}")
        if folder.exists(plan_name(0)):
            raise UserError(
                f"{folder.location}: the encoding is not finished; run the same `ldm-vae encode` command again"
            )
        raise UserError(
            f"{folder.location}: holds no {MANIFEST}; give a folder that `ldm-vae encode` wrote (of several sizes one "
            "of the folders inside)"
        )
    where = f"{folder.location}/{MANIFEST}"
    values = _read(folder, MANIFEST, RESTORE)
    digest = values.pop("digest", None)
    try:
        edited = configuration.digest(values) != digest
    except ValueError:  # NaN or infinity, for which there is no canonical JSON
        edited = True
    try:
        for name in ("latent_shape", "datasets", "label_names"):
            values[name] = tuple(values[name])
        values["index"] = tuple(IndexPart(**part) for part in values["index"])
        manifest = Manifest(**values, where=folder)
        _check_values(manifest, where)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: damaged ({error}); {RESTORE}") from error
    if edited:
        _name_damage(manifest)
        raise UserError(f"{where}: damaged or edited, its digest does not fit its content; {RESTORE}")
    return manifest


def _check_values(recipe: Recipe, where: str) -> None:
    """Raises: ValueError for a field of another type or an impossible size, UserError for an unknown content."""
    for name, kind in typing.get_type_hints(type(recipe)).items():
        value, kind = getattr(recipe, name), typing.get_origin(kind) or kind
        if name != "where" and (not isinstance(value, kind) or (kind is int and (type(value) is not int or value < 0))):
            raise ValueError(f"{name} is {short(value)}")
    sizes = {"latent_shape": recipe.latent_shape, "shard_size": (recipe.encoding["shard_size"],)}
    if isinstance(recipe, Origin):
        count = recipe.dataset["count"]
        sizes["count"] = (1 if count in (None, 0) else count,)
    if isinstance(recipe, Manifest):
        sizes["index"] = tuple(part.shards for part in recipe.index)
        if not all(isinstance(text, str) for part in recipe.index for text in (part.file, part.checksum)):
            raise ValueError("index names no files")
        if not all(isinstance(text, str) for text in recipe.label_names):
            raise ValueError("label_names are no names")
    for name, numbers in sizes.items():
        if not all(type(number) is int and 0 < number < 1 << 48 for number in numbers):
            raise ValueError(f"{name} is {short(list(numbers))}")
    if len(recipe.latent_shape) != 3:
        raise ValueError(f"latent_shape is {short(list(recipe.latent_shape))}")
    known = INDEX_DTYPES if recipe.content == "indices" else LATENT_DTYPES
    if recipe.content not in CONTENTS or recipe.dtype not in known:
        raise UserError(f"{where}: content {short(recipe.content)} in {short(recipe.dtype)} is unknown; update ldm_vae")


def _name_damage(manifest: Manifest) -> None:
    """Raises: UserError that names a statistic which is not that of the shards. The rest has no second copy."""
    expected = measure(manifest.shard_index, manifest.layout, manifest.statistics.get("codebook_size"))
    changes = configuration.changed_keys(expected, manifest.statistics, "statistics")
    for key, (right, wrong) in changes.items():
        raise UserError(
            f"{manifest.where.location}/{MANIFEST}: damaged, {key} is {wrong} and the shards have {right}; {RESTORE}"
        )


def _read(folder: Folder, name: str, advice: str) -> dict[str, Any]:
    where = f"{folder.location}/{name}"
    try:
        values = json.loads(folder.read(name))
        version = values["format_version"]
        newer = version > FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({type(error).__name__}: {error}); {advice}") from error
    if newer or version < FORMAT_VERSION:
        cure = "update ldm_vae" if newer else "use the release that wrote it"
        raise UserError(
            f"{where}: has format version {version}, this program reads {FORMAT_VERSION}; {cure}, or encode the images "
            "to another output"
        )
    return values


def check_same(expected: Mapping[str, Any], found: Mapping[str, Any], where: str, advice: str) -> None:
    """Raises: UserError that names every field of `expected` (of a plan) which is another one in `found`, and both
    values. The decoder does not matter: what only the fingerprint of the whole autoencoder tells apart is the same."""
    old, new = (
        {
            name: _without_decoder(value) if name == "autoencoder" else value
            for name, value in values.items()
            if name in expected
        }
        for values in (found, expected)
    )
    changes = configuration.changed_keys(old, new)
    if changes:
        shown = [f"{key} is {short(there)} there and {short(here)} here" for key, (there, here) in changes.items()]
        more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
        raise UserError(f"{where}: was made in another way: {'; '.join(shown[:4])}{more}; {advice}")


def _without_decoder(autoencoder: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the latents."""
    return {key: value for key, value in autoencoder.items() if key.endswith("_fingerprint")}


def short(value: Any) -> str:
    """A value for a sentence: fingerprints by their first 12 digits."""
    text = value if isinstance(value, str) else json.dumps(value)
    match = re.fullmatch(r"(sha256:)?([0-9a-f]{12})[0-9a-f]{52}", text)
    return f"{match[1] or ''}{match[2]}..." if match else text if len(text) <= 80 else text[:77] + "..."


def merge_label_names(known: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """`known`, then those of `more` that are new: the numbers of known classes stay."""
    return (*known, *(name for name in more if name not in known))
