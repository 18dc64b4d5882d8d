"""`ldm-vae latents info` and `decode`: a description of a set, and some of its samples decoded to images.

`info` reads the manifest and the index only, so it is fast for any size. For an unfinished set it shows the progress
and the command that continues it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.data import transforms
from ldm_vae.errors import UserError
from ldm_vae.files import readable_json, write_atomically
from ldm_vae.latents.dataset import LatentDataset, evenly, label_text, read_labels, samples_per_shard
from ldm_vae.latents.encode import training_words
from ldm_vae.latents.format import (
    FLIPPED,
    MAKE_AGAIN,
    MANIFEST,
    STORED_DTYPES,
    Manifest,
    open_set_folder,
    plan_name,
    planned_shards,
    read_manifest,
    read_origin,
    refuse_inside,
    shard_name,
    short,
)
from ldm_vae.latents.shard import open_shard
from ldm_vae.latents.state import command_for
from ldm_vae.latents.writer import QUARANTINE, SIDECAR_NAME
from ldm_vae.random import generator
from ldm_vae.runtime import compute_device
from ldm_vae.storage.base import Folder
from ldm_vae.utils.image_grid import labeled_sheet
from ldm_vae.utils.progress import begin, end, end_dry_run, say
from ldm_vae.utils.text import duration_text, pluralize, size_text

SHOWN_NAMES = 12


@dataclass(frozen=True)
class InfoConfig:
    """`ldm-vae latents info`.

    Reads the manifest and the index only, so it is fast for any size. For an unfinished set it shows the progress.

      ldm-vae latents info latents/mine
      ldm-vae latents info s3://bucket/latents/mine --json

    Args:
        latents: the folder of a set, or its URL.
        json: print everything, as JSON.
    """

    latents: str = "???"
    json: bool = False


def show_info(config: InfoConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Print a description of a set; `dry_run`: only check that it exists. Returns and raises: see `describe`."""
    begin("latents info", config.latents, "its manifest and its index are read", error=config.json)
    values = describe(config.latents)
    if dry_run:
        end_dry_run(config.latents, "it takes a few seconds at most")
        return values
    say(readable_json(values).rstrip("\n") if config.json else "\n".join(lines(values)))
    verify = ["ldm-vae", "latents", "verify", config.latents]
    if values["finished"]:
        end(config.latents, pluralize(values["count"], "sample"), verify, error=config.json)
    else:
        end(config.latents, f"is not finished: {_progress(values['unfinished'])}", error=config.json)
    return values


