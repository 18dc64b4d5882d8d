"""What a set is, in a screenful: from its manifest and index alone, whatever its size. Reads no shard.

Of a set that is not finished it says how far it has come, and what continues it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ldm_vae.errors import UserError
from ldm_vae.latents.index import shard_name
from ldm_vae.latents.manifest import MANIFEST, Manifest, plan_name, planned_shards, read_manifest, read_origin, short
from ldm_vae.latents.output import QUARANTINE, SIDECAR_NAME
from ldm_vae.latents.tools.place import open_set_folder
from ldm_vae.latents.tools.state import command_for
from ldm_vae.latents.words import counted, size_text
from ldm_vae.storage import Folder

SHOWN_NAMES = 12


def describe(location: str | Path) -> dict[str, Any]:
    """What `--json` prints: the manifest's fields, and sizes, reasons and unfinished segments beside them.

    Raises: UserError where there is no set, or its records are damaged.
    """
    folder = open_set_folder(location)
    if not folder.exists(MANIFEST) and folder.exists(plan_name(0)) and not folder.sizes("index-"):
        origin = read_origin(folder)
        recipe = {"layout": dataclasses.asdict(origin.layout), "autoencoder": _made_by(origin.autoencoder)}
        return {"location": str(location), "finished": False, **recipe, "unfinished": _unfinished(folder, 0)}
    manifest = read_manifest(folder)
    index, layout = manifest.shard_index, manifest.layout
    values = manifest.to_dict()
    return {
        "location": str(location),
        "finished": True,
        **values,
        "sample_shape": list(layout.sample_shape),
        "sample_bytes": layout.sample_bytes,
        "size_bytes": index.size_bytes,
        "rejected_reasons": _reasons(folder, manifest),
        "unfinished": _unfinished(folder, len(manifest.datasets)),
    }


def _made_by(autoencoder: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in autoencoder.items() if name != "config"}


def _reasons(folder: Folder, manifest: Manifest) -> dict[str, int]:
    """Reason -> images left out, the most frequent first. Raises: UserError when the list is damaged."""
    if not manifest.rejected:
        return {}
    try:
        lines = folder.read(QUARANTINE).splitlines()
        return dict(Counter(json.loads(line)["reason"] for line in lines).most_common())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder.location}/{QUARANTINE}: cannot be read ({type(error).__name__}); "
            "`ldm-vae latents repair` makes it again"
        ) from error


def _unfinished(folder: Folder, number: int) -> dict[str, Any] | None:
    """The segment `number`, where it was begun: `segment`, `shards` that are there, of how many `planned`."""
    if not folder.exists(plan_name(number)):
        return None
    origin, sizes = read_origin(folder, number), folder.sizes("shard-")
    numbers = (int(match[1]) for match in map(SIDECAR_NAME.fullmatch, sizes) if match)
    shards = sum(number >= origin.first_shard and shard_name(number) in sizes for number in numbers)
    command = command_for(number, origin.dataset)
    return {"segment": number, "shards": shards, "planned": planned_shards(origin), "command": command}


def lines(values: dict[str, Any]) -> list[str]:
    """For people; `values` of `describe`."""
    if not values["finished"]:
        layout, made_by = values["layout"], values["autoencoder"]
        shape = "x".join(map(str, layout["latent_shape"]))
        return [
            _row("set", values["location"]),
            _row("content", f"{layout['content']} of {shape} in {layout['dtype']}"),
            _row("autoencoder", f"{made_by['class']}, {short(made_by['fingerprint'])}"),
            _row("unfinished", _progress(values["unfinished"])),
        ]
    shape, latent = ("x".join(map(str, values[name])) for name in ("sample_shape", "latent_shape"))
    mirrored = ", with mirror images" if values["flipped"] else ""
    size_bytes, count = values["size_bytes"], values["count"]
    made_by, encoding = values["autoencoder"], values["encoding"]
    shown = [
        _row("set", values["location"]),
        _row("content", f"{values['content']} {shape} in {values['dtype']}{mirrored} (latents {latent})"),
        _row("samples", f"{count:,} in {counted(values['shards'], 'shard')}"),
        _row("size", f"{size_text(size_bytes)}, {size_text(values['sample_bytes'])} a sample"),
        _row("autoencoder", made_by["class"]),
        *(_row("", f"{name} {short(value)}") for name, value in made_by.items() if name.endswith("fingerprint")),
        _row("encoding", ", ".join(f"{name} {value}" for name, value in encoding.items())),
        *_table("preprocessing", [(name, str(value)) for name, value in values["preprocessing"].items()]),
        *(_row("" if number else "segments", _segment(number, part)) for number, part in enumerate(values["datasets"])),
        _row("classes", _names(values["label_names"])),
        *_statistics(values["statistics"]),
    ]
    if values["rejected"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in values["rejected_reasons"].items())
        shown.append(_row("left out", f"{counted(values['rejected'], 'image')}: {reasons}"))
    if values["unfinished"]:
        shown.append(_row("unfinished", _progress(values["unfinished"])))
    return shown


def _row(name: str, text: str) -> str:
    return f"{name:<14} {text}".rstrip()


def _table(name: str, pairs: list[tuple[str, str]]) -> list[str]:
    return [_row("" if place else name, f"{key}: {value}") for place, (key, value) in enumerate(pairs)]


def _segment(number: int, part: dict[str, Any]) -> str:
    prefix = f", ids begin with {part['id_prefix']}" if part.get("id_prefix") else ""
    where = f"from shard {part['first_shard']:,}"
    images = f"{counted(part['count'], 'image')} of {part['source']} ({part['part']})"
    return f"{number}: {images}, {where}, dataset {short(part['fingerprint'])}{prefix}"


def _names(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return f"{len(names):,}: {', '.join(names[:SHOWN_NAMES])}{more}"


def _statistics(statistics: dict[str, Any]) -> list[str]:
    if "mean" not in statistics:
        return _table("statistics", [(name, f"{value:,}") for name, value in statistics.items()])
    rows = (
        f"channel {channel}: mean {mean:+.4f}, std {std:.4f}"
        for channel, (mean, std) in enumerate(zip(statistics["mean"], statistics["std"]))
    )
    return [_row("" if place else "statistics", text) for place, text in enumerate(rows)]


def _progress(unfinished: dict[str, Any]) -> str:
    planned = unfinished["planned"]
    of = "" if planned is None else f" of {planned:,}"
    where = f"segment {unfinished['segment']}, " if unfinished["segment"] else ""
    return f"{where}{unfinished['shards']:,}{of} shards; the same `{unfinished['command']}` command continues"
