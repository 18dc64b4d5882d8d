"""A finished run as a directory to give away: rounded weights in small files, the records of its training, sealed.

Owns which records travel and what is left out of them: folders of the machine that trained. The copy is a model of its
own: half precision changes the weights, and with them the fingerprint, so its record names both.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ldm_vae import provenance
from ldm_vae.autoencoder import ancestry
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint, fingerprint
from ldm_vae.autoencoder.interop.convert import DTYPES, RECORD, Precision, check_target
from ldm_vae.autoencoder.models import load_autoencoder, model_directory
from ldm_vae.autoencoder.record import RECORD as TRAINING
from ldm_vae.autoencoder.record import thin
from ldm_vae.autoencoder.weights import check_finite
from ldm_vae.diffusion.generation import pipeline_directory
from ldm_vae.diffusion.parts import INDEX
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.errors import UserError
from ldm_vae.files import publish_directory, temporary_directory, write_json, write_text
from ldm_vae.seal import seal

SHARD_SIZE = "15MB"
LARGEST_FILE_BYTES = 16 << 20
"""What hosts of repositories take without further tools."""
RECORDS = (provenance.RUN_RECORD, "config.yaml")
METRICS = "metrics.jsonl"
METRIC_LINES = 300
WORD = r"[^/\s'\",;=\[\]{}]+"
ADDRESS = r"(?<![\w+.-])(?!(?:[\w+.-]*\+)?(?:file|local):)[a-z][\w+.-]*://(?:(?!::)[^\s'\",;])*"
"""Of the internet or a bucket; it ends where `::` chains another place to it."""
LOCAL = r"(?:(?<![\w+.-])[a-z][\w+.-]*\+)?(?:file|local):"
"""What a URL of this machine opens with, as `file:` or `git+file:`."""
ORIGIN = rf"(?:\.\.)?|~[a-z_][\w.-]*|{LOCAL}|(?<![^\s'\",;=\[\]{{}}])(?:{WORD}/+)+\.\."
"""What a path opens with: nothing for the root, or `..`, another's home, a URL of this machine, folders and `..`."""
NAME = r"[^/\\\s'\",;=\[\]{}:*?<>|]+"
WINDOWS_ORIGIN = rf"(?:{LOCAL}/*)?[a-z]:[/\\]|\.\.\\|(?<!\\)\\\\+{NAME}[/\\]"
"""A drive, `..`, a host. JSON doubles its backslashes, so a run of them counts as one; it goes or stays as a whole."""
PATHS = (
    rf"(?:{WINDOWS_ORIGIN})[/\\]*(?:{NAME}(?: (?!#){NAME})*[/\\]+)*({NAME})",
    rf"(?:{ORIGIN})/+(?:{WORD}(?: (?!#){WORD})*/+)*({WORD})",
)
FOLDERS = re.compile(rf"({ADDRESS})|(?<![\w.~/*?-])(?:{'|'.join(PATHS)})", re.IGNORECASE)
"""An address, which stays, or a path that tells of the machine, with its last name; `~/images` is neither."""