def describe(location: str | Path) -> dict[str, Any]:
    """The fields of the manifest, with sizes, reasons of rejection and unfinished segments.

    Raises: UserError if there is no set, or its records are damaged.
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
    """Reason -> number of rejected images, the most frequent first. Raises: UserError if the list is damaged."""
    if not manifest.rejected:
        return {}
    try:
        lines = folder.read(QUARANTINE).splitlines()
        return dict(Counter(json.loads(line)["reason"] for line in lines).most_common())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"cannot be read ({type(error).__name__})"
        raise UserError(f"{folder.location}/{QUARANTINE}", what, MAKE_AGAIN) from error


def _unfinished(folder: Folder, number: int) -> dict[str, Any] | None:
    """The unfinished segment `number`, if any: `segment`, finished `shards`, `planned` shards, and its `command`."""
    if not folder.exists(plan_name(number)):
        return None
    origin, sizes = read_origin(folder, number), folder.sizes("shard-")
    numbers = (int(match[1]) for match in map(SIDECAR_NAME.fullmatch, sizes) if match)
    shards = sum(number >= origin.first_shard and shard_name(number) in sizes for number in numbers)
    command = command_for(number, origin.dataset)
    return {"segment": number, "shards": shards, "planned": planned_shards(origin), "command": command}


def lines(values: dict[str, Any]) -> list[str]:
    """The result of `describe` as text."""
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
        _row("samples", f"{count:,} in {pluralize(values['shards'], 'shard')}"),
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
        shown.append(_row("left out", f"{pluralize(values['rejected'], 'image')}: {reasons}"))
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
    images = f"{pluralize(part['count'], 'image')} of {part['source']} ({part['part']})"
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


# Decoding samples into a contact sheet.

SHEET_SAMPLES = 16
LEAST_SIDE = 128
"""Smallest side of an image on the sheet: smaller ones are enlarged, to make room for their names."""
SHEET_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")


@dataclass(frozen=True)
class DecodeConfig:
    """`ldm-vae latents decode`.

    Shows whether the latents still match their pictures. The autoencoder must be the one that made them.

      ldm-vae latents decode runs/latents autoencoder=runs/vae output=sheet.png
      ldm-vae latents decode runs/latents autoencoder=runs/vae output=cats.png label=cat count=30
      ldm-vae latents decode runs/latents autoencoder=runs/vae output=three.png samples=3,17,99 --flipped

    Args:
        latents: the folder of a finished set, or its URL.
        autoencoder: the autoencoder that made the latents: a diffusers directory, a run of `train-vae`, or a hub id.
            Its decoder may have been trained further.
        output: the contact sheet, a .png, .webp or .jpg file.
        count: number of samples, evenly spread; null: 16.
        samples: numbers of the samples to decode instead, with commas: "3,17,99".
        label: the class of the samples; null: any.
        flipped: decode the stored mirror images.
        posterior: `mean` or `sample` of stored moments; null: the mean.
        device: auto, cpu, cuda, cuda:1 ...
    """

    latents: str = "???"
    autoencoder: str = "???"
    output: str = "???"
    count: int | None = None
    samples: str | None = None
    label: str | None = None
    flipped: bool = False
    posterior: Literal["mean", "sample"] | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if Path(self.output).suffix.lower() not in SHEET_SUFFIXES and self.output != "???":
            raise UserError(f"output: {self.output} is not the name of an image; let it end in .png")
        if self.samples and (self.label or self.count):
            raise UserError("label, count: have no effect with samples, which lists them; leave them out")
        parse_numbers(self.samples)


def parse_numbers(text: str | None) -> list[int]:
    """`3,17,99` -> [3, 17, 99]; empty for None. Raises: UserError."""
    words = [word.strip() for word in text.split(",")] if text else []
    if not all(word.isdecimal() for word in words):
        raise UserError(f"samples: {text!r} is not a list of numbers; give them as 3,17,99")
    return [int(word) for word in words]


def decode_latents(config: DecodeConfig, *, overwrite: bool = False, dry_run: bool = False) -> list[DecodedSample]:
    """Decode samples of a set into a contact sheet.

    Args:
        overwrite: replace an earlier sheet.
        dry_run: decode the first sample only, to estimate the time; write nothing.

    Raises:
        UserError: no finished set, an autoencoder that did not make it, samples that do not exist, or a damaged shard.
    """
    output = Path(config.output)
    if output.exists() and not overwrite:
        raise UserError(f"output: {output} exists already; give another name, or --overwrite")
    refuse_inside(output, "output")
    open_set_folder(config.latents)
    dataset = LatentDataset(config.latents)
    manifest = dataset.manifest
    count = SHEET_SAMPLES if config.count is None else config.count
    numbers = choose(manifest, count, parse_numbers(config.samples), config.label)
    autoencoder = load_autoencoder(config.autoencoder)
    check_autoencoder(manifest, autoencoder, f"autoencoder={config.autoencoder}")
    autoencoder.to(compute_device(config.device))
    begin(
        "latents decode", f"{len(numbers):,} of {pluralize(manifest.count, 'sample')} of {config.latents}",
        config.autoencoder, str(autoencoder.device), f"to {output}",
    )  # fmt: skip
    started = time.monotonic()
    chosen = numbers[:1] if dry_run else numbers
    decoded = decode_samples(dataset, autoencoder, chosen, flipped=config.flipped, posterior=config.posterior)
    if dry_run:
        seconds = len(numbers) * (time.monotonic() - started)
        end_dry_run(output, f"{pluralize(len(numbers), 'sample')} take about {duration_text(seconds)}")
        return decoded
    write_atomically(output, contact_sheet(decoded).save)
    for sample in decoded:
        say("  ".join(word for word in (str(sample.number), sample.label, sample.id) if word))
    words = training_words(config.latents, manifest.content, config.autoencoder, autoencoder)
    end(output, f"{len(decoded):,} of {pluralize(manifest.count, 'sample')}", words)
    return decoded


@dataclass(frozen=True)
class DecodedSample:
    """A sample as an image. `label` is empty without a label."""

    number: int
    label: str
    id: str
    image: Image.Image

    @property
    def caption(self) -> str:
        """Two lines: number and label; the last part of the id."""
        return f"{self.number} {self.label}".rstrip() + "\n" + self.id.rsplit("/", 1)[-1]


def check_autoencoder(manifest: Manifest, autoencoder: Autoencoder, where: str) -> None:
    """Raises: UserError unless this autoencoder made the latents; for codes its quantizer is compared too."""
    if manifest.content != "indices":
        manifest.check_autoencoder(autoencoder.encoder_fingerprint(), where)
        return
    found, made_by = autoencoder.token_fingerprint(), manifest.autoencoder.get("token_fingerprint")
    if found != made_by:
        what = f"its quantizer has the fingerprint {short(found)}, but the codes were made by {short(made_by)}"
        raise UserError(where, what, "give the autoencoder that made them, or encode again with this one")


def choose(manifest: Manifest, count: int, samples: Sequence[int] = (), label: str | None = None) -> list[int]:
    """The numbers of samples to decode: `samples`, or `count` of them evenly spread over the set or over a class.

    Raises:
        UserError: no such sample, an unknown label (with the nearest known one), or no sample with this label.
    """
    if samples:
        for number in samples:
            if not 0 <= number < manifest.count:
                raise UserError(f"samples: there is no sample {number}; numbers go from 0 to {manifest.count - 1}")
        return list(samples)
    if count < 1:
        raise UserError(f"count: {count} is below 1")
    if label is None:
        return samples_per_shard(manifest.shard_index.counts, count)
    names = list(manifest.label_names)
    if label not in names:
        near = difflib.get_close_matches(label, names, n=1, cutoff=0.5)
        known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {known}" if names else "it has no labels"
        raise UserError(f"label: {label!r} is not a class of {manifest.where.location}; {hint}")
    members = np.flatnonzero(read_labels(manifest) == names.index(label))
    if not len(members):
        raise UserError(f"label: no sample of {manifest.where.location} is {label!r}; choose another class")
    return members[evenly(len(members), count)].tolist()


def decode_samples(
    dataset: LatentDataset, autoencoder: Autoencoder, numbers: Sequence[int], *, flipped: bool = False,
    posterior: Literal["mean", "sample"] | None = None,
) -> list[DecodedSample]:  # fmt: skip
    """Decode samples of a set, one at a time.

    Args:
        autoencoder: on the device to use; `check_autoencoder` checks that it is the right one.
        flipped: decode the stored mirror images instead.
        posterior: `mean` (default) or `sample` of stored moments. The noise is a function of the sample's number.

    Raises:
        UserError: no mirror images or moments are stored, or a shard is damaged.
    """
    manifest, where = dataset.manifest, dataset.where
    if flipped and not manifest.flipped:
        raise UserError(f"flipped: {where} holds no mirror images; leave it out, or encode with flip=true")
    if posterior and manifest.content != "moments":
        raise UserError(
            f"posterior: {where} holds {manifest.content} and no moments; leave posterior out, or encode with "
            "store=moments"
        )
    found = []
    for number in numbers:
        place, row = dataset.locate(number)
        shard = open_shard(manifest.where, place, dataset.index[place], manifest.layout, verify=True)
        stored = torch.from_numpy(shard[manifest.content + (FLIPPED if flipped else "")][row].copy())
        label = label_text(manifest, int(shard["label"][row]))
        image = _decode(manifest, autoencoder, stored.view(STORED_DTYPES[manifest.dtype]), number, posterior)
        found.append(DecodedSample(number, label, dataset.id(number), transforms.to_pil(image)[0]))
    return found


@torch.no_grad()
def _decode(manifest: Manifest, autoencoder: Autoencoder, stored: Tensor, number: int, posterior: str | None) -> Tensor:
    """One stored sample -> an image (1, 3, H, W) in [-1, 1]."""
    if manifest.content == "indices":
        codes = stored.int()[None].to(autoencoder.device)
        return transforms.finite_pixels(autoencoder.decode_indices(codes).sample.float(), "decoder").clamp(-1, 1)
    latents = stored.float()
    if manifest.content == "moments":
        latents, logvar = latents.chunk(2)
        if posterior == "sample":
            noise = torch.randn(latents.shape, generator=generator(0, "decode", number))
            latents = latents + torch.exp(0.5 * logvar) * noise
    return autoencoder.decode_images(latents[None].to(autoencoder.device))


def contact_sheet(decoded: Sequence[DecodedSample]) -> Image.Image:
    """All samples on one page, with captions."""
    images = []
    for sample in decoded:
        factor = max(1, -(-LEAST_SIDE // max(sample.image.size)))
        size = (sample.image.width * factor, sample.image.height * factor)
        images.append(sample.image.resize(size, Image.Resampling.NEAREST))
    columns = math.ceil(math.sqrt(len(images)))  # nearly square, not one long row
    return labeled_sheet(images, [sample.caption for sample in decoded], maximum_columns=columns)
