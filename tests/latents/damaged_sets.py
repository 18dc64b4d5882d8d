"""A set with everything that one can have: images left out, mirror images, an appended segment; and damage to it."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from ldm_vae import config as configuration
from ldm_vae.latents.append import AppendConfig, append_all_sizes
from ldm_vae.latents.encode import EncodeConfig, encode_all_sizes, make_accelerator

SIDE_FILES = ("run.json", "encode.lock")
"""No part of the set: a record of the job, and its lock."""


@dataclass(frozen=True)
class RichSet:
    """`encoded`, `appended`: the settings that made its segments, without the output."""

    path: Path
    encoded: list[str]
    appended: list[str]


def make(folder: Path, images: Path, settings: list[str]) -> RichSet:
    """14 images (1 broken) in 4 shards of 4, then 6 (1 broken) in 2 shards: 18 samples."""
    files = sorted(images.rglob("*.png"))
    for name, chosen in (
        ("first/a", files[:7]),
        ("first/b", files[7:13]),
        ("more/b", files[13:16]),
        ("more/c", files[16:18]),
    ):
        (folder / name).mkdir(parents=True)
        for file in chosen:
            shutil.copy(file, folder / name)
    for broken in ("first/b/999.png", "more/b/000.png"):
        (folder / broken).write_bytes(b"no image")
    words = [word for word in settings if not word.startswith("data.path")] + ["flip=true"]
    encoded, appended = ([*words, f"data.path={folder / name}"] for name in ("first", "more"))
    appended.append("id_prefix=more/")
    config = configuration.load(EncodeConfig, None, [*encoded, f"output={folder / 'set'}"])
    assert encode_all_sizes(config, make_accelerator(config)).exit_code == 0
    more = configuration.load(AppendConfig, None, [*appended, f"output={folder / 'set'}"])
    assert append_all_sizes(more, make_accelerator(more)).exit_code == 0
    return RichSet(folder / "set", encoded, appended)


def files_of(folder: Path) -> list[Path]:
    """Of the set itself; the index of the version before is none of it."""
    listed = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        listed = {part["file"] for part in json.loads((folder / "manifest.json").read_bytes())["index"]}
    paths = (path for path in folder.iterdir() if path.name not in SIDE_FILES)
    return sorted(path for path in paths if listed is None or path.name[:6] != "index-" or path.name in listed)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in files_of(folder)}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flips(folder: Path, number: int, seed: int) -> list[tuple[Path, int]]:
    """(file, bit), dealt to all files in turn."""
    rng, files = random.Random(seed), [path for path in files_of(folder) if path.stat().st_size]
    chosen = [files[place % len(files)] for place in range(number)]
    return [(path, rng.randrange(8 * path.stat().st_size)) for path in chosen]