def pack(
    source: str,
    target: str | Path,
    *,
    precision: Precision = "fp16",
    overwrite: bool = False,
    autoencoder: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Write the directory completely or not at all; return what is in conversion.json, and notes in words.

    Args:
        source: a run of `train-vae` or `train-diffusion`, or the directory of an autoencoder or of a pipeline.
        target: a new directory, or an earlier conversion with `overwrite`.
        precision: of the written weights.
        autoencoder: takes the place of a pipeline's, with the same encoder and a decoder that was trained further.

    Raises:
        UserError: no model there, a weight that the precision cannot hold, or a target with something else in it.
    """
    target = Path(target)
    check_target(target, source, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_directory(target)
    try:
        if has_pipeline(source):
            fingerprints = _write_pipeline(source, folder, precision, autoencoder)
        elif autoencoder is not None:
            raise UserError(f"{source}: is an autoencoder, not a pipeline that could take another one; leave it out")
        else:
            fingerprints = _write_autoencoder(source, folder, precision)
        _check_sizes(folder)
        record: dict[str, Any] = {
            "format_version": 1,
            "source": {"name": without_folders(source), **fingerprints["source"]},
            "to": "checkpoint",
            "precision": precision,
            **fingerprints["copy"],
        }
        write_json(folder / RECORD, record | {"versions": provenance.versions()})
        seal(folder)
        publish_directory(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return record, _notes(record)


def has_pipeline(source: str) -> bool:
    """Whether it is a pipeline, or a run of `train-diffusion`."""
    directory = Path(source).expanduser()
    return any((one / INDEX).is_file() for one in (directory, directory / "pipeline"))


def without_folders(text: str) -> str:
    """The same text; of every path in it that is absolute or may lead outside only the last name is left."""
    return FOLDERS.sub(r"\1\2\3", text)


def _write_autoencoder(source: str, folder: Path, precision: Precision) -> dict[str, dict[str, str]]:
    model = load_autoencoder(source)
    before = _identities(model)
    nn.Module.to(model, DTYPES[precision])
    check_finite(model.state_dict(), f"{source} in {precision}")
    after = _identities(model)
    model.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD_SIZE)
    directory = model_directory(Path(source))
    if directory is not None:
        _copy_records(directory, folder)
        if (directory / TRAINING).is_file():
            record = json.loads(without_folders((directory / TRAINING).read_text())) | after
            if after != before:
                record["rounded_from"] = {"precision": precision, **before}
            write_json(folder / TRAINING, record)
    return {"source": before, "copy": after}


def _write_pipeline(
    source: str, folder: Path, precision: Precision, autoencoder: str | None
) -> dict[str, dict[str, str]]:
    directory = pipeline_directory(source)
    parts = {} if autoencoder is None else {"autoencoder": load_autoencoder(autoencoder)}
    pipeline = LatentDiffusionPipeline.from_pretrained(directory, use_safetensors=True, **parts)
    before = _identities(pipeline.autoencoder)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            nn.Module.to(part, DTYPES[precision])
            check_finite(part.state_dict(), f"{source}, {name} in {precision}")
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD_SIZE)
    _copy_records(directory, folder)
    if autoencoder is None:  # of a copy those that came along
        made_by = ancestry.read_runs(directory / ancestry.OF_AUTOENCODER)
    else:
        made_by = ancestry.runs_of(Path(autoencoder), before["fingerprint"])
    _write_runs(folder / ancestry.OF_AUTOENCODER, made_by)
    return {"source": before, "copy": _identities(pipeline.autoencoder)}


def _identities(model: Any) -> dict[str, str]:
    return {"fingerprint": fingerprint(model), "encoder_fingerprint": encoder_fingerprint(model)}


def _copy_records(directory: Path, folder: Path) -> None:
    """Of the run that the model `directory` lies in: its command and settings, and its curves at some hundred steps."""
    folders = [directory, directory.parent] if directory.name in ("autoencoder", "pipeline") else [directory]
    place = next((one for one in folders if (one / provenance.RUN_RECORD).is_file()), None)
    if place is None:
        return
    for name in RECORDS:
        if (place / name).is_file():
            write_text(folder / name, without_folders((place / name).read_text()))
    _write_runs(folder / ancestry.FILE, ancestry.earlier_runs(place))
    if (place / METRICS).is_file():
        lines = (place / METRICS).read_text().splitlines()
        rare = {number for number, line in enumerate(lines) if '"held_out/' in line or '"alarm"' in line}
        kept = rare.union(thin([number for number in range(len(lines)) if number not in rare], METRIC_LINES))
        write_text(folder / METRICS, "".join(f"{without_folders(lines[number])}\n" for number in sorted(kept)))


def _write_runs(path: Path, runs: list[dict[str, Any]]) -> None:
    if runs:
        write_text(path, without_folders(ancestry.runs_text(runs)))


def _check_sizes(folder: Path) -> None:
    """Raises: UserError: one tensor alone is larger than a file may be."""
    for path in folder.rglob("*.safetensors"):
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise UserError(
                f"{path.name}: one tensor of {path.stat().st_size >> 20} MiB cannot be divided into files of at most "
                f"{LARGEST_FILE_BYTES >> 20} MiB; give away a smaller model"
            )


def _notes(record: dict[str, Any]) -> list[str]:
    if record["fingerprint"] == record["source"]["fingerprint"]:
        return []
    return [
        f"rounding to {record['precision']} changed the weights, so this is another autoencoder: measure this copy, "
        "and encode with it what is to be used with it; a pipeline goes on to accept latents of its original"
    ]
