"""The manifest: what a folder of latent shards is, where it came from, and what is in it.

`plan.json` (the `Origin`) is written before the first shard, `manifest.json` (the `Manifest`, the same fields and more)
after the last one: a folder without a manifest is unfinished. Owns both files, not the shards.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_vae import config as configuration
from ldm_vae.errors import UserError
from ldm_vae.files import write_json
from ldm_vae.latents.normalizer import LatentNormalizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
SHARD_NAME = re.compile(r"shard-\d{6,}\.safetensors")
_RESTORE = "delete it and run the same `ldm-vae encode` command again, which rebuilds it from the shards"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Everything that decides the bytes of the shards.

    Attributes:
        autoencoder: `fingerprint` and `encoder_fingerprint` ("sha256:..."), `class` and `config` of the autoencoder.
        preprocessing: what was done to a picture, see `data.transforms.preprocessing_record`.
        dataset: `source`, `part`, `fingerprint`, `label_names` and `count` (images; None in the plan of a stream).
        dtype: of the stored moments: float16, bfloat16 or float32.
        latent_shape: (c, h, w).
        flipped: whether the moments of each image's mirror image are stored too.
        encoding: `batch`, `shard_size` and `precision` of the computation; the last bits depend on them.
        content: "moments": posterior mean and log-variance, unscaled.
    """

    autoencoder: dict[str, Any]
    preprocessing: dict[str, Any]
    dataset: dict[str, Any]
    dtype: str
    latent_shape: tuple[int, int, int]
    flipped: bool
    encoding: dict[str, Any]
    content: str = "moments"
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """sha256 hex; each shard carries it."""
        return configuration.digest(self)


@dataclass(frozen=True)
class ShardRecord:
    """A shard: the source indices `first_index` to `last_index` (inclusive), of which `count` could be read."""

    file: str
    count: int
    first_index: int
    last_index: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Manifest(Origin):
    """A finished set.

    Attributes:
        shards: in the order of their source indices.
        statistics: `mean` [c] and `std` [c] of posterior samples over the whole set, `count` of latents measured.
        rejected: images left out; quarantine.jsonl names them.
    """

    shards: tuple[ShardRecord, ...]
    statistics: dict[str, Any]
    rejected: int

    @property
    def count(self) -> int:
        """Samples in the set."""
        return sum(shard.count for shard in self.shards)

    @property
    def normalizer(self) -> LatentNormalizer:
        return LatentNormalizer.from_dict(self.statistics)

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


def write_plan(directory: Path, origin: Origin) -> None:
    write_json(directory / PLAN, configuration.to_dict(origin))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Publish `manifest.json`, with the digest of its own content, so that accidents to it are found."""
    write_json(directory / MANIFEST, {**configuration.to_dict(manifest), "digest": manifest.digest})


def read_plan(directory: Path) -> dict[str, Any]:
    """The fields of plan.json as they stand. Raises: UserError when it is damaged or newer than this program."""
    return _read(directory / PLAN, "restore it from a copy, or encode the images to another output")


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a finished set.

    Raises:
        UserError: no such folder, not finished, damaged, or of a newer format.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        if (path.parent / PLAN).is_file():
            raise UserError(f"{directory}: the encoding is not finished; run the same `ldm-vae encode` command again")
        raise UserError(f"{directory}: holds no {MANIFEST}; give a folder that `ldm-vae encode` wrote")
    values = _read(path, _RESTORE)
    digest = values.pop("digest", None)
    try:
        values["latent_shape"] = tuple(values["latent_shape"])
        values["shards"] = tuple(ShardRecord(**shard) for shard in values["shards"])
        manifest = Manifest(**values)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); {_RESTORE}") from error
    if manifest.digest != digest:
        raise UserError(f"{path}: damaged or edited, its digest does not fit its content; {_RESTORE}")
    for shard in manifest.shards:
        if not SHARD_NAME.fullmatch(shard.file):
            raise UserError(f"{path}: {shard.file!r} is no name of a shard; {_RESTORE}")
    return manifest


def _read(path: Path, advice: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        version = values["format_version"]
        newer = version > FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); {advice}") from error
    if newer:
        raise UserError(
            f"{path}: has format version {version}, this program reads up to {FORMAT_VERSION}; update ldm_vae, "
            "or encode the images to another output"
        )
    return values


def check_same_origin(expected: Mapping[str, Any], found: Mapping[str, Any], where: str, advice: str) -> None:
    """Raises: UserError that names every field of `expected` which is another one in `found`, and both values."""
    names = [field.name for field in dataclasses.fields(Origin)]
    changes = configuration.changed_keys(
        {name: found.get(name) for name in names}, {name: expected.get(name) for name in names}
    )
    if changes:
        shown = [f"{key} is {short(old)} there and {short(new)} here" for key, (old, new) in changes.items()]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        raise UserError(f"{where}: was made in another way: {'; '.join(shown[:3])}{more}; {advice}")


def short(value: Any) -> str:
    """A value for a sentence: fingerprints by their first 12 digits."""
    text = value if isinstance(value, str) else json.dumps(value)
    match = re.fullmatch(r"(sha256:)?([0-9a-f]{12})[0-9a-f]{52}", text)
    return f"{match[1] or ''}{match[2]}..." if match else text if len(text) <= 80 else text[:77] + "..."
